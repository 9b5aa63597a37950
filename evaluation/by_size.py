"""Results by the size of tasks, where sizes vary: by shots and by ways, as a table and as a record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evaluation.meta_test import Evaluation
from evaluation.tables import Caption, StepResults, table, units

MOST_ROWS = 8  # of a table; more sizes are put together


def sizes_table(evaluation: Evaluation, caption: Caption) -> str:
    """Return the results after the quoted step by each size that varies; "" if none does."""
    texts = []
    for name in evaluation.sizes:
        rows = []
        for label, part in _parts(evaluation, name):
            results = [StepResults.over([part], norm) for norm in part.losses]
            measure, scale, digits = units(results[0].measure(caption.loss_name))
            cells = [one.cell(min(caption.test_steps, len(one.means) - 1), scale, digits) for one in results]
            rows.append([label, f"{results[0].tasks:,}", *cells])
        names = list(evaluation.losses)
        texts.append(table([name, "tasks", *(names if len(names) > 1 else [measure])], rows))
    return "\n\n".join(texts)


def sizes_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers behind the table, after all steps."""
    return {
        name: {
            label: {"tasks": len(part.sizes[name])}
            | {norm: StepResults.over([part], norm).record() for norm in part.losses}
            for label, part in _parts(evaluation, name)
        }
        for name in evaluation.sizes
    }


def _parts(evaluation: Evaluation, name: str) -> Iterator[tuple[str, Evaluation]]:
    """Yield the tasks of each size, or of some that follow each other, with a label."""
    values = evaluation.sizes[name]
    for sizes in _groups(values.unique()):
        ends = dict.fromkeys((int(sizes[0]), int(sizes[-1])))
        yield "-".join(map(str, ends)), evaluation.of_tasks(torch.isin(values, sizes))


def _groups(sizes: Tensor) -> tuple[Tensor, ...]:
    return sizes.tensor_split(min(len(sizes), MOST_ROWS))

"""Results by the size of tasks, where sizes vary: by shots and by ways, as a table and as a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.meta_test import Evaluation
from evaluation.tables import Caption, StepResults, table, units

MOST_ROWS = 8  # of a table; more sizes are put together


def sizes_table(runs: Sequence[Evaluation], caption: Caption) -> str:
    """Return the results of runs on the same tasks, after the quoted step, by each size that varies."""
    texts = []
    for name in runs[0].sizes:
        rows = []
        for label, parts in _parts(runs, name):
            results = [StepResults.over(parts, norm) for norm in parts[0].losses]
            measure, scale, digits = units(results[0].measure(caption.loss_name))
            cells = [one.cell(min(caption.test_steps, len(one.means) - 1), scale, digits) for one in results]
            rows.append([label, f"{results[0].tasks:,}", *cells])
        names = list(runs[0].losses)
        texts.append(table([name, "tasks", *(names if len(names) > 1 else [measure])], rows))
    return "\n\n".join(texts)


def sizes_record(runs: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the numbers behind the table, after all steps."""
    return {
        name: {
            label: {"tasks": len(parts[0].sizes[name])}
            | {norm: StepResults.over(parts, norm).record() for norm in parts[0].losses}
            for label, parts in _parts(runs, name)
        }
        for name in runs[0].sizes
    }


def _parts(runs: Sequence[Evaluation], name: str) -> Iterator[tuple[str, list[Evaluation]]]:
    """Yield the tasks of each size, or of some that follow each other, with a label."""
    values = runs[0].sizes[name]
    for sizes in _groups(values.unique()):
        ends = dict.fromkeys((int(sizes[0]), int(sizes[-1])))
        yield "-".join(map(str, ends)), [run.of_tasks(torch.isin(values, sizes)) for run in runs]


def _groups(sizes: Tensor) -> tuple[Tensor, ...]:
    return sizes.tensor_split(min(len(sizes), MOST_ROWS))

"""Results by the size of tasks, where sizes vary: by shots and by ways, as a table and as a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.meta_test import Evaluation
from evaluation.tables import Caption, StepResults, choose_units, table

MOST_ROWS = 8  # of a table; more sizes are put together


def sizes_table(runs: Sequence[Evaluation], caption: Caption) -> str:
    """Return the results of runs on the same tasks, after the quoted step, by each size that varies."""
    texts = []
    for name in runs[0].sizes:
        rows = []
        for label, tasks in _parts(runs[0].sizes[name]):
            results = [StepResults.over(runs, norm, tasks) for norm in runs[0].losses]
            measure, scale, digits = choose_units(results[0].measure(caption.loss_name))
            cells = [one.cell(min(caption.test_steps, len(one.means) - 1), scale, digits) for one in results]
            rows.append([label, f"{results[0].tasks:,}", *cells])
        names = list(runs[0].losses)
        texts.append(table([name, "tasks", *(names if len(names) > 1 else [measure])], rows))
    return "\n\n".join(texts)


def sizes_record(runs: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the numbers behind the table, after all steps."""
    return {
        name: {
            label: {"tasks": int(tasks.sum())}
            | {norm: StepResults.over(runs, norm, tasks).record() for norm in runs[0].losses}
            for label, tasks in _parts(runs[0].sizes[name])
        }
        for name in runs[0].sizes
    }


def _parts(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a label of each size, or of some that follow each other, and its tasks, bool `[tasks]`."""
    sizes = values.unique()
    for group in sizes.tensor_split(min(len(sizes), MOST_ROWS)):
        ends = dict.fromkeys((int(group[0]), int(group[-1])))
        yield "-".join(map(str, ends)), torch.isin(values, group)

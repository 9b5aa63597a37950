"""Tables for the terminal, and records for result files. Every JSON and CSV file is written here.

`evaluation_record` holds one `Evaluation`; what is shown of it, and of several runs, is in `seeds` and `paired`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.files import write_whole
from evaluation.meta_test import Evaluation, mean_and_interval

ROWS_PRINTED, LONGEST_CELL = 20, 24  # of predictions

# ---- result files ---------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: tensors as lists, numbers with seven digits, non-finite ones as null."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    text = json.dumps(_plain(record), indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows of cells as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers behind table and picture, and the values of each task behind the numbers."""
    per_step = [
        {"normalisation": name, "steps": step} | _statistics(evaluation, name, step)
        for name, losses in evaluation.losses.items()
        for step in range(losses.shape[1])
    ]
    per_task = {"loss": evaluation.losses, "accuracy": evaluation.accuracies}
    return {"per_step": per_step, "per_task": {name: values for name, values in per_task.items() if values}}


def _statistics(evaluation: Evaluation, normalisation: str, step: int) -> dict[str, Any]:
    """Return the means over all tasks after a step, and that of the losses that have not diverged."""
    diverged = evaluation.diverged(normalisation)[:, step]
    losses = evaluation.losses[normalisation][:, step]
    measures = {"loss": losses, "loss_without_diverged": losses[~diverged]}
    if evaluation.accuracies:
        measures["accuracy"] = evaluation.accuracies[normalisation][:, step]
    row: dict[str, Any] = {"diverged_tasks": int(diverged.sum())}
    for name, values in measures.items():
        mean, interval = mean_and_interval(values)
        row |= {name: mean.item(), f"{name}_interval_95": interval.item()}
    return row


# ---- tables ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """What tables and figures say about results."""

    title: str
    loss_name: str
    trained_steps: int | None  # None: several runs that were trained for different numbers
    test_steps: int  # whose result is quoted


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return right-aligned columns as text; columns without any text below their heading are left out."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def units(loss_name: str, *, accuracy: bool) -> tuple[str, float, int]:
    """Return how a table shows a measure: its name, the factor of its numbers and their digits."""
    return ("accuracy %", 100, 2) if accuracy else (loss_name, 1, 4)


def after_steps(steps: int) -> str:
    """Return "after 1 step", "after 2 steps", ..."""
    return f"after {steps} step{'s' * (steps != 1)}"


def predictions_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the first rows of predictions, as the terminal shows them."""
    more = f"\n... and {len(rows) - ROWS_PRINTED} more" if len(rows) > ROWS_PRINTED else ""
    return table(header, [[cell[:LONGEST_CELL] for cell in row] for row in rows[:ROWS_PRINTED]]) + more

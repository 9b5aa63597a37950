"""Results as tables for the terminal, and as records for result files.

`evaluation_record` and `evaluation_table` show one `Evaluation`; those of several runs are in `seeds` and
`paired`. Every JSON and CSV file is written here.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_whole
from evaluation.meta_test import Evaluation, mean_and_interval

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


# ---- tables ---------------------------------------------------------------------------------

Column = tuple[str, Sequence[str]]  # heading, of one or two lines, and cells
ROWS_PRINTED, LONGEST_CELL = 20, 24  # of predictions


def table(columns: Iterable[Column]) -> str:
    """Return right-aligned columns as text; columns without any text in their cells are left out."""
    split = [(heading.split("\n"), cells) for heading, cells in columns if any(cells)]
    height = max(len(heading) for heading, _ in split)
    padded = [[*heading, *[""] * (height - len(heading)), *cells] for heading, cells in split]
    widths = [max(map(len, column)) for column in padded]
    rows = zip(*padded, strict=True)
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)


@dataclass(frozen=True)
class Caption:
    """What tables and figures say about an evaluation."""

    title: str
    loss_name: str
    trained_steps: int | None  # None: several runs that were trained for different numbers
    test_steps: int  # whose result is quoted

    def measure(self, evaluation: Evaluation) -> str:
        """Return the name of the reported measure, for an axis."""
        return "query accuracy" if evaluation.accuracies else f"query {self.loss_name}"


def units(loss_name: str, *, accuracy: bool) -> tuple[str, float, int]:
    """Return how a table shows a measure: its name, the factor of its numbers and their digits."""
    return ("accuracy %", 100, 2) if accuracy else (loss_name, 1, 4)


def after_steps(steps: int) -> str:
    """Return "after 1 step", "after 2 steps", ..."""
    return f"after {steps} step{'s' * (steps != 1)}"


def evaluation_table(evaluation: Evaluation, caption: Caption) -> str:
    """Return the mean and its 95 % interval over all tasks, a row an inner step.

    Diverged tasks, if there are any, are counted, and the loss of the others is added.
    """
    several, rows = len(evaluation.losses) > 1, range(evaluation.steps + 1)

    def heading(title: str, normalisation: str) -> str:
        return f"{title}\n{normalisation}" if several else title

    columns: list[Column] = [("steps", [str(step) for step in rows])]
    quoted: list[str] = []
    for results, accuracy in ((evaluation.accuracies, True), (evaluation.losses, False)):
        title, scale, digits = units(caption.loss_name, accuracy=accuracy)
        for name, values in results.items():
            pairs = zip(*(t.tolist() for t in mean_and_interval(values * scale)), strict=True)
            cells = [f"{mean:.{digits}f} ± {interval:.{digits}f}" for mean, interval in pairs]
            columns.append((heading(title, name), cells))
            quoted.append(f"{title} {cells[caption.test_steps]}" + f" ({name})" * several)
    count = len(columns)
    for name, losses in evaluation.losses.items():
        diverged = evaluation.diverged(name)
        if diverged.any():
            rest = losses.where(~diverged, torch.nan).nanmean(0).tolist()
            columns.append((heading("diverged", name), list(map(str, diverged.sum(0).tolist()))))
            columns.append(
                (heading(f"{caption.loss_name} of the rest", name), [f"{loss:.4f}" for loss in rest])
            )
    counted = len(columns) > count
    columns.append(("", ["trained for" * (step == caption.trained_steps) for step in rows]))
    footer = f"Mean and 95 % interval over {evaluation.tasks} tasks"
    footer += "." if counted else "; none of them diverged."
    return f"{table(columns)}\n{footer}\n{after_steps(caption.test_steps).capitalize()}: {', '.join(quoted)}"


def predictions_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the first rows of predictions, as the terminal shows them."""
    shown = [[cell[:LONGEST_CELL] for cell in row] for row in rows[:ROWS_PRINTED]]
    columns = [(heading, [row[number] for row in shown]) for number, heading in enumerate(header)]
    more = f"\n... and {len(rows) - ROWS_PRINTED} more" if len(rows) > ROWS_PRINTED else ""
    return table(columns) + more


# ---- record ---------------------------------------------------------------------------------


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers behind table and picture, and the values of each task behind the numbers."""
    per_step = [
        {"normalisation": name, "steps": step} | _statistics(evaluation, name, step)
        for name in evaluation.losses
        for step in range(evaluation.steps + 1)
    ]
    per_task = {"loss": evaluation.losses} | (
        {"accuracy": evaluation.accuracies} if evaluation.accuracies else {}
    )
    return {"per_step": per_step, "per_task": per_task}


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

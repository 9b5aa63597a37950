"""What people look at: figures, tables and result files. Nothing else writes them.

Functions take plain numbers and CPU tensors; matplotlib is imported when used.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.files import write_whole
from evaluation.meta_test import Evaluation, mean_and_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DPI = 200  # of pictures in files and in TensorBoard


# ---- result files ---------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON has neither tensors nor NaN: lists with seven digits, and null."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    text = json.dumps(_plain(result), indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    import csv

    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def write_figure(path: Path, figure: Figure) -> None:
    write_whole(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))


# ---- evaluation: table and record -----------------------------------------------------------


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers behind table and picture, and the per-task values behind the numbers."""
    per_step: list[dict[str, Any]] = []
    for name, losses in evaluation.losses.items():
        diverged = evaluation.diverged(name)
        for step in range(losses.shape[1]):
            row: dict[str, Any] = {"normalisation": name, "steps": step}
            measures = {"loss": losses}
            if name in evaluation.accuracies:
                measures["accuracy"] = evaluation.accuracies[name]
            for measure, values in measures.items():
                mean, interval = mean_and_interval(values[:, step])
                row |= {measure: mean.item(), f"{measure}_interval_95": interval.item()}
            kept = losses[~diverged[:, step], step]
            ordered = losses[:, step].nan_to_num(nan=math.inf).sort().values
            row |= {
                "loss_median": ordered[len(ordered) // 2].item(),
                "loss_without_worst_percent": ordered[: math.ceil(0.99 * len(ordered))].mean().item(),
                "diverged_tasks": int(diverged[:, step].sum()),
                "loss_without_diverged": kept.mean().item() if len(kept) else None,
                "loss_without_diverged_interval_95": mean_and_interval(kept)[1].item() if len(kept) else None,
            }
            per_step.append(row)
    per_task: dict[str, Any] = {"loss": evaluation.losses}
    if evaluation.accuracies:
        per_task["accuracy"] = evaluation.accuracies
    return {"per_step": per_step, "per_task": per_task}


def _with_interval(values: Tensor, scale: float, digits: int) -> list[str]:
    """`mean ± half width` for each inner step of `[tasks, steps + 1]`."""
    mean, interval = mean_and_interval(values * scale)
    pairs = zip(mean.tolist(), interval.tolist(), strict=True)
    return [f"{m:.{digits}f} ± {i:.{digits}f}" for m, i in pairs]


def table(columns: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Right-aligned columns of (title, subtitle, cells)."""
    rows = [row for row in zip(*([t, s, *cells] for t, s, cells in columns), strict=True) if any(row)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@dataclass(frozen=True)
class Words:
    """What tables and figures say about an evaluation."""

    loss_name: str
    trained_steps: int | None  # None: of several runs, not the same for all
    test_steps: int  # whose result is quoted
    title: str


def evaluation_table(evaluation: Evaluation, words: Words) -> str:
    """A row an inner step: mean and 95 % interval over tasks, and the tasks that diverged, if any did."""
    loss_name, test_steps = words.loss_name, words.test_steps
    tasks, rows = next(iter(evaluation.losses.values())).shape
    subtitles = {name: name if len(evaluation.losses) > 1 else "" for name in evaluation.losses}
    columns: list[tuple[str, str, Sequence[str]]] = [("steps", "", [str(step) for step in range(rows)])]
    quoted: list[str] = []
    measures = [("accuracy %", evaluation.accuracies, 100, 2), (loss_name, evaluation.losses, 1, 4)]
    for title, results, scale, digits in measures:
        for name, values in results.items():
            cells = _with_interval(values, scale, digits)
            columns.append((title, subtitles[name], cells))
            quoted.append(f"{title} {cells[test_steps]}" + f" ({name})" * bool(subtitles[name]))
    diverged_at_all = False
    for name, losses in evaluation.losses.items():
        diverged = evaluation.diverged(name)
        if diverged.any():
            diverged_at_all = True
            kept = losses.where(~diverged, torch.nan).nanmean(0).tolist()
            columns.append(("diverged", subtitles[name], [str(n) for n in diverged.sum(0).tolist()]))
            columns.append((f"{loss_name} of the rest", subtitles[name], [f"{value:.4f}" for value in kept]))
    marks = ["trained for" if step == words.trained_steps else "" for step in range(rows)]
    columns.append(("", "", marks))
    footer = f"Mean and 95 % interval over {tasks} tasks"
    footer += "." if diverged_at_all else "; none of them diverged."
    steps = f"{test_steps} step{'s' * (test_steps != 1)}"
    return f"{table(columns)}\n{footer}\nAfter {steps}: {', '.join(quoted)}"


def comparison_table(results: Mapping[str, Evaluation], normalisation: str, words: Words) -> str:
    """Methods side by side, a row an inner step: mean and 95 % interval over the same tasks.

    Tasks that have diverged are left out, and counted where there are any. `results` by name, with the
    second line of the title behind a line break.
    """
    rows = max(next(iter(e.losses.values())).shape[1] for e in results.values())
    columns: list[tuple[str, str, Sequence[str]]] = [("steps", "", [str(step) for step in range(rows)])]
    for name, evaluation in results.items():
        title, _, subtitle = name.partition("\n")
        scale, digits = (100, 2) if evaluation.accuracies else (1, 4)
        pairs = [[x.item() * scale for x in pair] for pair in of_the_rest(evaluation, normalisation)]
        cells = [f"{mean:.{digits}f} ± {interval:.{digits}f}" for mean, interval in pairs]
        missing = [""] * (rows - len(cells))
        columns.append((title, subtitle, [*cells, *missing]))
        diverged = evaluation.diverged(normalisation).sum(0).tolist()
        if any(diverged):
            columns.append(("diverged", "", [*map(str, diverged), *missing]))
    measure = "accuracy %" if next(iter(results.values())).accuracies else words.loss_name
    tasks = len(next(iter(next(iter(results.values())).losses.values())))
    return (
        f"{table(columns)}\nQuery {measure} over {tasks} test tasks: mean and 95 % interval of those that "
        "have not diverged."
    )


def of_the_rest(evaluation: Evaluation, normalisation: str) -> list[tuple[Tensor, Tensor]]:
    """Mean and half width of the interval after each step, over the tasks that have not diverged."""
    values = (evaluation.accuracies or evaluation.losses)[normalisation]
    kept = ~evaluation.diverged(normalisation)
    return [mean_and_interval(v[k]) for v, k in zip(values.unbind(1), kept.unbind(1), strict=True)]


# ---- predictions on one's own tasks ---------------------------------------------------------

ROWS_PRINTED = 20


def predictions_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first predictions, as the terminal shows them."""
    shown = [[cell[:24] for cell in row] for row in rows[:ROWS_PRINTED]]
    columns = [(title, "", [row[i] for row in shown]) for i, title in enumerate(header)]
    more = f"\n... and {len(rows) - ROWS_PRINTED} more" if len(rows) > ROWS_PRINTED else ""
    return table(columns) + more

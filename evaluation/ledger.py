"""Keep `results.csv`: a row for each evaluation on test tasks, of all runs of a folder.

--eval adds a row, --list reads them. An evaluation that is repeated replaces its row.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from common.errors import UsageError
from evaluation.meta_test import Evaluation
from evaluation.tables import StepResults, write_csv

RESULTS = "results.csv"
TIME = "%Y-%m-%d %H:%M:%S"
# an evaluation replaces the row in which all of these agree
SAME = (
    *("checkpoint", "dataset", "dataset_split", "ways", "shots", "queries", "tasks", "steps", "inner_batch"),
    *("batch_norm", "measure", "precision"),
)


def quote_result(evaluation: Evaluation, normalisation: str, step: int) -> dict[str, Any]:
    """Return a row's numbers after an inner step: as trained, and inductive where that differs.

    Means are over all tasks, those that diverged included.
    """
    numbers: dict[str, Any] = {}
    starts = {normalisation: "", "inductive": "inductive_"} | {normalisation: ""}  # which may be inductive
    for name, start in starts.items():
        if name in evaluation.losses:
            part = StepResults.over([evaluation], name)
            numbers[f"{start}result"] = part.means[step, 0].item()
            numbers[f"{start}interval_95"] = part.intervals[step].item()
            numbers[f"{start}diverged_tasks"] = part.diverged[step]
    return numbers


def add_result(file: Path, result: Mapping[str, Any]) -> None:
    """Add a row to the file, or replace that of the same evaluation; further columns of the user's stay."""
    row = {
        name: f"{v:.7g}" if isinstance(v, float) else f"{'' if v is None else v}"
        for name, v in result.items()
    }
    with FileLock(file.with_name(f".{file.name}.lock")):
        rows = [old for old in read_results(file) if any((old.get(name) or "") != row[name] for name in SAME)]
        rows.append(row)
        header = [*dict.fromkeys(name for row in rows for name in row if name)]
        write_csv(file, header, [[row.get(name) or "" for name in header] for row in rows])


def read_results(file: Path) -> list[dict[str, str]]:
    """Return the rows of the file, the latest last; none where there is no file. UsageError if damaged."""
    if not file.is_file():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as text:
            return [*csv.DictReader(text)]
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{file} is damaged ({error}): mend it, or move it away") from error

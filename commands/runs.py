"""List the runs below a folder (--list): what each is, how far it has come, and what it reached.

last.pt, results.csv -> ListedRun each -> table, CSV
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from commands.build import name_measure
from commands.call import Call
from commands.names import describe_tasks, name_method
from commands.resolve import restore_config
from common.errors import UsageError, escape_text
from evaluation.ledger import RESULTS, TIME, read_results
from evaluation.tables import choose_units, format_decimal, table, write_csv
from training.checkpoint import Progress, load_checkpoint
from training.folders import BEST, LAST

HEADER = (
    *("name", "dataset", "tasks", "algorithm", "seed", "iterations", "measure", "best validation", "test"),
    "when",
)


@dataclass(frozen=True)
class ListedRun:
    """A run in the list."""

    name: str  # path below the folder
    dataset: str
    tasks: str
    algorithm: str  # for people: "first-order MAML"
    seed: int
    iterations: int
    planned: int
    measure: str  # of validation and test
    more_is_better: bool
    validation: float | None  # the best
    test: float | None
    interval_95: float | None
    when: str  # its checkpoint was written

    def cells(self) -> list[str]:
        """Return the row as the terminal shows it, under `HEADER`."""
        measure, scale, digits = choose_units(self.measure)
        validation, test, interval = (
            "" if value is None else format_decimal(scale * value, digits)
            for value in (self.validation, self.test, self.interval_95)
        )
        done = f"{self.iterations:,}" + f" of {self.planned:,}" * (self.iterations < self.planned)
        start = [*map(escape_text, (self.name, self.dataset)), self.tasks, self.algorithm, str(self.seed)]
        return [*start, done, measure, validation, test + f" ± {interval}" * bool(test), self.when[:16]]


IN_FILE = [field.name for field in fields(ListedRun) if field.name != "more_is_better"]


def list_runs(call: Call) -> None:
    """Print the runs below the folder of --list, and write them to --csv."""
    assert call.list_runs is not None
    if not call.list_runs.is_dir():
        raise UsageError(f"--list {call.list_runs}: there is no such folder")
    runs = sort_runs(find_all_runs(call.list_runs), call.sort)
    print(table(HEADER, [run.cells() for run in runs]) if runs else f"{call.list_runs} has no runs")
    if call.csv:
        values = ([getattr(run, name) for name in IN_FILE] for run in runs)
        call.csv.parent.mkdir(parents=True, exist_ok=True)
        write_csv(call.csv, IN_FILE, [["" if v is None else str(v) for v in row] for row in values])
        print(f"Written: {call.csv}")


def find_all_runs(folder: Path) -> list[ListedRun]:
    """Return the runs below a folder in the order of their paths; what cannot be read is said on stderr."""
    files: list[Path] = []
    places = [*folder.resolve().parents[1::-1]]  # of results: a run's, or a sweep's, are above it
    for place, below, names in os.walk(folder):
        below.sort()
        files += [Path(place, name) for name in (LAST, BEST) if name in names][:1]
        places.append(Path(place))
    tests: dict[Path, list[Mapping[str, str]]] = {}  # by the run's folder
    for results_of in places:
        for row in read_results(results_of / RESULTS):
            if row.get("checkpoint"):
                tests.setdefault((results_of / row["checkpoint"]).resolve().parent, []).append(row)
    runs = []
    for file in files:
        try:
            runs.append(_describe_run(file, folder, tests.get(file.resolve().parent, [])))
        except UsageError as error:
            print(f"main.py: {escape_text(str(error))}", file=sys.stderr)
    return runs


def _describe_run(file: Path, folder: Path, tests: Sequence[Mapping[str, str]]) -> ListedRun:
    """Return the row of a checkpoint, with its latest test on tasks like those of its training.

    A test of what the checkpoint was before it was resumed is left out.
    """
    checkpoint = load_checkpoint(file, weights=False)
    config, progress = restore_config(checkpoint.settings, file), Progress(**checkpoint.progress)
    tasks, curves, iteration = config.tasks, progress.validation, progress.best_iteration
    losses, accuracies = "query_loss", "query_accuracy"
    curve = accuracies if accuracies in curves or (tasks.classification and not curves) else losses
    if config.evaluation.metric:
        curve = next((name for name in curves if name not in ("iteration", losses, accuracies)), curve)
    measure = name_measure(config, checkpoint.scales) if curve == losses else curve.removeprefix("query_")
    best = None
    if iteration is not None and curve in curves:
        best = curves[curve][curves["iteration"].index(iteration)]
    criteria = {"dataset": tasks.dataset, "ways": tasks.ways, "shots": tasks.shots, "measure": measure}
    criteria = {name: "" if value is None else str(value) for name, value in criteria.items()}
    reached = {BEST: iteration, file.name: checkpoint.iteration}
    now = [r for r in tests if r.get("iteration") == str(reached.get(Path(r["checkpoint"]).name))]
    now.sort(key=lambda row: row.get("when") or "")
    test = next((row for row in reversed(now) if criteria.items() <= row.items()), {})
    return ListedRun(
        name=file.parent.relative_to(folder).as_posix() if file.parent != folder else folder.resolve().name,
        dataset=tasks.dataset,
        tasks=describe_tasks(tasks),
        algorithm=name_method(config.choices),
        seed=config.training.seed,
        iterations=checkpoint.iteration,
        planned=config.training.iterations,
        measure=measure,
        # the score is minus what should be low, -0.0 included
        more_is_better=curve == accuracies or (best is not None and str(best) == str(progress.best_score)),
        validation=best,
        test=float(test["result"]) if test.get("result") else None,
        interval_95=float(test["interval_95"]) if test.get("interval_95") else None,
        when=time.strftime(TIME, time.localtime(file.stat().st_mtime)),
    )


def sort_runs(runs: Sequence[ListedRun], column: str) -> list[ListedRun]:
    """Return the runs by a column: the best, the longest or the newest first, names from A to Z."""

    def key(run: ListedRun) -> Any:
        value = getattr(run, column)
        return -value if column in ("validation", "test") and run.more_is_better else value

    valid = [run for run in runs if (value := getattr(run, column)) is not None and value == value]  # no NaN
    last = [run for run in runs if run not in valid]
    return sorted(valid, key=key, reverse=column in ("iterations", "when")) + last

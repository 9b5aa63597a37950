"""Runs of the papers' tables: train and test a cell with main.py, and read the results.

    Table, Cell, seed -> Job -> main.py -> TABLE/METHOD-seedN/ -> record() -> results/.../TABLE/METHOD.json

A job's folder is main.py's own (training.json, best.pt, ...), with a folder for each test's result files and
`reproduce.json`: the command that trained it, its seconds and the machine. Everything is matched by command.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Table, Test
from harness import call_main, machine, read_json, write_json

from evaluation.meta_test import Evaluation
from evaluation.tables import StepResults, plain_values
from training.checkpoint import load_checkpoint
from training.folders import LAST

Record = Mapping[str, Any]

STOPPED, NON_FINITE = 128 + signal.SIGTERM, 4  # exit codes of main.py whose state is saved
LEDGER = "reproduce.json"
QUICK_TASKS = "100"
QUICK_ITERATIONS = {False: "300", True: "20"}  # of curves, of images


@dataclass(frozen=True)
class Job:
    """A method of a table, trained from one seed."""

    table: Table
    cell: Cell
    seed: int
    root: Path
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.cell.slug}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.root / self.table.name / self.name

    @property
    def training(self) -> list[str]:
        """The flags that train it."""
        quick = ["--iterations", QUICK_ITERATIONS[self.table.accuracy]] * self.quick
        return [*self.table.flags, *self.cell.flags, *quick, "--seed", str(self.seed)]

    @property
    def command(self) -> str:
        """The command that trains it, as a user types it."""
        return shlex.join(["python", "main.py", *self.training])

    def test_flags(self, test: Test) -> list[str]:
        flags = list(test.flags)
        if self.quick:
            flags[flags.index("--eval-tasks") + 1] = QUICK_TASKS
        if test.dataset and test.dataset not in self.training:
            flags += ["--eval-dataset", test.dataset]
        return flags

    def has_baselines(self, test: Test) -> bool:
        """Whether baselines are measured in a test: they train on the data of the run."""
        return self.cell.baselines and "--eval-dataset" not in self.test_flags(test)

    def testing(self, test: Test) -> list[str]:
        """The arguments of main.py that run a test."""
        out = str(self.folder / f"test {test.name}")
        baselines = ["--baselines"] * self.has_baselines(test)
        return ["--eval", "--load", str(self.folder), *self.test_flags(test), "--out", out, *baselines]

    # ---- results -----------------------------------------------------------------------------

    @property
    def ledger(self) -> Record:
        file = self.folder / LEDGER
        return read_json(file) if file.exists() else {}

    @property
    def settings(self) -> Record:
        """All settings of the run, as it was trained in the end."""
        return load_checkpoint(self.folder / LAST, weights=False).settings

    @property
    def progress(self) -> Record:
        """The curves and numbers of this command's run; empty if it has not begun."""
        file = self.folder / "training.json"
        trained = self.ledger.get("trained_by") == self.command and file.exists()
        return read_result(file) if trained else {}

    @property
    def is_finished(self) -> bool:
        """Whether training cannot continue: all iterations are done, or numbers are non-finite."""
        progress = self.progress
        ended = progress and progress["failure"] is not None
        return bool(progress and (ended or progress["iteration"] >= progress["iterations"]))

    def add_to_ledger(self, seconds: float) -> None:
        total = round(self.ledger.get("seconds", 0.0) + seconds, 1)
        entry = {"trained_by": self.command, "seconds": total, "machine": machine()}
        write_json(self.folder / LEDGER, entry)

    def result(self, test: Test, *, baselines: bool = False) -> Record | None:
        """Return the result of a test of the current checkpoint with these flags; None if there is none."""
        file = self.result_file(test, baselines=baselines)
        return read_result(file) if file else None

    def result_file(self, test: Test, *, baselines: bool = False) -> Path | None:
        """Return the file of that result."""
        progress = self.progress
        if not progress:
            return None
        iteration = progress["best_iteration"] or progress["iteration"]
        command = shlex.join(["main.py", *self.testing(test)])
        for file in sorted((self.folder / f"test {test.name}").glob("*.json")):
            if file.stem.endswith("-baselines") == baselines:
                content = read_result(file)
                if content.get("iteration") == iteration and content["command"] == command:
                    return file
        return None

    def is_tested(self, test: Test) -> bool:
        kinds = (False, True) if self.has_baselines(test) else (False,)
        return all(self.result(test, baselines=kind) for kind in kinds)


def read_result(file: Path) -> dict[str, Any]:
    """Read a result file, once for each change, without the numbers of single tasks; empty if damaged."""
    return _read_result(file, file.stat().st_mtime_ns)


@cache
def _read_result(file: Path, changed: int) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # cut short by a kill
        return {}
    for part in (content, *content.get("methods", {}).values()):
        part.pop("per_task", None)
    return content


# ---- running -------------------------------------------------------------------------------------


def run_job(job: Job, until: float, *, single_threaded: bool) -> tuple[bool, str]:
    """Train and test one job; return success and a line that says what happened.

    Args:
        until: the time.monotonic() at which training stops; what has been trained by then is tested.
        single_threaded: whether other jobs run at the same time.
    """
    title = f"{job.table.name}, {job.name}"
    environment = {"OMP_NUM_THREADS": "1"} if single_threaded else {}
    begin = time.monotonic()
    if not job.is_finished and begin < until:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        place = ["--run-name", job.name, "--checkpoint-path", str(job.folder.parent), "--resume"]
        seconds = until - begin if math.isfinite(until) else None
        code, last_line = call_main([*job.training, *place], seconds=seconds, **environment)
        if code not in (0, STOPPED, NON_FINITE):
            return False, f"{title}: {last_line}"
        if job.folder.exists():
            job.add_to_ledger(time.monotonic() - begin)
    progress = job.progress
    if not progress:
        return time.monotonic() > until, f"{title}: not begun"
    for test in job.table.tests:
        if not job.is_tested(test):
            code, last_line = call_main(job.testing(test), **environment)
            if code:
                return False, f"{title}, {test.name}: {last_line}"
    ended = f"; {progress['failure']}" if progress["failure"] else ""
    done = f"iteration {progress['iteration']:,} of {progress['iterations']:,}"
    return True, f"{title}: {done}{ended}"


# ---- reading -------------------------------------------------------------------------------------


def record(table: Table, jobs: Sequence[Job], recorded: Record | None = None) -> dict[str, Any]:
    """Return all numbers of a table by method, after every inner step, without single tasks.

    Args:
        jobs: of this table; those that have not begun are left out.
        recorded: the record so far. Its runs stay, by command, until a job's folder has as many tests.
    """
    methods: dict[str, Any] = {}
    for cell in table.cells:
        known_entry = (recorded or {}).get(cell.method, {"runs": []})
        runs, fresh = {run["trained_by"]: run for run in known_entry["runs"]}, {}
        for job in jobs:
            if job.progress and job.cell.method == (cell.baseline_of or cell.method):
                run, known = run_of(table, cell, job), runs.get(job.command, {"tests": ()})
                measured = run["tests"] or not cell.baseline_of
                if measured and len(run["tests"]) >= len(known["tests"]):
                    runs[job.command], fresh[job.command] = run, job
        if runs:
            entry = {"runs": sorted(runs.values(), key=lambda run: run["seed"])}
            kept = known_entry.get("over_seeds", {}) if known_entry["runs"] == entry["runs"] else {}
            tests = kept.get("tests", {}) | over_seeds(table, cell, entry["runs"], fresh)
            methods[cell.method] = entry | ({"over_seeds": {"tests": tests}} if tests else {})
    return methods


def over_seeds(
    table: Table, cell: Cell, runs: Sequence[Record], jobs: Mapping[str, Job]
) -> dict[str, dict[str, Any]]:
    """Return means and intervals of several runs after each step, by test: they need every run's tasks.

    Args:
        jobs: those whose folders have the runs, by command.
    """
    tests = {}
    for test in table.tests:
        tested = [run for run in runs if test.name in run["tests"]]
        if len(tested) > 1 and all(run["trained_by"] in jobs for run in tested):
            evaluations = [task_results(jobs[run["trained_by"]], test, cell) for run in tested]
            rows = [
                {"normalisation": name, **row}
                for name in evaluations[0].losses
                for row in StepResults.over(evaluations, name).record()
            ]
            steps = tested[0]["tests"][test.name]["test_steps"]
            tests[test.name] = plain_values({"test_steps": steps, "per_step": rows})
    return tests


def task_results(job: Job, test: Test, cell: Cell) -> Evaluation:
    """Return the result of every task of a job's test, or of a baseline that was measured with it."""
    file = job.result_file(test, baselines=cell.baseline_of is not None)
    assert file is not None  # it is in the record
    content = read_json(file)
    per_task = (content["methods"][cell.method] if cell.baseline_of else content)["per_task"]

    def tensors(measure: str) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor([[math.nan if v is None else v for v in row] for row in rows]).double()
            for name, rows in per_task.get(measure, {}).items()
        }

    return Evaluation(tensors("loss"), tensors("accuracy"))


def run_of(table: Table, cell: Cell, job: Job) -> dict[str, Any]:
    """Return what a job's folder says of its method, or of a baseline measured with it."""
    progress, ledger = job.progress, job.ledger
    shows_training = any(column.test is None for column in table.columns)
    return {
        "seed": job.seed,
        "iterations": progress["iteration"],
        "planned": progress["iterations"],
        "best_iteration": progress["best_iteration"],
        "failure": progress["failure"],
        "final_training_loss": progress["final_training_loss"],
        "seconds": ledger["seconds"],
        "machine": ledger["machine"],
        "trained_by": job.command,
        "name": job.name,
        "settings": job.settings,
        **({"training": progress["training"]} if shows_training else {}),
        "tests": tests_of(table, cell, job),
    }


def tests_of(table: Table, cell: Cell, job: Job) -> dict[str, Any]:
    """Return the numbers of a run's tests, or of a baseline's, after each step."""
    tests = {}
    for test in table.tests:
        result = numbers = job.result(test)
        baselines = job.result(test, baselines=True) if job.has_baselines(test) else None
        if cell.baseline_of:
            numbers = baselines and baselines["methods"].get(cell.method)
        if result and numbers:
            last = max(row["steps"] for row in numbers["per_step"])
            tests[test.name] = {
                "flags": shlex.join(job.test_flags(test)),
                "tasks": result["tasks"],
                "test_steps": last if cell.baseline_of else result["test_steps"],
                "device": result["device"],
                "versions": result["versions"],
                "compiled": result.get("compiled"),  # older files do not say
                "per_step": numbers["per_step"],
                "curves": baselines["curves"] if baselines and not cell.baseline_of else {},
            }
    return tests

"""One run of a table's method: trained and tested with main.py, whose result files are read.

    Table, method, seed -> Run -> main.py -> FOLDER/TABLE/METHOD-seedN/ -> summarise_runs() -> a record

A run's folder is main.py's own, with a folder for each test's results and `reproduce.json`: the command that
trained it, its seconds and the machine. A folder that another command has trained does not count. A record:

    runs      of each seed: command, iterations, seconds, machine, versions, final training loss, failure
    settings  of the first run, as it was in the end
    tests     by name: flags, tasks, conditions (device, version), and results by normalisation: rows of
              `StepResults.record`, one for each number of inner steps
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import call_main, describe_machine, read_json, write_json
from tables import Table, slug

from evaluation.meta_test import Evaluation
from evaluation.tables import StepResults, plain_values
from training.checkpoint import load_checkpoint
from training.folders import LAST

Record = Mapping[str, Any]

SAVED = (0, 128 + signal.SIGTERM, 4)  # exit codes of main.py after which its state is saved
QUICK_TASKS, QUICK_ITERATIONS = "100", {False: "300", True: "20"}  # of curves, of images


@dataclass(frozen=True)
class Run:
    """A method of a table from one seed."""

    table: Table
    method: str
    seed: int
    root: Path
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{slug(self.method)}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.root / self.table.name / self.name

    @property
    def training(self) -> list[str]:
        """The flags that train it."""
        quick = ["--iterations", QUICK_ITERATIONS[self.table.is_accuracy]] * self.quick
        flags = f"{self.table.flags} {self.table.methods[self.method]}".split()
        return [*flags, *quick, "--seed", str(self.seed)]

    @property
    def trained_by(self) -> str:
        """The command that trains it, as a user types it."""
        return shlex.join(["python", "main.py", *self.training])

    def test_flags(self, test: str) -> list[str]:
        """Return the flags of a test. Baselines need the data of the training."""
        flags = self.table.tests[test].split()
        if self.quick:
            flags[flags.index("--eval-tasks") + 1] = QUICK_TASKS
        if "--eval-dataset" in flags and flags[-1] in self.training:  # its own, which is not named
            flags = flags[:-2]
        measured = self.method == self.table.measured_with and "--eval-dataset" not in flags
        return [*flags, *["--baselines"] * measured]

    def testing(self, test: str) -> list[str]:
        """Return the arguments of main.py that run a test."""
        out = str(self.folder / f"test {test}")
        return ["--eval", "--load", str(self.folder), *self.test_flags(test), "--out", out]

    def ledger(self) -> Record:
        file = self.folder / "reproduce.json"
        return read_json(file) if file.exists() else {"seconds": 0.0}

    def progress(self) -> Record:
        """Return the content of training.json; empty if this command's run has not begun."""
        file = self.folder / "training.json"
        return read_json(file) if file.exists() and self.ledger().get("trained_by") == self.trained_by else {}

    def has_ended(self) -> bool:
        """Return whether training cannot continue: all iterations are done, or numbers are non-finite."""
        progress = self.progress()
        return bool(progress) and (progress["failure"] or progress["iteration"] >= progress["iterations"])

    def results(self, test: str) -> dict[bool, Record]:
        """Return the results of a test of the present checkpoint, by whether they are the baselines'.

        Empty as long as one is missing.
        """
        progress, flags, results = self.progress(), self.testing(test), {}
        iteration = progress and (progress["best_iteration"] or progress["iteration"])
        for file in sorted((self.folder / f"test {test}").glob("*.json")) if progress else ():
            content = read_json(file)
            if (content["command"], content["iteration"]) == (shlex.join(["main.py", *flags]), iteration):
                results["methods" in content] = content
        return results if len(results) == 1 + ("--baselines" in flags) else {}

    def train_and_test(self, until: float, *, single_threaded: bool) -> tuple[bool, str]:
        """Train and test; return success and a line that says what happened.

        Args:
            until: the time.monotonic() at which training stops; what has been trained by then is tested.
            single_threaded: whether other runs are trained at the same time.
        """
        title, begin = f"{self.table.name}, {self.name}", time.monotonic()
        environment = {"OMP_NUM_THREADS": "1"} if single_threaded else {}
        if not self.has_ended() and begin < until:
            place = ["--run-name", self.name, "--checkpoint-path", str(self.folder.parent), "--resume"]
            seconds = until - begin if math.isfinite(until) else None
            code, last_line = call_main([*self.training, *place], seconds=seconds, **environment)
            if code not in SAVED:
                return False, f"{title}: {last_line}"
            if self.folder.exists():
                seconds = round(self.ledger()["seconds"] + time.monotonic() - begin, 1)
                entry = {"trained_by": self.trained_by, "seconds": seconds, "machine": describe_machine()}
                write_json(self.folder / "reproduce.json", entry)
        progress = self.progress()
        if not progress:
            return time.monotonic() > until, f"{title}: not begun"
        for test in self.table.tests:
            if not self.results(test):
                code, last_line = call_main(self.testing(test), seconds=None, **environment)
                if code:
                    return False, f"{title}, {test}: {last_line}"
        failure = f"; {progress['failure']}" if progress["failure"] else ""
        return True, f"{title}: iteration {progress['iteration']:,} of {progress['iterations']:,}{failure}"


# ---- from runs to a record -----------------------------------------------------------------------


def summarise_runs(table: Table, method: str, runs: Sequence[Run]) -> Record:
    """Return what is recorded of a method, or of a baseline, over the runs that have passed all tests."""
    results_of_all = [(run, {test: run.results(test) for test in table.tests}) for run in runs]
    tested = [(run, results) for run, results in results_of_all if all(results.values())]
    tested = [(run, results) for run, results in tested if run.has_ended()] or tested
    if not tested:
        return {}
    tests, baseline = {}, method in table.baselines
    for test in table.tests:
        contents = [results[test][baseline] for _, results in tested if baseline in results[test]]
        parts = [content["methods"][method] if baseline else content for content in contents]
        if parts:
            evaluations = [parse_evaluation(part["per_task"]) for part in parts]
            tests[test] = {
                "flags": shlex.join(tested[0][0].test_flags(test)),
                "tasks": contents[0]["tasks"],
                "test_steps": parts[0]["per_step"][-1]["steps"] if baseline else contents[0]["test_steps"],
                "conditions": sorted({describe_conditions(content) for content in contents}),
                "results": {n: StepResults.over(evaluations, n).record() for n in evaluations[0].losses},
            }
    facts = ("iteration", "iterations", "best_iteration", "failure", "final_training_loss")
    lines = []
    for run, results in tested:
        progress, (first, *_) = run.progress(), results.values()
        line = {"seed": run.seed} | {name: progress[name] for name in facts} | dict(run.ledger())
        lines.append(line | {"versions": first[False]["versions"]})
    last = load_checkpoint(tested[0][0].folder / LAST, weights=False)  # its settings are those of the end
    return plain_values({"runs": lines, "settings": last.settings, "tests": tests})


def describe_conditions(content: Record) -> str:
    """Return device, version and whether it was compiled, in words."""
    compiled = {True: ", compiled", False: ", uncompiled", None: ""}[content.get("compiled")]
    return f"{content['device']}, torch {content['versions']['torch']}{compiled}"


def parse_evaluation(per_task: Record) -> Evaluation:
    """Return the numbers of every task in a result file; null is NaN."""
    losses, accuracies = (
        {
            name: torch.tensor([[math.nan if v is None else v for v in row] for row in rows]).double()
            for name, rows in per_task.get(measure, {}).items()
        }
        for measure in ("loss", "accuracy")
    )
    return Evaluation(losses, accuracies)

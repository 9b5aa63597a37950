"""The published tables, each from one command.

    python benchmarks/reproduce.py                          # all tables
    python benchmarks/reproduce.py sinusoid assignment      # some; --list names them
    python benchmarks/reproduce.py omniglot-5way-1shot --methods maml anil --seeds 0
    python benchmarks/reproduce.py --minutes 120            # as far as two hours go; the same command goes on
    python benchmarks/reproduce.py --quick                  # the same path in a few minutes

Trains each method from each seed with `main.py`, takes the checkpoint that is best on validation tasks, and
tests it. What is finished is kept in --folder; what is not goes on where it was. (A run whose numbers are no
longer finite is finished, too: remove its folder to begin it again.) Writes the numbers (JSON), a table
(Markdown) and a picture, in light and dark, to benchmarks/results/reproduce/. What is there is shown, runs
that have not come to their end included, and marked. A run whose folder is gone stays in the table that has
it, until the same command has come as far and its run has been tested.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import reproduced  # noqa: E402
import table_figures  # noqa: E402
import torch  # noqa: E402
from cells import SEEDS, TABLES, Cell, Table, Test  # noqa: E402
from script import Parser, folder_for, launch, machine  # noqa: E402

from commands import config as settings  # noqa: E402
from common.errors import UsageError, one_line  # noqa: E402
from common.files import read_json, write_whole  # noqa: E402
from evaluation.tables import write_json  # noqa: E402
from training.checkpoint import load_checkpoint  # noqa: E402
from training.folders import BEST, LAST, find_checkpoint  # noqa: E402
from training.run import final_loss  # noqa: E402
from training.trainer import FAILED  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
DOCS = ROOT / "docs" / "results.md"
STOPPED = 128 + signal.SIGTERM
LEDGER = "reproduce.json"  # in a run's folder: the seconds that it took, where, and what ended it early
FREE = ("convolution", "tasks_at_once", "compile", "engine")  # what a test settles by itself
QUICK_TASKS = "100"
QUICK_ITERATIONS = {False: "300", True: "20"}  # of curves, of images


def minutes(text: str) -> float:
    found = float(text)
    if not found >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return found


def seed(text: str) -> int:
    found = int(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="by default all (see --list)")
    parser.add_argument("--list", action="store_true", help="name tables and methods, and end")
    parser.add_argument("--methods", nargs="+", help="of these tables; by default all")
    parser.add_argument("--seeds", type=seed, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--minutes",
        type=minutes,
        default=math.inf,
        help="then training stops, and what is there is tested; the same command goes on",
    )
    parser.add_argument("--run-minutes", type=minutes, default=math.inf, help="the same, of each run")
    parser.add_argument(
        "--jobs", type=int, default=None, help="runs at a time; by default a CPU's cores, or 1 with a GPU"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "reproduce", help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where tables and pictures go")
    parser.add_argument("--quick", action="store_true", help="few iterations and tasks, one seed")
    parser.add_argument("--collect", action="store_true", help="run nothing; write tables of what is there")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.tables if name not in TABLES]
    if unknown:
        parser.error(f"there is no table {unknown[0]}: {', '.join(TABLES)}")
    cells = [cell for name in given.tables or TABLES for cell in TABLES[name].cells if cell.beside is None]
    methods = {cell.method for cell in cells}
    for method in given.methods or ():
        if method not in methods:
            parser.error(f"no method {method} is trained for these tables: {'; '.join(sorted(methods))}")
    if given.jobs is not None and given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: at least 1")
    given.seeds = list(dict.fromkeys(given.seeds))
    if given.quick:
        given.seeds = given.seeds[:1]
        given.folder = given.folder.with_name(given.folder.name + "-quick")
        given.results = given.results.with_name(given.results.name + "-quick")
    return given


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A method of a table, trained from one seed."""

    table: Table
    cell: Cell
    seed: int
    root: Path
    quick: bool

    @property
    def folder(self) -> Path:
        return self.root / self.table.name / self.name

    @property
    def name(self) -> str:
        return f"{self.cell.slug}-seed{self.seed}"

    @property
    def training(self) -> list[str]:
        """The flags that train it."""
        quick = ["--iterations", QUICK_ITERATIONS[self.table.accuracy]] * self.quick
        return [*self.table.flags, *self.cell.flags, *quick, "--seed", str(self.seed)]

    @property
    def command(self) -> str:
        """What trains it, to be typed."""
        return shlex.join(["python", "main.py", *self.training])

    def flags_of(self, test: Test) -> list[str]:
        flags = list(test.flags)
        if self.quick and "--eval-tasks" in flags:
            flags[flags.index("--eval-tasks") + 1] = QUICK_TASKS
        return flags

    def testing(self, test: Test) -> list[str]:
        return ["--eval", "--load", str(self.folder), *self.flags_of(test)]

    @property
    def checkpoint(self) -> Path:
        """The one to be tested: the best by validation, unless there is none yet."""
        return find_checkpoint(self.folder, BEST, LAST)

    @property
    def progress(self) -> dict[str, Any]:
        """What the run says about itself; empty: it has not begun."""
        file = self.folder / LAST
        return progress_of(file, file.stat().st_mtime_ns) if file.is_file() else {}

    @property
    def finished(self) -> bool:
        if not self.progress:
            return False
        return self.progress["iteration"] >= self.progress["planned"] or self.failure is not None

    @property
    def failure(self) -> str | None:
        """Why training cannot go on from where it is: numbers that are not finite."""
        known, at = self.ledger, self.progress.get("iteration")
        return known.get("failure") if at is not None and known.get("failed_after") == at else None

    def problem(self) -> str | None:
        """What is wrong with the run that is there: it cannot be read, is another's, or of other settings."""
        try:
            if not self.progress:
                return None
        except (UsageError, OSError) as error:
            return one_line(error)
        wanted, found = settings.resolve(settings.parse(self.training)), self.progress["config"]
        learned = [
            settings.what_is_learned(each) | {"iterations": each.iterations} for each in (found, wanted)
        ]
        if learned[0] == learned[1]:
            return None
        return f"{self.folder} is a run with other settings than these: remove it, or name another --folder"

    def results(self, test: Test) -> Path:
        """The folder of a test's results."""
        return self.folder / f"test {test.name}"

    def result(self, test: Test, *, baselines: bool = False) -> dict[str, Any] | None:
        """The record of a test of the checkpoint that is there now, with these flags."""
        if not self.progress:
            return None
        wanted = self.progress["best_iteration"] or self.progress["iteration"]
        given = settings.parse(self.testing(test))
        asked = settings.resolve_from(self.progress["config"], given, evaluate=True)
        for file in sorted(self.results(test).glob("*.json")):
            found = without_tasks(file, file.stat().st_mtime_ns)
            if file.stem.endswith("-baselines") != baselines or found.get("iteration") != wanted:
                continue
            plain = json.loads(json.dumps(settings.config_to_plain(asked)))
            plain = {name: value for name, value in plain.items() if name not in FREE}
            if all(found["settings"].get(name, value) == value for name, value in plain.items()):
                return found
        return None

    @property
    def ledger(self) -> dict[str, Any]:
        with suppress(UsageError, ValueError):
            return read_json(self.folder / LEDGER)
        return {}

    def note(self, seconds: float, failure: str | None) -> None:
        """Adds to the seconds that its training took, and what ended it, if it was not its end."""
        total = round(self.ledger.get("seconds", 0.0) + seconds, 1)
        failed = {} if failure is None else {"failure": failure, "failed_after": self.progress["iteration"]}
        write_json(self.folder / LEDGER, {"seconds": total, "machine": machine()} | failed)


@cache
def progress_of(file: Path, changed: int) -> dict[str, Any]:
    """What a checkpoint, as it was changed last, says about its run."""
    found = load_checkpoint(file)
    config = settings.config_of(found.settings, file)
    return {
        "config": config,
        "iteration": found.iteration,
        "planned": config.iterations,
        "best_iteration": found.progress["best_iteration"],
        "final_training_loss": final_loss(found.progress["training"]),
        "training": found.progress["training"],
        "validation": found.progress["validation"],
    }


@cache
def without_tasks(file: Path, changed: int) -> dict[str, Any]:
    """A result file, as it was changed last, without the numbers of single tasks."""
    try:
        found = read_json(file)
    except (UsageError, ValueError):  # cut short
        return {}
    for part in (found, *found.get("methods", {}).values()):
        part.pop("per_task", None)
    return found


@dataclass
class Work:
    """The runs of one call: until when, and whether somebody has asked to stop."""

    until: float
    run_minutes: float
    jobs: int
    stop: threading.Event

    def do(self, job: Job) -> tuple[bool, str]:
        """Trains and tests one run, as far as that has not been done and time allows; whether nothing went
        wrong, and what to say."""
        name = f"{job.table.name}, {job.name}"
        problem = job.problem()
        if problem:
            return False, problem
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        if not job.finished and not self.over:
            where = ["--run-name", job.name, "--checkpoint-path", str(job.folder.parent), "--resume"]
            limit = min(self.until, begin + 60 * self.run_minutes)
            code, said = self.command([*job.training, *where], limit)
            if job.progress:
                why = said.partition("error: ")[2].partition("; saved at")[0] or "numbers that are not finite"
                job.note(time.monotonic() - begin, why if code == FAILED else None)
            if code not in (0, STOPPED, FAILED):
                return False, f"{name}: {said}"
        if not job.progress:
            return self.over, f"{name}: not begun"
        for test in job.table.tests:
            baselines = test.baselines and self.measures_baselines(job)
            done = job.result(test) and (not baselines or job.result(test, baselines=True))
            if not done and not self.stop.is_set():
                where = ["--out", str(job.results(test)), *["--baselines"] * baselines]
                code, said = self.command([*job.testing(test), *where], math.inf)
                if code:
                    return self.stop.is_set(), f"{name}, {test.name}: {said}"
        how = f"; {job.failure}" if job.failure else ""
        return True, f"{name}: iteration {job.progress['iteration']:,} of {job.progress['planned']:,}{how}"

    @staticmethod
    def measures_baselines(job: Job) -> bool:
        """Once for a table, beside its first method; where methods are settings of one, beside each."""
        beside = {cell.beside for cell in job.table.cells} - {None}
        return job.cell.method in beside if beside else True

    @property
    def over(self) -> bool:
        return self.stop.is_set() or time.monotonic() > self.until

    def command(self, arguments: list[str], until: float) -> tuple[int, str]:
        """Runs main.py until that moment; its exit code and its last words."""
        line = [sys.executable, str(ROOT / "main.py"), *arguments]
        threads = {} if self.jobs == 1 else {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            line, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is for this process, which asks the others to save and end
        ) as process:  # fmt: skip
            words: list[str] = []
            reader = threading.Thread(target=lambda: words.extend(process.stderr or ()))
            reader.start()
            while process.poll() is None:
                if self.stop.is_set() or time.monotonic() > until:
                    process.terminate()
                    process.wait()
                    break
                time.sleep(0.2)
            reader.join()
        return process.returncode, words[-1].strip() if words else f"exit code {process.returncode}"


def jobs_of(given: argparse.Namespace) -> Iterator[Job]:
    """First all methods from the first seed, then from the others: a table fills evenly."""
    for seed in given.seeds:
        for name in given.tables or TABLES:
            for cell in TABLES[name].cells:
                wanted = given.methods is None or cell.method in given.methods
                if wanted and cell.beside is None:
                    yield Job(TABLES[name], cell, seed, given.folder, given.quick)


# ---- what came of it -----------------------------------------------------------------------------


def tests_of(table: Table, cell: Cell, job: Job) -> dict[str, Any]:
    """What a run's tests have found after each step, or those of a baseline beside it."""
    found = {}
    for test in table.tests:
        own = job.result(test)
        beside = job.result(test, baselines=True) if test.baselines else None
        numbers = (beside or {"methods": {}})["methods"].get(cell.method) if cell.beside else own
        if own and numbers:
            found[test.name] = {
                "flags": shlex.join(job.flags_of(test)),
                "tasks": own["tasks"],
                "test_steps": own["test_steps"],
                "device": own["device"],
                "torch": own["versions"]["torch"],
                "per_step": numbers["per_step"],
                "curves": beside["curves"] if beside and not cell.beside else {},
            }
    return found


def validation_of(progress: dict[str, Any]) -> dict[str, list[float]]:
    """The accuracies on validation tasks that choose the checkpoint, over iterations."""
    curve = progress["validation"]
    return {name: curve.get(name, []) for name in ("iteration", "query_accuracy")}


def run_of(table: Table, cell: Cell, job: Job) -> dict[str, Any] | None:
    """What a run's folder says, of its method or of a baseline beside it; None: there is no such run."""
    if job.problem() is not None or not job.progress:
        return None
    found = job.progress
    learning = any(column.test is None for column in table.columns)  # whose picture is of the training
    return {
        "seed": job.seed,
        "iterations": found["iteration"],
        "planned": found["planned"],
        "best_iteration": found["best_iteration"],
        "failure": job.failure,
        "final_training_loss": found["final_training_loss"],
        "seconds": job.ledger.get("seconds"),
        "machine": job.ledger.get("machine"),
        "trained_by": job.command,
        "name": job.name,
        **({"training": found["training"]} if learning else {}),
        **({"validation": validation_of(found)} if table.accuracy else {}),
        "tests": tests_of(table, cell, job),
    }


def recorded(table: Table, cell: Cell, job: Job, known: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the table's record has of that same command, with the tests that are still the table's."""
    flags = {test.name: shlex.join(job.flags_of(test)) for test in table.tests}
    for run in runs_in(known, cell.method):
        if run["trained_by"] == job.command:
            tests = {n: test for n, test in run["tests"].items() if test.get("flags") == flags.get(n)}
            return run | {"tests": tests}
    return None


def runs_in(known: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    return known.get("methods", {}).get(method, {"runs": []})["runs"]


def known_of(table: Table, results: Path) -> dict[str, Any]:
    """The record that there is of a table; empty: none. Raises UsageError where it cannot be read."""
    file = results / f"{table.name}.json"
    if not file.exists():
        return {}
    try:
        known = read_json(file)
        for method in known.get("methods", {}):
            for run in runs_in(known, method):
                run["trained_by"], run["seed"], run["machine"]
        reproduced.table_text(table, known)
        reproduced.summary({table.name: known})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise UsageError(f"{file} is damaged: remove it, or name other --results") from error
    return known


def record(table: Table, jobs: Sequence[Job], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All numbers of a table, after every step, without the single tasks. Of each run that of its folder or
    the one that is `known`: the one that has more tests, then the one that is further."""
    methods: dict[str, Any] = {}
    for cell in table.cells:
        runs = []
        for job in jobs:
            if job.cell.method == (cell.beside or cell.method):
                found = [run_of(table, cell, job), recorded(table, cell, job, known or {})]
                there = [run for run in found if run is not None]
                if there:
                    runs.append(max(there, key=lambda run: (len(run["tests"]), run["iterations"])))
        if runs:
            published = {title: p._asdict() for title, p in cell.published.items()}
            methods[cell.method] = {"published": published, "source": cell.source, "runs": runs}
    return {"table": table.name, "title": table.title, "methods": methods}


def write(table: Table, jobs: Sequence[Job], results: Path) -> bool:
    """A table's files, of all runs that are there, and of those in its record that are further; whether there
    are any."""
    known = known_of(table, results)
    for job in jobs:
        problem = job.problem()
        if problem:
            print(f"{table.name}, {job.name}: left out: {problem}")
    found = record(table, jobs, known)
    for method in known.get("methods", {}):
        commands = {run["trained_by"] for run in runs_in(found, method)}
        for run in runs_in(known, method):
            if run["trained_by"] not in commands:
                print(f"{table.name}: {method} has no such run any more, left out: {run['trained_by']}")
    if not found["methods"]:
        return False
    text = reproduced.table_text(table, found)
    write_whole(results / f"{table.name}.md", lambda file: file.write(text.encode()))
    write_json(results / f"{table.name}.json", found)
    fits = [job for job in jobs if job.cell.method == "maml" and table.name == "sinusoid"]
    shown = [job for job in fits if run_of(table, job.cell, job) in runs_in(found, "maml")]
    try:
        table_figures.draw(table, found, results, shown[0].checkpoint if shown else None)
    except UsageError as error:
        print(f"{table.name}: not all pictures are drawn: {one_line(error)}")
    return True


def show() -> None:
    """Puts the committed tables into docs/results.md, and what was published beside ours into the README."""
    records = {name: found for name, table in TABLES.items() if (found := known_of(table, RESULTS))}
    for name in records:
        files = [f"{name}.png", f"{name}-fits.png"]
        there = [file for file in files if (RESULTS / file).exists()]
        links = [f"![{TABLES[name].title}](../benchmarks/results/reproduce/{file})\n" for file in there]
        reproduced.put(DOCS, name, "\n".join([(RESULTS / f"{name}.md").read_text(), *links]))
    reproduced.put(ROOT / "README.md", "published", reproduced.summary(records))


def main() -> int:
    given = parse()
    if given.list:
        for table in TABLES.values():
            print(f"{table.name}: {'; '.join(cell.method for cell in table.cells if cell.beside is None)}")
        return 0
    tables = [TABLES[name] for name in given.tables or TABLES]
    folder_for(given.results, "--results")
    if not given.collect:
        folder_for(given.folder, "--folder")
    elif given.folder.exists() and not given.folder.is_dir():
        raise UsageError(f"--folder {given.folder}: not a folder")
    known = [known_of(table, given.results) for table in tables]
    stop = threading.Event()
    signals: list[int] = []

    def stopped(number: int, _: object) -> None:
        signals.append(number)
        stop.set()

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stopped)
    jobs = [] if given.collect else list(jobs_of(given))
    at_a_time = given.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    work = Work(time.monotonic() + 60 * given.minutes, given.run_minutes, at_a_time, stop)
    failed = False
    with ThreadPoolExecutor(at_a_time) as pool:
        for well, said in pool.map(work.do, jobs):
            print(said, flush=True)
            failed |= not well
    before = {run["seed"] for each in known for m in each.get("methods", {}) for run in runs_in(each, m)}
    seeds = sorted({*SEEDS, *given.seeds, *before})
    everything = argparse.Namespace(**vars(given) | {"methods": None, "seeds": seeds})
    written = [
        write(table, [job for job in jobs_of(everything) if job.table is table], given.results)
        for table in tables
    ]
    if given.results == RESULTS:
        show()
    print(f"Written: {given.results}" if any(written) else "No run is there yet: nothing to write")
    return 128 + signals[0] if signals else int(failed)


if __name__ == "__main__":
    launch(main)

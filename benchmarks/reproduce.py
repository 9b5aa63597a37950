"""The published tables, each from one command.

    python benchmarks/reproduce.py                          # all tables
    python benchmarks/reproduce.py sinusoid assignment      # some; --list names them
    python benchmarks/reproduce.py omniglot-5way-1shot --methods maml anil --seeds 0
    python benchmarks/reproduce.py --minutes 120            # as far as two hours go; the same command goes on
    python benchmarks/reproduce.py --quick                  # the same path in a few minutes

Trains each method from each seed with `main.py`, takes the checkpoint that is best on validation tasks, and
tests it. What is finished is kept in --folder; what is not goes on where it was. Writes the numbers (JSON), a
table (Markdown) and a picture, in light and dark, to benchmarks/results/reproduce/. What is there is shown,
runs that have not come to their end included, and marked.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
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
from cells import SEEDS, TABLES, Cell, Table, Test  # noqa: E402

from errors import UsageError  # noqa: E402
from files import read_json, write_whole  # noqa: E402
from report import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
DOCS = ROOT / "docs" / "results.md"
STOPPED = 128 + signal.SIGTERM
LEDGER = "reproduce.json"  # in a run's folder: the seconds that it took, and where
QUICK_TASKS = "100"
QUICK_ITERATIONS = {False: "300", True: "20"}  # of curves, of images


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="by default all (see --list)")
    parser.add_argument("--list", action="store_true", help="name tables and methods, and end")
    parser.add_argument("--methods", nargs="+", help="of these tables; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then runs are stopped; the same command goes on"
    )
    parser.add_argument("--run-minutes", type=float, default=math.inf, help="of each run's training")
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
    methods = {cell.method for name in given.tables or TABLES for cell in TABLES[name].cells}
    for method in given.methods or ():
        if method not in methods:
            parser.error(f"there is no method {method}: {', '.join(sorted(methods))}")
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
        return f"{re.sub('[^a-z0-9+]+', '-', self.cell.method.lower())}-seed{self.seed}"

    @property
    def training(self) -> list[str]:
        """The flags that train it."""
        quick = ["--iterations", QUICK_ITERATIONS[self.table.accuracy]] * self.quick
        return [*self.table.flags, *self.cell.flags, *quick, "--seed", str(self.seed)]

    def testing(self, test: Test) -> list[str]:
        flags = list(test.flags)
        if self.quick and "--eval-tasks" in flags:
            flags[flags.index("--eval-tasks") + 1] = QUICK_TASKS
        return ["--eval", "--load", str(self.checkpoint), *flags]

    @property
    def checkpoint(self) -> Path:
        """The one to be tested: the best by validation, unless there is none yet."""
        best = self.folder / "best.pt"
        return best if best.exists() else self.folder / "last.pt"

    @property
    def progress(self) -> dict[str, Any]:
        """What the run says about itself; empty: it has not begun."""
        with suppress(UsageError):
            return read_json(self.folder / "training.json")
        return {}

    @property
    def finished(self) -> bool:
        found = self.progress
        return bool(found) and found["iteration"] >= found["settings"]["iterations"]

    def result(self, test: Test, *, baselines: bool = False) -> dict[str, Any] | None:
        """The record of a test of the checkpoint that is there now."""
        if not self.progress:
            return None
        wanted = self.progress["best_iteration"] or self.progress["iteration"]
        flags = self.testing(test)
        for file in sorted(self.folder.glob(f"{self.checkpoint.stem}-test-*.json")):
            if file.stem.endswith("-baselines") == baselines:
                found = without_tasks(file, file.stat().st_mtime_ns)
                asked = {"-k": "shots", "-q": "queries", "--eval-tasks": "eval_tasks"}
                same = all(
                    found["settings"][name] == int(flags[flags.index(flag) + 1])
                    for flag, name in asked.items()
                    if flag in flags
                )
                if same and found["iteration"] == wanted:
                    return found
        return None

    @property
    def ledger(self) -> dict[str, Any]:
        with suppress(UsageError):
            return read_json(self.folder / LEDGER)
        return {}

    def note(self, seconds: float) -> None:
        """Adds to the seconds that its training took."""
        known = self.ledger
        total = round(known.get("seconds", 0.0) + seconds, 1)
        write_json(self.folder / LEDGER, {"seconds": total, "machine": machine()})


@cache
def without_tasks(file: Path, changed: int) -> dict[str, Any]:
    """A result file, as it was changed last, without the numbers of single tasks."""
    found = read_json(file)
    for part in (found, *found.get("methods", {}).values()):
        part.pop("per_task", None)
    return found


def machine() -> str:
    """This computer in a few words."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


@dataclass
class Work:
    """The runs of one call: until when, and whether somebody has asked to stop."""

    until: float
    run_minutes: float
    jobs: int
    stop: threading.Event

    def do(self, job: Job) -> str:
        """Trains and tests one run, as far as that has not been done and time allows; what to say of it."""
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        if not job.finished and not self.over:
            where = ["--run-name", job.name, "--checkpoint-path", str(job.folder.parent), "--resume"]
            limit = min(self.until, begin + 60 * self.run_minutes)
            code, said = self.command([*job.training, *where], limit)
            if job.folder.is_dir():
                job.note(time.monotonic() - begin)
            if code not in (0, STOPPED):
                return f"{job.table.name}, {job.name}: {said}"
        if not job.progress:
            return f"{job.table.name}, {job.name}: not begun"
        if not job.checkpoint.exists():
            return f"{job.table.name}, {job.name}: nothing saved yet"
        for test in job.table.tests:
            baselines = test.baselines and self.measures_baselines(job)
            if self.stop.is_set() or (
                job.result(test) and (not baselines or job.result(test, baselines=True))
            ):
                continue
            code, said = self.command([*job.testing(test), *["--baselines"] * baselines], math.inf)
            if code:
                return f"{job.table.name}, {job.name}, {test.name}: {said}"
        found = job.progress
        planned = found["settings"]["iterations"]
        return f"{job.table.name}, {job.name}: iteration {found['iteration']:,} of {planned:,}"

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
            line, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
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
                "tasks": own["tasks"],
                "test_steps": own["test_steps"],
                "device": own["device"],
                "torch": own["versions"]["torch"],
                "per_step": numbers["per_step"],
                "curves": beside["curves"] if beside and not cell.beside else {},
            }
    return found


def record(table: Table, jobs: Sequence[Job]) -> dict[str, Any]:
    """All numbers of a table, after every step, without the single tasks."""
    methods: dict[str, Any] = {}
    for cell in table.cells:
        runs = []
        for job in jobs:
            found = job.progress
            if job.cell.method == (cell.beside or cell.method) and found:
                run = {
                    "seed": job.seed,
                    "iterations": found["iteration"],
                    "planned": found["settings"]["iterations"],
                    "best_iteration": found["best_iteration"],
                    "final_training_loss": found["final_training_loss"],
                    "seconds": job.ledger.get("seconds"),
                    "machine": job.ledger.get("machine"),
                    "trained_by": shlex.join(["python", "main.py", *job.training]),
                    "name": job.name,
                    "checkpoint": job.checkpoint.name,
                    "tests": tests_of(table, cell, job),
                }
                runs.append(run)
        if runs:
            published = {title: p._asdict() for title, p in cell.published.items()}
            methods[cell.method] = {"published": published, "source": cell.source, "runs": runs}
    return {"table": table.name, "title": table.title, "methods": methods}


def write(table: Table, jobs: Sequence[Job], results: Path) -> None:
    """A table's files, of all runs that are there."""
    found = record(table, jobs)
    if not found["methods"]:
        return
    results.mkdir(parents=True, exist_ok=True)
    text = reproduced.table_text(table, found)
    write_whole(results / f"{table.name}.md", lambda file: file.write(text.encode()))
    write_json(results / f"{table.name}.json", found)
    maml = next((job.checkpoint for job in jobs if job.cell.method == "maml" and job.progress), None)
    table_figures.draw(table, found, results, maml if table.name == "sinusoid" else None)


def show() -> None:
    """Puts the committed tables into docs/results.md, and what was published beside ours into the README."""
    records = {
        name: read_json(RESULTS / f"{name}.json") for name in TABLES if (RESULTS / f"{name}.json").exists()
    }
    for name in records:
        reproduced.put(DOCS, name, (RESULTS / f"{name}.md").read_text())
    reproduced.put(ROOT / "README.md", "published", reproduced.summary(records))


def main() -> int:
    given = parse()
    if given.list:
        for table in TABLES.values():
            print(f"{table.name}: {', '.join(cell.method for cell in table.cells)}")
        return 0
    stop = threading.Event()
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, lambda *_: stop.set())
    jobs = [] if given.collect else list(jobs_of(given))
    at_a_time = given.jobs or (1 if gpu() else os.cpu_count() or 1)
    work = Work(time.monotonic() + 60 * given.minutes, given.run_minutes, at_a_time, stop)
    failed = False
    with ThreadPoolExecutor(at_a_time) as pool:
        for job, said in zip(jobs, pool.map(work.do, jobs), strict=True):
            print(said, flush=True)
            failed |= not job.progress and not work.over
    everything = argparse.Namespace(**vars(given) | {"methods": None, "seeds": list(SEEDS)})
    for name in given.tables or TABLES:
        write(TABLES[name], [job for job in jobs_of(everything) if job.table.name == name], given.results)
    if given.results == RESULTS:
        show()
    print(f"Written: {given.results}")
    return 1 if failed else 0


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())

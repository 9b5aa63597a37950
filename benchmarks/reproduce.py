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
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pictures  # noqa: E402
from cells import SEEDS, TABLES, Cell, Column, Published, Table, Test  # noqa: E402

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
        quick = ["--iterations", QUICK_ITERATIONS[self.table.accuracy], "--val-tasks", "20"] * self.quick
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


# ---- numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A measured number over seeds: an error, or an accuracy in percent."""

    means: list[float]  # of each seed, over the tasks that did not diverge
    intervals: list[float]  # 95 % over tasks, of each seed; NaN where there are none
    diverged: int  # tasks, of all seeds

    @property
    def mean(self) -> float:
        return statistics.mean(self.means)

    @property
    def interval(self) -> float:
        """Over tasks: the seeds have the same test tasks, so that more seeds do not narrow it."""
        return statistics.mean(self.intervals)

    def text(self, digits: int) -> str:
        """The mean over seeds, its interval over tasks, the lowest and the highest seed."""
        found = f"{self.mean:.{digits}f}"
        if math.isfinite(self.interval):
            found += f" ±{self.interval:.{digits}f}"
        if len(self.means) > 1:
            found += f" ({min(self.means):.{digits}f} to {max(self.means):.{digits}f})"
        return found + f", {self.diverged} diverged" * bool(self.diverged)

    def meets(self, published: Published, *, higher: bool) -> bool:
        """Reached, or within the number's own interval of it."""
        sign = 1 if higher else -1
        interval = self.interval if math.isfinite(self.interval) else 0.0
        return sign * (self.mean - published.value) + interval >= 0


def number(table: Table, cell: Cell, column: Column, jobs: Sequence[Job]) -> Number | None:
    """Of those runs that have it."""
    means, intervals, diverged = [], [], 0
    for job in jobs:
        row = row_of(table, cell, column, job)
        if row is None:
            continue
        measure = "accuracy" if table.accuracy else "loss_without_diverged"
        scale = 100 if table.accuracy else 1
        if row[measure] is None:
            return None
        means.append(scale * row[measure])
        intervals.append(scale * row.get(f"{measure}_interval_95", math.nan))
        diverged += row.get("diverged_tasks", 0)
    return Number(means, intervals, 0 if table.accuracy else diverged) if means else None


def row_of(table: Table, cell: Cell, column: Column, job: Job) -> dict[str, Any] | None:
    """The numbers of a run after the steps of a column."""
    if column.test is None:
        final = job.progress.get("final_training_loss")
        return {"loss_without_diverged": final["mean"]} if final else None
    record = record_of(table, cell, column.test, job)
    if record is None:
        return None
    steps = record.get("test_steps") if column.steps is None else column.steps
    rows = [
        row
        for row in record["per_step"]
        if column.normalisation in (None, row["normalisation"], "transductive" * (not table.accuracy))
    ]
    by_steps = {row["steps"]: row for row in rows}
    if len(by_steps) == 1:  # a method that does not adapt
        return by_steps.get(0)
    return by_steps.get(steps)


def record_of(table: Table, cell: Cell, test: str, job: Job) -> dict[str, Any] | None:
    """A test's record: a run's own, or a baseline's beside it."""
    found = next(each for each in table.tests if each.name == test)
    if cell.beside is None:
        return job.result(found)
    beside = job.result(found, baselines=True)
    return beside["methods"].get(cell.method) if beside else None


# ---- tables --------------------------------------------------------------------------------------


def jobs_for(cell: Cell, jobs: Iterable[Job]) -> list[Job]:
    return [job for job in jobs if job.cell.method == (cell.beside or cell.method) and job.progress]


def table_text(table: Table, jobs: Sequence[Job]) -> str:
    """The table in Markdown: published numbers under ours, targets, commands."""
    columns = [c for c in table.columns if any(number(table, x, c, jobs_for(x, jobs)) for x in table.cells)]
    titles = [c.title for c in columns]
    lines = [
        f"### {table.title}\n",
        f"| | {' | '.join([*titles, 'seeds', 'iterations', 'time'])} |",
        "|-" * (len(titles) + 4) + "|",
    ]
    met: list[str] = []
    digits = 2 if table.accuracy else 3
    for cell in table.cells:
        own = jobs_for(cell, jobs)
        numbers = {c.title: number(table, cell, c, own) for c in columns}
        if any(numbers.values()):
            texts = [n.text(digits) if (n := numbers[title]) else "" for title in titles]
            lines.append(f"| **{cell.method}** | {' | '.join([*texts, *length(cell, own)])} |")
        for title, published in cell.published.items():
            measured = numbers.get(title)
            met.append(verdict(cell, title, published, measured, higher=table.accuracy, digits=digits))
        if cell.published and any(title in titles for title in cell.published):
            texts = [str(cell.published.get(title, "")) for title in titles]
            lines.append(f"| *{cell.source}* | {' | '.join([*texts, '', '', ''])} |")
    return "\n".join(
        [*lines, "", footer(table, jobs), "", *met, "", "```sh", *commands(table, jobs), "```", ""]
    )


def length(cell: Cell, jobs: Sequence[Job]) -> list[str]:
    """Seeds, iterations and time, as the table has them."""
    if cell.beside:
        return [str(len(jobs)), "", ""]
    done = sorted({job.progress["iteration"] for job in jobs})
    planned = jobs[0].progress["settings"]["iterations"]
    reached = f"{done[0]:,}" if len(done) == 1 else f"{done[0]:,} to {done[-1]:,}"
    if done[0] < planned:
        reached += f" of {planned:,}"
    seconds = [job.ledger["seconds"] for job in jobs if "seconds" in job.ledger]
    took = f"{statistics.mean(seconds) / 60:.0f} min" if seconds and statistics.mean(seconds) > 90 else ""
    if seconds and not took:
        took = f"{statistics.mean(seconds):.0f} s"
    return [f"{len(jobs)}" if len(jobs) > 1 else "1 (single run)", reached, took]


def verdict(
    cell: Cell, title: str, published: Published, measured: Number | None, *, higher: bool, digits: int
) -> str:
    """Whether a published number is met, in a line."""
    said = f"- {cell.method}, {title}: published {published}"
    if measured is None:
        return f"{said}; not run"
    if measured.meets(published, higher=higher):
        reached = (measured.mean >= published.value) if higher else (measured.mean <= published.value)
        how = "**met**" if reached else "**met**, within its interval"
    else:
        how = f"not met, by {abs(measured.mean - published.value):.{digits}f}"
    return f"{said}, ours {measured.text(digits)}: {how}" + f" ({cell.note})" * bool(cell.note)


def footer(table: Table, jobs: Sequence[Job]) -> str:
    """What the numbers are."""
    records = [r for job in jobs for test in table.tests if (r := job.result(test))]
    machines = sorted({job.ledger["machine"] for job in jobs if "machine" in job.ledger})
    devices = sorted({record["device"] for record in records})
    versions = sorted({record["versions"]["torch"] for record in records})
    tasks = sorted({record["tasks"] for record in records})
    parts = [
        f"{' or '.join(f'{n:,}' for n in tasks)} test tasks" if tasks else "",
        "mean over seeds, ± 95 % interval over tasks, in brackets the lowest and the highest seed",
        "" if table.accuracy else "diverged tasks are left out of the means, and counted over all seeds",
        "`best.pt`, chosen on validation tasks",
        "; ".join([*machines, *devices]),
        f"torch {', '.join(versions)}" if versions else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def commands(table: Table, jobs: Sequence[Job]) -> list[str]:
    """What makes the first seed's runs and tests, to be typed by hand."""
    there = [job for job in jobs if job.progress]
    shown = [job for job in there if job.seed == there[0].seed]
    lines = [["python", "main.py", *job.training, "--run-name", job.name] for job in shown]
    for test in table.tests if there else ():
        checkpoint = f"checkpoints/{there[0].name}/{there[0].checkpoint.name}"
        load = ["python", "main.py", "--eval", "--load", checkpoint]
        lines.append([*load, *test.flags, *["--baselines"] * test.baselines])
    return [shlex.join(line) for line in lines]


def tests_of(table: Table, cell: Cell, job: Job) -> dict[str, Any]:
    """What a run's tests have found after each step."""
    found = {test.name: record_of(table, cell, test.name, job) for test in table.tests}
    kept = ("tasks", "test_steps", "per_step", "curves")
    return {name: {key: r[key] for key in kept if key in r} for name, r in found.items() if r}


def record(table: Table, jobs: Sequence[Job]) -> dict[str, Any]:
    """All numbers of a table, after every step, without the single tasks."""
    methods: dict[str, Any] = {}
    for cell in table.cells:
        runs = []
        for job in jobs_for(cell, jobs):
            found = job.progress
            runs.append(
                {
                    "seed": job.seed,
                    "iterations": found["iteration"],
                    "planned": found["settings"]["iterations"],
                    "best_iteration": found["best_iteration"],
                    "final_training_loss": found["final_training_loss"],
                    "seconds": job.ledger.get("seconds"),
                    "machine": job.ledger.get("machine"),
                    "command": shlex.join(["python", "main.py", *job.training]),
                    "tests": tests_of(table, cell, job),
                }
            )
        if runs:
            published = {title: p._asdict() for title, p in cell.published.items()}
            methods[cell.method] = {"published": published, "source": cell.source, "runs": runs}
    return {"table": table.name, "title": table.title, "methods": methods}


def write(table: Table, jobs: Sequence[Job], given: argparse.Namespace) -> None:
    """A table's files, of all runs that are there; the committed ones are shown in docs/results.md, too."""
    if not any(job.progress for job in jobs):
        return
    given.results.mkdir(parents=True, exist_ok=True)
    text = table_text(table, jobs)
    found = record(table, jobs)
    write_whole(given.results / f"{table.name}.md", lambda file: file.write(text.encode()))
    write_json(given.results / f"{table.name}.json", found)
    maml = next((job.checkpoint for job in jobs if job.cell.method == "maml" and job.progress), None)
    pictures.draw(table, found, given.results, maml if table.name == "sinusoid" else None)
    if given.results == RESULTS:
        show(table.name, text)


def show(name: str, text: str) -> None:
    """Puts a table into its place in docs/results.md, where there is one."""
    page = DOCS.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin in page:
        before, _, rest = page.partition(begin)
        page = before + begin + text + end + rest.partition(end)[2]
        write_whole(DOCS, lambda file: file.write(page.encode()))


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
        write(TABLES[name], [job for job in jobs_of(everything) if job.table.name == name], given)
    print(f"Written: {given.results}")
    return 1 if failed else 0


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())

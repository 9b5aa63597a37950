"""The published tables, each from one command.

    python benchmarks/reproduce.py                          # all tables
    python benchmarks/reproduce.py sinusoid assignment      # some; --list names them
    python benchmarks/reproduce.py icons                    # all whose names begin so
    python benchmarks/reproduce.py omniglot-5way-1shot --methods maml anil --seeds 0
    python benchmarks/reproduce.py --minutes 120            # as far as two hours allow; repeat it to resume

Trains each method with `main.py --seeds`, and tests the folder of its runs with `main.py --eval`: the
checkpoints that are best on validation tasks. What is finished stays in --folder, the rest is resumed. A
method is tested when all seeds that have begun have ended or, where time was up, none has. (A run with
non-finite numbers has ended: remove the method's folder to start again.) Writes the numbers of each method
to benchmarks/results/reproduce/ (TABLE/METHOD.json), with a table (Markdown) and a picture, and puts them on
the pages. A method's record stays until there are runs of more seeds or, of as many, that have come as far.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from harness import (
    RESULTS,
    ROOT,
    Parser,
    UsageError,
    call_main,
    count,
    describe_machine,
    launch,
    put,
    read_json,
    run_main,
    write_json,
    write_text,
)
from pages import describe_progress, has_picture, render_marks, table_text, write_picture
from tables import TABLES, Record, Table, slug

from evaluation.tables import ALL, plain_values
from training import folders
from training.checkpoint import load_checkpoint

RUNS, TABLE_RESULTS = ROOT / "checkpoints" / "reproduce", RESULTS / "reproduce"
SAVED = (0, 128 + signal.SIGTERM, 4, -signal.SIGTERM)  # exit codes of main.py after which a job goes on
FACTS = ("iteration", "iterations", "best_iteration", "failure", "final_training_loss")  # of a run


@dataclass(frozen=True)
class Job:
    """A method of a table from some seeds, whose runs share a folder."""

    table: Table
    method: str
    seeds: Sequence[int] = ()
    root: Path = RUNS

    @property
    def folder(self) -> Path:
        return self.root / self.table.name / slug(self.method)

    def out(self, test: str) -> Path:
        """Return the folder of a test's results, which has the test's flags in its name."""
        return self.folder / f"test {slug(' '.join(self.table.test_flags(test, self.method)))}"

    def ledger(self) -> dict[str, Any]:
        """Return the flags that train the runs and, by seed, the seconds of each and the machine."""
        file, flags = self.folder / "reproduce.json", self.table.flags_of(self.method)
        return read_json(file) if file.exists() else {"flags": flags, "seeds": {}}

    def progress(self) -> dict[int, Record]:
        """Return the content of training.json of each run by seed, which is empty where last.pt is newer."""
        listed = self.folder / folders.LIST
        runs = {run["seed"]: run["name"] for run in read_json(listed)["runs"]} if listed.exists() else {}
        progress: dict[int, Record] = {}
        for seed, name in sorted(runs.items()):
            last = (folder := self.folder / name) / folders.LAST
            iteration = load_checkpoint(last, weights=False).iteration if last.exists() else -1
            saved = folders.has_results(folder, iteration)
            progress[seed] = read_json(folder / folders.RESULTS) if saved else {}
        return progress

    def results(self, test: str) -> list[Record]:
        """Return a test's results over all runs, then its baselines', if any; nothing if some are old."""
        best = {s: run and (run["best_iteration"] or run["iteration"]) for s, run in self.progress().items()}
        patterns = ("test-*tasks.json", "test-*-baselines.json")
        contents = [read_json(file) for pattern in patterns for file in self.out(test).glob(pattern)]
        tested = [{run["seed"]: run["iteration"] for run in content["runs"]} for content in contents]
        return contents if tested == [best] * len(contents) else []

    def is_tested(self, test: str, *, with_baselines: bool = True) -> bool:
        """Return whether a test has its results, with those of baselines if its flags ask for them."""
        asks = "--baselines" in self.table.test_flags(test, self.method)
        return len(self.results(test)) > (asks and with_baselines)

    def train(self, until: float) -> None:
        """Train until this time.monotonic(), and write the time into the ledger.

        Raises UsageError with the last line of a command that fails, and where other flags trained the runs.
        """
        flags, ledger = self.table.flags_of(self.method), self.ledger()
        if ledger["flags"] != flags:
            raise UsageError(f"{self.folder} was trained with other flags, {ledger['flags']}: remove it")
        place = ["--checkpoint-path", str(self.folder.parent), "--run-name", self.folder.name, "--resume"]
        for seeds in [[seed] for seed in self.seeds] if self.table.is_accuracy else [self.seeds]:
            begin, runs = time.monotonic(), self.progress()
            if begin >= until or all(has_ended(runs.get(seed)) for seed in seeds):
                continue
            line = [*flags.split(), "--seeds", ",".join(map(str, seeds)), *place]
            try:
                code, message = call_main(line, seconds=None if until == math.inf else until - begin)
            finally:
                spent = (time.monotonic() - begin) / len(seeds)
                for seed in map(str, seeds):
                    before = ledger["seeds"].get(seed, {"seconds": 0.0})["seconds"]
                    about = {"seconds": round(before + spent, 1), "machine": describe_machine()}
                    ledger["seeds"][seed] = about
                if self.folder.exists():
                    write_json(self.folder / "reproduce.json", ledger)
            if code not in SAVED:
                raise UsageError(message or f"exit code {code}")

    def run(self, until: float) -> str:
        """Train, test what may be tested, and return a line that says what happened; raise UsageError."""
        self.train(until)
        runs = self.progress()
        ended = [seed for seed, run in runs.items() if has_ended(run)]
        words = f"of seeds {', '.join(map(str, runs))} have ended: {', '.join(map(str, ended)) or 'none'}"
        if not runs:
            return "not begun"
        if not all(runs.values()) or len(ended) not in (0, len(runs)):
            return f"{words}; not tested before the others have"
        for test in self.table.tests:
            if not self.is_tested(test):
                shutil.rmtree(self.out(test), ignore_errors=True)
                where = ["--load", str(self.folder), "--out", str(self.out(test))]
                run_main(["--eval", *where, *self.table.test_flags(test, self.method)])
        return f"{describe_progress([*runs.values()])}; {words}"

    def record(self, method: str) -> Record:
        """Return what is recorded of the method, or of a baseline of it; nothing before all its tests."""
        is_baseline, ledger, tests = method in self.table.baselines, self.ledger(), {}
        is_tested = all(self.is_tested(test, with_baselines=is_baseline) for test in self.table.tests)
        if not is_tested or ledger["flags"] != self.table.flags_of(self.method):
            return {}
        for test in self.table.tests:
            result, *others = self.results(test)
            measured, steps = result["settings"], result["test_steps"]
            if is_baseline:
                measured = {ALL: others[0]["over_runs"][method]} if others else {}
                steps = measured[ALL][-1]["steps"] if others else 0
            if measured:  # without batch norm there is one reading, as of baselines: the transductive
                tests[test] = {
                    "flags": shlex.join(self.table.test_flags(test, self.method)),
                    "tasks": result["tasks"],
                    "test_steps": steps,
                    "conditions": [describe_conditions(result)],
                    "results": {"transductive" if n == ALL else n: rows for n, rows in measured.items()},
                }
        runs, versions = self.progress(), {"versions": result["versions"]}
        lines = [
            {"seed": s} | {n: run[n] for n in FACTS} | ledger["seeds"][str(s)] | versions
            for s, run in runs.items()
        ]
        settings = load_checkpoint(self.folder / f"seed-{min(runs)}" / folders.LAST, weights=False).settings
        return plain_values({"flags": ledger["flags"], "runs": lines, "settings": settings, "tests": tests})


def has_ended(run: Record | None) -> bool:
    """Return whether training cannot continue: all iterations are done, or numbers are non-finite."""
    if not run:
        return False
    return run["failure"] is not None or run["iteration"] >= run["iterations"]


def describe_conditions(content: Record) -> str:
    """Return device, version and whether it was compiled, in words."""
    compiled = {True: ", compiled", False: ", uncompiled", None: ""}[content.get("compiled")]
    return f"{content['device']}, torch {content['versions']['torch']}{compiled}"


def list_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the first method of all tables, the second, ..."""
    for methods in zip_longest(*(table.methods for table in options.tables)):
        for table, method in zip(options.tables, methods, strict=True):
            if method and method in (options.methods or [method]):
                yield Job(table, method, options.seeds or range(table.seeds), options.folder)


def run_all(options: argparse.Namespace) -> bool:
    """Train and test; return whether all went well. Ctrl-C reaches main.py, too, which saves and ends."""
    jobs, until = [*list_jobs(options)], time.monotonic() + 60 * options.minutes
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    at_once = min(options.jobs or cores, len(jobs))
    if at_once > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # main.py inherits it

    def run(job: Job) -> bool:
        try:
            success, line = True, job.run(until)
        except UsageError as error:
            success, line = False, str(error)
        print(f"{job.table.name}, {job.method}: {line}", flush=True)
        return success

    with ThreadPoolExecutor(at_once) as pool:
        try:
            return all([*pool.map(run, jobs)])
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


# ---- from runs to records and pages --------------------------------------------------------------


def record_file(table: Table, method: str, results: Path = TABLE_RESULTS) -> Path:
    return results / table.name / f"{slug(method)}.json"


def read_records(table: Table, results: Path = TABLE_RESULTS) -> dict[str, Record]:
    """Return what is recorded of a table, by method."""
    files = {method: record_file(table, method, results) for method in (*table.methods, *table.baselines)}
    return {method: read_json(file) for method, file in files.items() if file.exists()}


def write_table(table: Table, options: argparse.Namespace) -> bool:
    """Write a table's files; return whether there is anything to write."""
    records = read_records(table, options.results)
    for method in (*table.methods, *table.baselines):
        trained = table.measured_with if method in table.baselines else method
        entry = Job(table, trained, root=options.folder).record(method)
        if entry and entry["tests"] and measure_extent(entry) >= measure_extent(records.get(method)):
            records[method] = entry
            write_json(record_file(table, method, options.results), entry)
    if records:
        write_text(options.results / f"{table.name}.md", table_text(table, records))
        if has_picture(table, records):
            write_picture(table, records, options.results / f"{table.name}.png")
    return bool(records)


def measure_extent(entry: Record | None) -> tuple[int, int]:
    """Return the number of runs and of all their iterations, by which the larger of two records is kept."""
    runs = entry["runs"] if entry else ()
    return len(runs), sum(run["iteration"] for run in runs)


def update_pages() -> None:
    """Put the recorded numbers between the marks of all pages (see `render_marks`)."""
    records = {name: part for name, table in TABLES.items() if (part := read_records(table))}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for mark, text in render_marks(page.read_text(encoding="utf-8"), records).items():
            put(page, mark, text)


# ---- the command line ----------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="(default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list tables and methods, and exit")
    parser.add_argument("--methods", nargs="+", help="methods of these tables (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: curves 0 to 4, images 0 to 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training then; 0: only test")
    parser.add_argument("--jobs", type=count, help="methods at once (default: the cores, or 1 with a GPU)")
    parser.add_argument("--folder", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=TABLE_RESULTS, help="folder of tables and pictures")
    options = parser.parse_args(arguments)
    tables: dict[str, Table] = {}
    for name in options.tables or TABLES:
        names = [name] if name in TABLES else [other for other in TABLES if other.startswith(f"{name}-")]
        if not names:
            parser.error(f"no table {name}; choose from {', '.join(TABLES)}")
        tables |= {other: TABLES[other] for other in names}
    options.tables = [*tables.values()]
    methods = dict.fromkeys(method for table in options.tables for method in table.methods)
    for method in options.methods or ():
        if method not in methods:
            parser.error(f"no method {method} in these tables; choose from {'; '.join(methods)}")
    if not options.minutes >= 0 or min(options.seeds or [0]) < 0:
        parser.error("expected --minutes and --seeds of at least 0")
    return options


def main() -> int:
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{table.name}: {'; '.join(table.methods)}" for table in options.tables))
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    success = run_all(options)
    written = [write_table(table, options) for table in options.tables]
    if options.results.resolve() == TABLE_RESULTS:
        update_pages()
    print(f"Written: {options.results}" if any(written) else "No run yet: nothing to write")
    return 0 if success else 1


if __name__ == "__main__":
    launch(main)

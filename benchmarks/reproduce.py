"""The published tables, each from one command.

    python benchmarks/reproduce.py                          # all tables
    python benchmarks/reproduce.py sinusoid assignment      # some; --help names them
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
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness import (
    RESULTS,
    ROOT,
    Parser,
    UsageError,
    call_main,
    describe_machine,
    launch,
    put,
    read_json,
    run_main,
    write_json,
    write_text,
)
from pages import describe_progress, render_marks, table_text, write_picture
from tables import TABLES, Record, Table, slug

from evaluation.tables import ALL, plain_values
from training import folders
from training.checkpoint import load_checkpoint

RUNS, RECORDS = ROOT / "checkpoints" / "reproduce", RESULTS / "reproduce"
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

    def runs(self) -> dict[int, Record]:
        """Return the content of training.json of each run by seed; {} of one that was killed before it."""
        listed = self.folder / folders.LIST
        names = {run["seed"]: run["name"] for run in read_json(listed)["runs"]} if listed.exists() else {}
        files = {seed: self.folder / name / folders.RESULTS for seed, name in sorted(names.items())}
        return {seed: read_json(file) if file.exists() else {} for seed, file in files.items()}

    def result(self, test: str, of: str = "tasks") -> Record:
        """Return a test's result, or that `of` "baselines", if it is one of all runs as they are now."""
        best = {s: run and (run["best_iteration"] or run["iteration"]) for s, run in self.runs().items()}
        contents = (read_json(file) for file in self.out(test).glob(f"test-*{of}.json"))
        return next((c for c in contents if {r["seed"]: r["iteration"] for r in c["runs"]} == best), {})

    def train(self, until: float) -> None:
        """Train until this time.monotonic(), and write the time into the ledger.

        Raises UsageError with the last line of a command that fails, and where other flags trained the runs.
        """
        flags, ledger = self.table.flags_of(self.method), self.ledger()
        if ledger["flags"] != flags:
            raise UsageError(f"{self.folder} was trained with other flags, {ledger['flags']}: remove it")
        place = ["--checkpoint-path", str(self.folder.parent), "--run-name", self.folder.name, "--resume"]
        for seeds in [[seed] for seed in self.seeds] if self.table.is_accuracy else [self.seeds]:
            begin, runs = time.monotonic(), self.runs()
            if begin >= until or all(has_ended(runs.get(seed, {})) for seed in seeds):
                continue
            line = [*flags.split(), "--seeds", ",".join(map(str, seeds)), *place]
            try:
                code, message = call_main(line, seconds=None if until == math.inf else until - begin)
            finally:
                for seed in map(str, seeds):
                    before = ledger["seeds"].get(seed, {"seconds": 0.0})["seconds"]
                    seconds = round(before + (time.monotonic() - begin) / len(seeds), 1)
                    ledger["seeds"][seed] = {"seconds": seconds, "machine": describe_machine()}
                if self.folder.exists():
                    write_json(self.folder / "reproduce.json", ledger)
            if code not in SAVED:
                raise UsageError(message or f"exit code {code}")

    def test(self) -> str:
        """Run the tests that have no results yet, if they may be; return a line on what there is."""
        runs = self.runs()
        ended = [seed for seed, run in runs.items() if has_ended(run)]
        words = f"of seeds {', '.join(map(str, runs))} have ended: {', '.join(map(str, ended)) or 'none'}"
        if not runs:
            return "not begun"
        if not all(runs.values()) or len(ended) not in (0, len(runs)):
            return f"{words}; not tested before the others have"
        for test in self.table.tests:
            flags = self.table.test_flags(test, self.method)
            if not self.result(test, "baselines" if "--baselines" in flags else "tasks"):
                run_main(["--eval", "--load", str(self.folder), "--out", str(self.out(test)), *flags])
        return f"{describe_progress([*runs.values()])}; {words}"

    def record(self, baseline: str = "") -> Record:
        """Return what is recorded of the method, or of a baseline of it; nothing before all its tests."""
        results = {test: self.result(test) for test in self.table.tests}
        ledger, runs, tests = self.ledger(), self.runs(), {}
        if not all(results.values()) or ledger["flags"] != self.table.flags_of(self.method):
            return {}
        for test, result in results.items():
            measured, steps = result["settings"], result["test_steps"]
            if baseline and "--baselines" not in self.table.test_flags(test, self.method):
                continue
            if baseline:
                if not (rows := self.result(test, "baselines").get("over_runs", {}).get(baseline)):
                    return {}
                measured, steps = {ALL: rows}, rows[-1]["steps"]
            compiled = {True: ", compiled", False: ", uncompiled", None: ""}[result.get("compiled")]
            tests[test] = {
                "flags": shlex.join(self.table.test_flags(test, self.method)),
                "tasks": result["tasks"],
                "test_steps": steps,
                "conditions": [f"{result['device']}, torch {result['versions']['torch']}{compiled}"],
                # without batch norm there is one reading, as of baselines: the transductive
                "results": {"transductive" if n == ALL else n: rows for n, rows in measured.items()},
            }
        lines = [
            {"seed": seed, **{name: run[name] for name in FACTS}, **ledger["seeds"][str(seed)]}
            | {"versions": result["versions"]}
            for seed, run in runs.items()
        ]
        settings = load_checkpoint(self.folder / f"seed-{min(runs)}" / folders.LAST, weights=False).settings
        entry = {"flags": ledger["flags"], "runs": lines, "settings": settings, "tests": tests}
        return plain_values(entry) if tests else {}


def has_ended(run: Record) -> bool:
    """Return whether training cannot continue: all iterations are done, or numbers are non-finite."""
    return bool(run) and (run["failure"] is not None or run["iteration"] >= run["iterations"])


def list_jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the first method of all tables, the second, ..."""
    for methods in zip_longest(*(table.methods for table in options.tables)):
        for table, method in zip(options.tables, methods, strict=True):
            if method and method in (options.methods or [method]):
                yield Job(table, method, options.seeds or range(table.seeds), options.folder)


# ---- from runs to records and pages --------------------------------------------------------------


def read_records(table: Table, results: Path = RECORDS) -> dict[str, Record]:
    """Return what is recorded of a table, by method."""
    files = {name: results / table.name / f"{slug(name)}.json" for name in table.names}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


def write_records(job: Job, results: Path) -> None:
    """Write the records of a job, and the files of its table."""
    table, records = job.table, read_records(job.table, results)
    for name in (job.method, *(table.baselines if job.method == table.measured_with else ())):
        entry = job.record("" if name == job.method else name)
        if entry and measure_extent(entry) >= measure_extent(records.get(name)):
            records[name] = entry
            write_json(results / table.name / f"{slug(name)}.json", entry)
    if records:
        ordered = {name: records[name] for name in table.names if name in records}
        write_text(results / f"{table.name}.md", table_text(table, ordered))
        if table.has_picture:
            write_picture(table, ordered, results / f"{table.name}.png")


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
    listed = "\n".join(f"  {table.name}: {'; '.join(table.methods)}" for table in TABLES.values())
    parser = Parser(f"{__doc__}\ntables and their methods:\n{listed}")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="(default: all)")
    parser.add_argument("--methods", nargs="+", help="methods of these tables (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: curves 0 to 4, images 0 to 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training then; 0: only test")
    parser.add_argument("--folder", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RECORDS, help="folder of the records")
    options = parser.parse_args(arguments)
    tables: dict[str, Table] = {}
    for name in options.tables or TABLES:
        names = [name] if name in TABLES else [other for other in TABLES if other.startswith(f"{name}-")]
        if not names:
            parser.error(f"no table {name}; choose from {', '.join(TABLES)}")
        tables |= {other: TABLES[other] for other in names}
    options.tables = [*tables.values()]
    methods = dict.fromkeys(method for table in options.tables for method in table.methods)
    if unknown := [method for method in options.methods or () if method not in methods]:
        parser.error(f"no method {unknown[0]} in these tables; choose from {'; '.join(methods)}")
    if not options.minutes >= 0 or min(options.seeds or [0]) < 0:
        parser.error("expected --minutes and --seeds of at least 0")
    return options


def main() -> int:
    options = parse_arguments()
    options.results.mkdir(parents=True, exist_ok=True)
    until, failed = time.monotonic() + 60 * options.minutes, False
    for job in list_jobs(options):
        try:
            job.train(until)
            line = job.test()
        except UsageError as error:
            line, failed = str(error), True
        print(f"{job.table.name}, {job.method}: {line}", flush=True)
        write_records(job, options.results)
        if options.results.resolve() == RECORDS:
            update_pages()
    return int(failed)


if __name__ == "__main__":
    launch(main)

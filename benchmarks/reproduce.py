"""The published tables, each from one command.

    python benchmarks/reproduce.py                          # all tables
    python benchmarks/reproduce.py sinusoid assignment      # some; --list names them
    python benchmarks/reproduce.py icons                    # all whose names begin so
    python benchmarks/reproduce.py omniglot-5way-1shot --methods maml anil --seeds 0
    python benchmarks/reproduce.py --minutes 120            # as far as two hours allow; repeat it to resume
    python benchmarks/reproduce.py --quick                  # the same path in a few minutes

Trains each method from each seed with main.py, takes the checkpoint that is best on validation tasks, and
tests it. Finished runs are kept in --folder, others are resumed. (A run with non-finite numbers counts as
finished: remove its folder to start again.) Writes to benchmarks/results/reproduce/ the numbers of each
method (TABLE/METHOD.json), a table (Markdown) and a picture, unfinished runs included and marked. A method's
record stays until there are runs of more seeds or, of as many, that have come as far; runs that have begun do
not count where others of the method are finished.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import table_text
import torch
from harness import RESULTS, ROOT, Parser, launch, put, read_json, write_json, write_text
from jobs import Record, Run, summarise_runs
from pictures import write_picture
from tables import TABLES, Table, slug

RUNS, TABLE_RESULTS = ROOT / "checkpoints" / "reproduce", RESULTS / "reproduce"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="(default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list tables and methods, and exit")
    parser.add_argument("--methods", nargs="+", help="methods of these tables (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: curves 0 to 4, images 0 to 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training then; 0: only test")
    parser.add_argument("--jobs", type=int, help="runs at once (default: the CPU's cores, or 1 with a GPU)")
    parser.add_argument("--folder", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=TABLE_RESULTS, help="folder of tables and pictures")
    parser.add_argument("--quick", action="store_true", help="few iterations and tasks, one seed")
    options = parser.parse_args(arguments)
    for name in options.tables:
        if not find_tables(name):
            parser.error(f"no table {name}; choose from {', '.join(TABLES)}")
    tables = {table.name: table for name in options.tables or TABLES for table in find_tables(name)}
    options.tables = [*tables.values()]
    methods = dict.fromkeys(method for table in options.tables for method in table.methods)
    for method in options.methods or ():
        if method not in methods:
            parser.error(f"no method {method} in these tables; choose from {'; '.join(methods)}")
    if options.jobs == 0 or not options.minutes >= 0 or min(options.seeds or [0]) < 0:
        parser.error("expected --jobs of at least 1, --minutes and --seeds of at least 0")
    if options.quick:
        options.seeds = (options.seeds or [0])[:1]
        options.folder = options.folder.with_name(options.folder.name + "-quick")
        options.results = options.results.with_name(options.results.name + "-quick")
    return options


def find_tables(name: str) -> list[Table]:
    """Return the table of this name or, without one, all whose names begin with it."""
    return [TABLES[name]] if name in TABLES else [t for t in TABLES.values() if t.name.startswith(f"{name}-")]


def list_runs(options: argparse.Namespace) -> Iterator[Run]:
    """Yield the first method of all tables, the second, ..., and again from the other seeds."""
    for seed in dict.fromkeys(options.seeds or range(max(table.seeds for table in options.tables))):
        tables = [table for table in options.tables if options.seeds or seed < table.seeds]
        for methods in zip_longest(*(table.methods for table in tables)):
            for table, method in zip(tables, methods, strict=True):
                if method and method in (options.methods or [method]):
                    yield Run(table, method, seed, options.folder, options.quick)


def train_and_test(options: argparse.Namespace) -> bool:
    """Train and test; return whether all went well. Ctrl-C reaches main.py, too, which saves and ends."""
    at_once = options.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    until, success = time.monotonic() + 60 * options.minutes, True
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for succeeded, line in pool.map(
                partial(Run.train_and_test, until=until, single_threaded=at_once > 1), list_runs(options)
            ):
                print(line, flush=True)
                success &= succeeded
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return success


def record_file(table: Table, method: str, results: Path = TABLE_RESULTS) -> Path:
    return results / table.name / f"{slug(method)}.json"


def read_record(table: Table, results: Path = TABLE_RESULTS) -> dict[str, Record]:
    """Return what is recorded of a table, by method."""
    files = {method: record_file(table, method, results) for method in (*table.methods, *table.baselines)}
    return {method: read_json(file) for method, file in files.items() if file.exists()}


def write_table(table: Table, options: argparse.Namespace) -> bool:
    """Write a table's files; return whether there is anything to write."""
    seeds = sorted({*range(table.seeds), *(options.seeds or ())})
    record = read_record(table, options.results)
    for method in (*table.methods, *table.baselines):
        trained = table.measured_with if method in table.baselines else method
        runs = [Run(table, trained, seed, options.folder, options.quick) for seed in seeds]
        entry = summarise_runs(table, method, runs)
        if entry and measure_extent(entry) >= measure_extent(record.get(method, {"runs": ()})):
            record[method] = entry
            write_json(record_file(table, method, options.results), entry)
    if record:
        write_text(options.results / f"{table.name}.md", table_text.table_text(table, record))
        if table.has_picture(record):
            write_picture(table, record, options.results / f"{table.name}.png")
    return bool(record)


def measure_extent(entry: Record) -> tuple[int, int]:
    """Return the number of runs and of all their iterations, by which the larger of two records is kept."""
    return len(entry["runs"]), sum(run["iteration"] for run in entry["runs"])


def update_pages() -> None:
    """Put the recorded numbers between the marks of all pages (see `render_marks`)."""
    records = {name: record for name, table in TABLES.items() if (record := read_record(table))}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for mark, text in table_text.render_marks(page.read_text(encoding="utf-8"), records).items():
            put(page, mark, text)


def main() -> int:
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{table.name}: {'; '.join(table.methods)}" for table in options.tables))
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    success = train_and_test(options)
    written = [write_table(table, options) for table in options.tables]
    if options.results.resolve() == TABLE_RESULTS:
        update_pages()
    print(f"Written: {options.results}" if any(written) else "No run yet: nothing to write")
    return 0 if success else 1


if __name__ == "__main__":
    launch(main)

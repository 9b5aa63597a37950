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
method (TABLE/METHOD.json), a table (Markdown) and a picture, unfinished runs included and marked. A run whose
folder is gone stays in the table until the same command has come as far and its run has been tested.
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

import pictures
import table_text
import torch
from cells import TABLES, Cell, Table
from harness import RESULTS, ROOT, Parser, launch, put, read_json, write_json, write_text
from jobs import Job, Record, record, run_job

RUNS = ROOT / "checkpoints" / "reproduce"
TABLE_RESULTS = RESULTS / "reproduce"


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
    tables = []
    for name in options.tables or TABLES:
        group = [table for table in TABLES.values() if table.name.startswith(f"{name}-")]
        if name not in TABLES and not group:
            parser.error(f"no table {name}; choose from {', '.join(TABLES)}")
        tables += [TABLES[name]] if name in TABLES else group
    options.tables = tables
    methods = {cell.method for table in options.tables for cell in table.trained}
    for method in options.methods or ():
        if method not in methods:
            parser.error(f"no method {method} in these tables; choose from {'; '.join(sorted(methods))}")
    if options.jobs == 0 or not options.minutes >= 0 or min(options.seeds or [0]) < 0:
        parser.error("expected --jobs of at least 1, --minutes and --seeds of at least 0")
    if options.quick:
        options.seeds = (options.seeds or [0])[:1]
        options.folder = options.folder.with_name(options.folder.name + "-quick")
        options.results = options.results.with_name(options.results.name + "-quick")
    return options


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the first method of all tables, the second, ..., and again from the other seeds.

    Tables fill evenly.
    """
    for seed in dict.fromkeys(options.seeds or range(max(len(table.seeds) for table in options.tables))):
        tables = [table for table in options.tables if seed in (options.seeds or table.seeds)]
        for cells in zip_longest(*(table.trained for table in tables)):
            for table, cell in zip(tables, cells, strict=True):
                if cell and (options.methods is None or cell.method in options.methods):
                    yield Job(table, cell, seed, options.folder, options.quick)


def run_jobs(options: argparse.Namespace) -> bool:
    """Train and test; return whether all went well. Ctrl-C reaches main.py, too, which saves and ends."""
    at_once = options.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    run = partial(run_job, until=time.monotonic() + 60 * options.minutes, single_threaded=at_once > 1)
    success = True
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for well, line in pool.map(run, jobs_of(options)):
                print(line, flush=True)
                success &= well
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return success


# ---- writing -------------------------------------------------------------------------------------


def write_table(table: Table, options: argparse.Namespace) -> bool:
    """Write a table's files from all runs, recorded ones included; return whether there are any."""
    seeds = sorted({*table.seeds, *(options.seeds or ())})
    jobs = [Job(table, c, seed, options.folder, options.quick) for seed in seeds for c in table.trained]
    known = read_record(table, options.results)
    content = record(table, jobs, known)
    if content:
        for method, entry in content.items():
            if entry != known.get(method):
                write_json(cell_file(table, table.cell(method), options.results), entry)
        write_text(options.results / f"{table.name}.md", table_text.table_text(table, content))
        pictures.draw(table, content, options.results)
    return bool(content)


def cell_file(table: Table, cell: Cell, results: Path) -> Path:
    return results / table.name / f"{cell.slug}.json"


def read_record(table: Table, results: Path = TABLE_RESULTS) -> Record:
    """Return what is recorded of a table, by method."""
    files = {cell.method: cell_file(table, cell, results) for cell in table.cells}
    return {method: read_json(file) for method, file in files.items() if file.exists()}


def read_records() -> dict[str, Record]:
    """Return the recorded tables by name."""
    return {name: content for name, table in TABLES.items() if (content := read_record(table))}


def update_pages() -> None:
    """Put the recorded tables into their pages, and a summary of the published numbers into docs/results.md.

    Rows of a table stand on other pages, between `<!-- TABLE: METHOD; METHOD -->` and the same with a slash.
    """
    pages = sorted((ROOT / "docs").glob("*.md"))
    records = read_records()
    for name, content in records.items():
        text = table_text.table_text(TABLES[name], content)
        if (TABLE_RESULTS / f"{name}.png").exists():
            text += f"\n![{TABLES[name].title}](../benchmarks/results/reproduce/{name}.png)\n"
        for page in pages:
            put(page, name, text)
    put(ROOT / "docs" / "results.md", "published", table_text.summary(records))
    for page in pages:
        for mark, name, methods in table_text.excerpts_on(page.read_text()):
            put(page, mark, table_text.excerpt(TABLES[name], records[name], methods))


def main() -> int:
    options = parse_arguments()
    if options.list:
        for table in options.tables:
            print(f"{table.name}: {'; '.join(cell.method for cell in table.trained)}")
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    success = run_jobs(options)
    written = [write_table(table, options) for table in options.tables]
    if options.results == TABLE_RESULTS:
        update_pages()
    print(f"Written: {options.results}" if any(written) else "No run yet: nothing to write")
    return 0 if success else 1


if __name__ == "__main__":
    launch(main)

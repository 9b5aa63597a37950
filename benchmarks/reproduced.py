"""The numbers of benchmarks/reproduce.py: from a table's record to words. Pure functions, but for `put`."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cells import FAR_ENOUGH, SEEDS, TABLES, Cell, Column, Published, Table  # noqa: E402

from common.files import write_whole  # noqa: E402

Record = Mapping[str, Any]  # of a table, as reproduce.py writes it


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

    def reaches(self, published: Published, *, higher: bool) -> bool:
        return self.mean >= published.value if higher else self.mean <= published.value

    def meets(self, published: Published, *, higher: bool) -> bool:
        """Reached, or within the number's own interval of it."""
        interval = self.interval if math.isfinite(self.interval) else 0.0
        near = abs(self.mean - published.value) <= interval
        return near or self.reaches(published, higher=higher)


def number(table: Table, column: Column, runs: Sequence[Record]) -> Number | None:
    """A column of a method, of those runs that have it; None where there are none, or all tasks diverge."""
    measure, scale = ("accuracy", 100) if table.accuracy else ("loss_without_diverged", 1)
    rows = [row for run in runs if (row := row_of(column, run))]
    if not rows or any(row[measure] is None for row in rows):
        return None
    intervals = [row.get(f"{measure}_interval_95") for row in rows]
    return Number(
        [scale * row[measure] for row in rows],
        [math.nan if i is None else scale * i for i in intervals],
        0 if table.accuracy else sum(row.get("diverged_tasks", 0) for row in rows),
    )


def row_of(column: Column, run: Record) -> Record | None:
    """The numbers of a run after the steps of a column; None where it has not been measured so."""
    if column.test is None:
        final = run["final_training_loss"]
        return {"loss_without_diverged": final["mean"]} if final else None
    test = run["tests"].get(column.test)
    if test is None:
        return None
    rows = {
        row["steps"]: row for row in test["per_step"] if column.normalisation in (None, row["normalisation"])
    }
    wanted = test.get("test_steps") if column.steps is None else column.steps
    return rows.get(wanted, rows.get(0) if len(rows) == 1 else None)  # which does not adapt


# ---- a table in Markdown -------------------------------------------------------------------------


def digits_of(table: Table) -> int:
    return 2 if table.accuracy else 3


def table_text(table: Table, record: Record) -> str:
    """Ours with the published numbers below, then what is met, and the commands."""
    methods = record["methods"]
    runs = {method: found["runs"] for method, found in methods.items()}
    columns = [c for c in table.columns if any(number(table, c, own) for own in runs.values())]
    titles = [c.title for c in columns]
    lines = [
        f"### {table.title}\n",
        f"| | {' | '.join([*titles, 'seeds', 'iterations', 'time'])} |",
        "|-" * (len(titles) + 4) + "|",
    ]
    for cell in table.cells:
        own = runs.get(cell.method, [])
        numbers = [number(table, column, own) for column in columns]
        if any(numbers):
            texts = [_text(found, len(own), digits_of(table)) for found in numbers]
            lines.append(f"| **{cell.method}** | {' | '.join([*texts, *length(cell, own)])} |")
        if any(numbers) and any(title in titles for title in cell.published):
            texts = [str(cell.published.get(title, "")) for title in titles]
            lines.append(f"| *{cell.source}* | {' | '.join([*texts, '', '', ''])} |")
    met = [f"- {cell.method}, {title}: {said}" for cell, title, *_, said in verdicts(table, record)]
    shell = ["```sh", *commands(table, record), "```"]
    return "\n".join([*lines, "", footer(table, record), "", *met, "", *shell, ""])


def _text(found: Number | None, runs: int, digits: int) -> str:
    """A cell; where fewer runs than the row's have been measured, with their number."""
    if found is None:
        return ""
    fewer = len(found.means)
    return found.text(digits) + f" [{fewer} seed{'s' * (fewer > 1)}]" * (fewer < runs)


def length(cell: Cell, runs: Sequence[Record]) -> list[str]:
    """Seeds, iterations and time, as the table has them."""
    seeds = str(len(runs)) if len(runs) > 1 else "1 (single run)"
    if cell.beside:
        return [seeds, "", ""]
    seconds = [run["seconds"] for run in runs if run["seconds"]]
    mean = statistics.mean(seconds) if seconds else 0
    took = f"{mean / 60:.0f} min" if mean > 90 else f"{mean:.0f} s" if mean else "not recorded"
    best = [run["best_iteration"] or run["iterations"] for run in runs]
    return [seeds, f"{reached(runs)}{ended(runs)}; best at {_range(best)}", took]


def reached(runs: Sequence[Record]) -> str:
    """Iterations, and of how many."""
    planned = runs[0]["planned"]
    done = [run["iterations"] for run in runs]
    return _range(done) + f" of {planned:,}" * (min(done) < planned)


def ended(runs: Sequence[Record]) -> str:
    """Whether runs have ended early because numbers were no longer finite."""
    failed = sum(run.get("failure") is not None for run in runs)
    if not failed:
        return ""
    return ", where numbers were no longer finite" + f" in {failed} of {len(runs)} runs" * (len(runs) > 1)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


class Verdict(NamedTuple):
    """A published number beside ours."""

    cell: Cell
    title: str  # of the column
    published: Published
    ours: Number | None
    runs: list[Record]  # that ours is of
    said: str  # in words, whether it is met


def verdicts(table: Table, record: Record) -> list[Verdict]:
    """Of every published number of a table."""
    found = []
    columns = {column.title: column for column in table.columns}
    for cell in table.cells:
        for title, published in cell.published.items():
            runs = measured(record, cell, columns[title])
            ours = number(table, columns[title], runs)
            said = f"published {published}; not run"
            if ours is not None:
                digits = digits_of(table)
                said = f"published {published}, ours {ours.text(digits)}: {how_near(table, published, ours)}"
                said += f" (after {reached(runs)} iterations{ended(runs)})" * unfinished(runs)
                said += "".join(f" ({text})" for text in remarks(cell, ours))
            found.append(Verdict(cell, title, published, ours, runs, said))
    return found


def remarks(cell: Cell, ours: Number) -> list[str]:
    """What else is to be said of a method's number."""
    said = [cell.note] if cell.note else []
    if cell.asked is not None:
        side = "below" if ours.mean < cell.asked else "not below"
        said.append(f"{side} {cell.asked:g}, which is asked for")
    return said


def measured(record: Record, cell: Cell, column: Column) -> list[Record]:
    """The runs of a method that have that column."""
    runs = record["methods"].get(cell.method, {"runs": []})["runs"]
    return [run for run in runs if row_of(column, run)]


def unfinished(runs: Sequence[Record]) -> bool:
    return any(run["iterations"] < run["planned"] for run in runs)


def how_near(table: Table, published: Published, ours: Number) -> str:
    """Met: by the mean of three seeds or more. Fewer reach it, or do not."""
    few = len(ours.means) < len(SEEDS)
    if ours.reaches(published, higher=table.accuracy):
        return "reached" if few else "**met**"
    if ours.meets(published, higher=table.accuracy):
        return "within its interval" if few else "**met**, within its interval"
    return f"{'short' if few else 'not met,'} by {abs(ours.mean - published.value):.{digits_of(table)}f}"


def footer(table: Table, record: Record) -> str:
    """What the numbers are."""
    runs = [run for found in record["methods"].values() for run in found["runs"]]
    tests = [test for run in runs for test in run["tests"].values()]
    machines = sorted({run["machine"] for run in runs if run["machine"]})
    devices = sorted({test["device"].replace("1 threads", "1 thread") for test in tests})
    versions = sorted({test["torch"] for test in tests})
    tasks = sorted({test["tasks"] for test in tests})
    parts = [
        f"{' or '.join(f'{n:,}' for n in tasks)} test tasks" if tasks else "",
        "mean over seeds, ± 95 % interval over tasks, in brackets the lowest and the highest seed",
        "" if table.accuracy else "diverged tasks are left out of the means, and counted over all seeds",
        "`best.pt`, chosen on validation tasks",
        "; ".join([*machines, *devices]),
        f"torch {', '.join(versions)}" if versions else "",
    ]
    return "; ".join(part for part in parts if part) + "." + lacking(table, record)


def lacking(table: Table, record: Record) -> str:
    """The methods of the table that have not been run, or not been through all of its tests."""
    methods, tests = record["methods"], {test.name for test in table.tests}
    trained = [cell.method for cell in table.cells if cell.beside is None]
    absent = [method for method in trained if method not in methods]
    partly = [
        method
        for method in trained
        if method in methods and any(run["tests"].keys() < tests for run in methods[method]["runs"])
    ]
    said = {"Not run": absent, "Not tested in all columns, or not all seeds": partly}
    return "".join(f" {what}: {', '.join(names)}." for what, names in said.items() if names)


def commands(table: Table, record: Record) -> list[str]:
    """What makes the first seed's runs, and the tests of the first, to be typed by hand."""
    trained = {cell.method for cell in table.cells if cell.beside is None}
    first = [found["runs"][0] for method, found in record["methods"].items() if method in trained]
    names = [f"{table.name}-{run['name']}" for run in first]
    lines = [f"{run['trained_by']} --run-name {name}" for run, name in zip(first, names, strict=True)]
    for test in table.tests:
        known = first[0]["tests"].get(test.name, {}).get("flags")
        flags = [*(test.flags if known is None else shlex.split(known)), *["--baselines"] * test.baselines]
        lines.append(shlex.join(["python", "main.py", "--eval", "--load", f"checkpoints/{names[0]}", *flags]))
    return lines


# ---- all tables ----------------------------------------------------------------------------------


def summary(records: Mapping[str, Record]) -> str:
    """Every published number of a method whose runs are far enough, in one table."""
    lines = ["| | | published | ours | |", "|-|-|-|-|-|"]
    for name, record in records.items():
        table = TABLES[name]
        for cell, title, published, ours, runs, _ in verdicts(table, record):
            if ours is None or cell.beside:
                continue
            if any(run["iterations"] < FAR_ENOUGH * run["planned"] for run in runs):
                continue
            count = len(ours.means)
            seeds = f"{count} seeds" if count > 1 else "single run"
            partly = f", {reached(runs)} iterations{ended(runs)}" * unfinished(runs)
            told = f"{how_near(table, published, ours)} ({seeds}{partly})"
            told += "".join(f"; {text}" for text in remarks(cell, ours))
            method = f"{table.title.partition(':')[0].partition(', accuracy')[0]}, {cell.method}"
            text = ours.text(digits_of(table))
            lines.append(f"| {method} | {title} | {published} | {text} | {told} |")
    return "\n".join([*lines, ""])


def put(page: Path, name: str, text: str) -> None:
    """Puts a text into a page, between `<!-- name -->` and `<!-- /name -->`."""
    before, begin, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise ValueError(f"{page} has no place for {name}")
    write_whole(page, lambda file: file.write((before + begin + text + end + after).encode()))

"""Tables in Markdown, from the records that jobs.py collects. Pure functions.

A record is the content of `results/reproduce/TABLE.json`: for each method its runs, with the numbers of
every test after every inner step.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cells import FAR_ENOUGH, SEEDS, TABLES, Cell, Column, Published, Table
from harness import markdown

Record = Mapping[str, Any]  # of a table, or of one of its runs


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
        """The mean interval over tasks: all seeds share the test tasks, so more seeds do not narrow it."""
        return statistics.mean(self.intervals)

    def text(self, digits: int) -> str:
        """Return the mean over seeds, its interval over tasks, the lowest and the highest seed."""
        text = f"{self.mean:.{digits}f}"
        if math.isfinite(self.interval):
            text += f" ±{self.interval:.{digits}f}"
        if len(self.means) > 1:
            text += f" ({min(self.means):.{digits}f} to {max(self.means):.{digits}f})"
        return text + f", {self.diverged} diverged" * bool(self.diverged)


def number(table: Table, column: Column, runs: Sequence[Record]) -> Number | None:
    """Return a column of a method over the runs that have it; None if none has, or all tasks diverge."""
    measure, scale = ("accuracy", 100) if table.accuracy else ("loss_without_diverged", 1)
    rows = [row for run in runs if (row := row_of(column, run))]
    if not rows or any(row[measure] is None for row in rows):
        return None
    intervals = [row.get(f"{measure}_interval_95") for row in rows]
    return Number(
        [scale * row[measure] for row in rows],
        [math.nan if interval is None else scale * interval for interval in intervals],
        0 if table.accuracy else sum(row.get("diverged_tasks", 0) for row in rows),
    )


def row_of(column: Column, run: Record) -> Record | None:
    """Return the numbers of a run after the steps of a column; None if they have not been measured."""
    if column.test is None:
        final = run["final_training_loss"]
        return {"loss_without_diverged": final["mean"]} if final else None
    test = run["tests"].get(column.test)
    if test is None:
        return None
    rows = {
        row["steps"]: row for row in test["per_step"] if column.normalisation in (None, row["normalisation"])
    }
    steps = test.get("test_steps") if column.steps is None else column.steps
    return rows.get(steps, rows.get(0) if len(rows) == 1 else None)  # a single row: it does not adapt


# ---- a table in Markdown -------------------------------------------------------------------------


def digits_of(table: Table) -> int:
    return 2 if table.accuracy else 3


def table_text(table: Table, record: Record) -> str:
    """Return our numbers with the published ones below, then what is met, and the commands."""
    runs = {method: entry["runs"] for method, entry in record["methods"].items()}
    columns = [c for c in table.columns if any(number(table, c, of_method) for of_method in runs.values())]
    titles = [column.title for column in columns]
    rows = []
    for cell in table.cells:
        of_cell = runs.get(cell.method, [])
        numbers = [number(table, column, of_cell) for column in columns]
        if any(numbers):
            texts = ["" if value is None else value.text(digits_of(table)) for value in numbers]
            rows.append([f"**{cell.method}**", *texts, *length_texts(cell, of_cell)])
        if any(numbers) and any(title in titles for title in cell.published):
            texts = [cell.published[title].text if title in cell.published else "" for title in titles]
            rows.append([f"*{cell.source}*", *texts, "", "", ""])
    verdicts = [f"- {v.cell.method}, {v.title}: {verdict_text(table, v)}" for v in verdicts_of(table, record)]
    parts = [
        f"### {table.title}\n",
        markdown(["", *titles, "seeds", "iterations", "time"], rows),
        "",
        footer(table, record),
        "",
        *verdicts,
        "",
        *("```sh", *commands(table, record), "```"),
        "",
    ]
    return "\n".join(parts)


def length_texts(cell: Cell, runs: Sequence[Record]) -> list[str]:
    """Return the last cells of a row: seeds, iterations, time."""
    seeds = str(len(runs)) if len(runs) > 1 else "1 (single run)"
    if cell.baseline_of:
        return [seeds, "", ""]
    seconds = [run["seconds"] for run in runs if run["seconds"]]
    mean = statistics.mean(seconds) if seconds else 0
    duration = f"{mean / 60:.0f} min" if mean > 90 else f"{mean:.0f} s" if mean else "not recorded"
    best = [run["best_iteration"] or run["iterations"] for run in runs]
    return [seeds, f"{reached(runs)}{ended(runs)}; best at {range_text(best)}", duration]


def reached(runs: Sequence[Record]) -> str:
    """Return the iterations of the runs, and of how many if they are not finished."""
    planned = runs[0]["planned"]
    iterations = [run["iterations"] for run in runs]
    return range_text(iterations) + f" of {planned:,}" * (min(iterations) < planned)


def ended(runs: Sequence[Record]) -> str:
    """Return words for runs that ended early at non-finite numbers."""
    failed = sum(run.get("failure") is not None for run in runs)
    if not failed:
        return ""
    return ", ended by non-finite numbers" + f" in {failed} of {len(runs)} runs" * (len(runs) > 1)


def range_text(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# ---- published numbers ---------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A published number and ours."""

    cell: Cell
    title: str  # of the column
    published: Published
    ours: Number | None
    runs: list[Record]  # behind ours


def verdicts_of(table: Table, record: Record) -> list[Verdict]:
    """Return a verdict for every published number of a table."""
    columns = {column.title: column for column in table.columns}
    verdicts = []
    for cell in table.cells:
        runs = record["methods"].get(cell.method, {"runs": []})["runs"]
        for title, published in cell.published.items():
            column = columns[title]
            measured = [run for run in runs if row_of(column, run)]
            verdicts.append(Verdict(cell, title, published, number(table, column, measured), measured))
    return verdicts


def verdict_text(table: Table, verdict: Verdict) -> str:
    """Return the words for one published number, as they stand below a table."""
    _, _, published, ours, runs = verdict
    if ours is None:
        return f"published {published.text}; not run"
    text = f"published {published.text}, ours {ours.text(digits_of(table))}: "
    text += distance(table, published, ours)
    text += f" (after {reached(runs)} iterations{ended(runs)})" * is_unfinished(runs)
    return text + "".join(f" ({remark})" for remark in remarks(verdict.cell, ours))


def remarks(cell: Cell, ours: Number) -> list[str]:
    """Return what else a reader must know about a method's number."""
    notes = [cell.note] if cell.note else []
    if cell.required is not None:
        side = "below" if ours.mean < cell.required else "not below"
        notes.append(f"{side} {cell.required:g}, which is required")
    return notes


def is_unfinished(runs: Sequence[Record]) -> bool:
    return any(run["iterations"] < run["planned"] for run in runs)


def distance(table: Table, published: Published, ours: Number) -> str:
    """Return the verdict in words; only the mean of three seeds or more *meets* a published number."""
    few = len(ours.means) < len(SEEDS)
    gap = (published.value - ours.mean) * (1 if table.accuracy else -1)  # above 0: ours falls short
    if gap <= 0:
        return "reached" if few else "**met**"
    if gap <= ours.interval:  # False for NaN
        return "within its interval" if few else "**met**, within its interval"
    return f"{'short' if few else 'not met,'} by {gap:.{digits_of(table)}f}"


def summary(records: Mapping[str, Record]) -> str:
    """Return one table of the published numbers of all methods whose runs are far enough."""
    rows = []
    for name, record in records.items():
        table = TABLES[name]
        for verdict in verdicts_of(table, record):
            cell, title, published, ours, runs = verdict
            short = any(run["iterations"] < FAR_ENOUGH * run["planned"] for run in runs)
            if ours is None or cell.baseline_of or short:
                continue
            seeds = f"{len(ours.means)} seeds" if len(ours.means) > 1 else "single run"
            partly = f", {reached(runs)} iterations{ended(runs)}" * is_unfinished(runs)
            text = f"{distance(table, published, ours)} ({seeds}{partly})"
            text += "".join(f"; {remark}" for remark in remarks(cell, ours))
            method = f"{table.title.partition(':')[0].partition(', accuracy')[0]}, {cell.method}"
            rows.append([method, title, published.text, ours.text(digits_of(table)), text])
    return markdown(["", "", "published", "ours", ""], rows) + "\n"


# ---- below a table -------------------------------------------------------------------------------


def footer(table: Table, record: Record) -> str:
    """Return one line on what the numbers are and where they were measured."""
    runs = [run for entry in record["methods"].values() for run in entry["runs"]]
    tests = [test for run in runs for test in run["tests"].values()]
    machines = sorted({run["machine"] for run in runs if run["machine"]})
    devices = sorted({test["device"].replace("1 threads", "1 thread") for test in tests})
    versions = sorted({test["torch"] for test in tests})
    tasks = sorted({test["tasks"] for test in tests})
    parts = [
        f"{' or '.join(f'{count:,}' for count in tasks)} test tasks" if tasks else "",
        "mean over seeds, ± 95 % interval over tasks, in brackets the lowest and the highest seed",
        "" if table.accuracy else "diverged tasks are left out of the means, and counted over all seeds",
        "`best.pt`, chosen on validation tasks",
        "; ".join([*machines, *devices]),
        f"torch {', '.join(versions)}" if versions else "",
    ]
    absent = [cell.method for cell in table.trained if cell.method not in record["methods"]]
    return "; ".join(part for part in parts if part) + "." + f" Not run: {', '.join(absent)}." * bool(absent)


def commands(table: Table, record: Record) -> list[str]:
    """Return the commands of the first seed's runs, and of the tests of the first of them."""
    cells = [cell for cell in table.trained if cell.method in record["methods"]]
    first = [record["methods"][cell.method]["runs"][0] for cell in cells]
    lines = [f"{run['trained_by']} --run-name {table.name}-{run['name']}" for run in first]
    evaluate = ["python", "main.py", "--eval", "--load", f"checkpoints/{table.name}-{first[0]['name']}"]
    baselines = ["--baselines"] * cells[0].baselines
    return [*lines, *(shlex.join([*evaluate, *test.flags, *baselines]) for test in table.tests)]

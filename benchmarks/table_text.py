"""Tables in Markdown, from the records that jobs.py collects. Pure functions.

A record is what `results/reproduce/TABLE/` holds, by method: its runs, with the numbers of every test after
every inner step.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cells import FAR_ENOUGH, TABLES, Cell, Column, Published, Table, curve_columns
from harness import markdown

from evaluation.tables import decimal

Record = Mapping[str, Any]  # of a table, or of one of its runs


@dataclass(frozen=True)
class Number:
    """A measured number over seeds: an error, or an accuracy in percent."""

    means: list[float]  # of each seed, over all tasks; NaN where it is not finite
    interval: float = math.nan  # 95 % over tasks, of the mean over seeds; NaN where there is none
    diverged: int = 0  # tasks, of all seeds
    kept: tuple[float, float] = (math.nan, math.nan)  # mean without those, and its interval

    @property
    def mean(self) -> float:
        return statistics.mean(self.means)

    def text(self, digits: int) -> str:
        """Return the mean over seeds, its interval over tasks, the lowest and the highest seed.

        After a semicolon comes the mean without diverged tasks, if there are any.
        """
        text = mean_text(self.mean, self.interval, digits)
        if any(map(math.isfinite, self.means[1:] and self.means)):
            ordered = sorted(self.means, key=lambda mean: math.inf if math.isnan(mean) else mean)
            low, high = (mean_text(mean, math.nan, digits) for mean in (ordered[0], ordered[-1]))
            text += f" ({low} to {high})"
        if not self.diverged:
            return text
        return f"{text}; {mean_text(*self.kept, digits)} without {self.diverged:,} diverged"


def mean_text(mean: float, interval: float, digits: int) -> str:
    """Return a mean with its interval, where there is one; a small one with two digits that are not 0."""
    if not math.isfinite(mean):
        return "not finite"
    if mean:
        digits = max(digits, 1 - math.floor(math.log10(abs(mean))))
    return decimal(mean, digits) + f" ±{decimal(interval, digits)}" * math.isfinite(interval)


def number(table: Table, column: Column, entry: Record) -> Number | None:
    """Return a column of a method over the runs that have it; None if none has.

    The interval of several runs is computed from each task's mean over them: there is none if the tasks of a
    run were not kept.
    """
    measure, scale = ("accuracy", 100.0) if table.accuracy else ("loss", 1.0)
    rows = [row for run in entry["runs"] if (row := row_of(column, run))]
    if not rows:
        return None

    def value(row: Record, name: str) -> float:
        return math.nan if row.get(name) is None else scale * row[name]

    means = [value(row, measure) for row in rows]
    diverged = 0 if table.accuracy else sum(row.get("diverged_tasks", 0) for row in rows)
    if len(rows) == 1:
        without = "loss_without_diverged"
        kept = (value(rows[0], without), value(rows[0], f"{without}_interval_95"))
        return Number(means, value(rows[0], f"{measure}_interval_95"), diverged, kept)
    together = row_of(column, entry["over_seeds"]) if column.test and "over_seeds" in entry else None
    if together and together["runs"] == len(rows):
        kept = (value(together, "mean_without_diverged"), value(together, "interval_95_without_diverged"))
        return Number(means, value(together, "interval_95_over_tasks"), diverged, kept)
    kept = (statistics.mean(value(row, "loss_without_diverged") for row in rows), math.nan)
    return Number(means, diverged=diverged, kept=kept)


def row_of(column: Column, run: Record) -> Record | None:
    """Return the numbers of a run after the steps of a column; None if they have not been measured."""
    if column.test is None:
        final = run["final_training_loss"]
        return {"loss": final["mean"]} if final else None
    test = run["tests"].get(column.test)
    if test is None:
        return None
    rows = {
        row["steps"]: row for row in test["per_step"] if column.normalisation in (None, row["normalisation"])
    }
    steps = test.get("test_steps") if column.steps is None else column.steps
    return rows.get(steps, rows.get(0) if len(rows) == 1 else None)  # a single row: it does not adapt


# ---- a table in Markdown -------------------------------------------------------------------------


def table_text(table: Table, record: Record) -> str:
    """Return our numbers with the published ones below, then what is met, and the commands."""
    columns = [c for c in table.columns if any(number(table, c, entry) for entry in record.values())]
    titles = [column.title for column in columns]
    rows = []
    for cell in table.cells:
        entry = record.get(cell.method, {"runs": []})
        numbers = [number(table, column, entry) for column in columns]
        if any(numbers):
            texts = ["" if value is None else value.text(table.digits) for value in numbers]
            rows.append([f"**{cell.method}**", *texts, *length_texts(cell, entry["runs"])])
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
    return range_text([run["iterations"] for run in runs]) + f" of {runs[0]['planned']:,}" * unfinished(runs)


def unfinished(runs: Sequence[Record]) -> bool:
    return any(run["iterations"] < run["planned"] for run in runs)


def ended(runs: Sequence[Record]) -> str:
    """Return words for runs that ended early at non-finite numbers."""
    failed = sum(run.get("failure") is not None for run in runs)
    if not failed:
        return ""
    return ", ended by non-finite numbers" + f" in {failed} of {len(runs)} runs" * (len(runs) > 1)


def range_text(numbers: Sequence[int]) -> str:
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


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
        entry = record.get(cell.method, {"runs": []})
        for title, published in cell.published.items():
            column = columns[title]
            measured = [run for run in entry["runs"] if row_of(column, run)]
            verdicts.append(Verdict(cell, title, published, number(table, column, entry), measured))
    return verdicts


def verdict_text(table: Table, verdict: Verdict) -> str:
    """Return the words for one published number, as they stand below a table."""
    _, _, published, ours, runs = verdict
    if ours is None:
        return f"published {published.text}; not run"
    text = f"published {published.text}, ours {ours.text(table.digits)}: "
    text += distance(table, published, ours, runs)
    text += f" (after {reached(runs)} iterations{ended(runs)})" * unfinished(runs)
    return text + "".join(f" ({remark})" for remark in remarks(verdict.cell, ours))


def remarks(cell: Cell, ours: Number) -> list[str]:
    """Return what else a reader must know about a method's number."""
    notes = [cell.note] if cell.note else []
    if cell.required is not None:
        side = "below" if ours.mean < cell.required else "not below"
        notes.append(f"{side} {cell.required:g}, which is required")
    return notes


def distance(table: Table, published: Published, ours: Number, runs: Sequence[Record]) -> str:
    """Return the verdict in words, by the mean over all tasks: only all seeds, finished, *meet* a number."""
    few = unfinished(runs) or len(ours.means) < len(table.seeds)
    by = "a single run" if len(ours.means) == 1 else f"{len(ours.means)} seeds of {len(table.seeds)}"
    gap = (published.value - ours.mean) * (1 if table.accuracy else -1)  # above 0: ours falls short
    if not math.isfinite(gap):
        return "not met, not finite"
    if gap <= 0:
        return f"reached by {by}" if few else "**met**"
    if gap <= ours.interval:  # False for NaN
        return f"reached by {by}, within its interval" if few else "**met**, within its interval"
    return f"{'short' if few else 'not met,'} by {decimal(gap, table.digits)}"


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
            verdict_words = distance(table, published, ours, runs)
            details = [f"{len(ours.means)} seeds" if len(ours.means) > 1 else "single run"]
            details = [] if verdict_words.startswith("reached by") else details
            details += [f"{reached(runs)} iterations{ended(runs)}"] * unfinished(runs)
            text = verdict_words + f" ({', '.join(details)})" * bool(details)
            text += "".join(f"; {remark}" for remark in remarks(cell, ours))
            method = f"{table.title.partition(':')[0].partition(', accuracy')[0]}, {cell.method}"
            rows.append([method, title, published.text, ours.text(table.digits), text])
    return markdown(["", "", "published", "ours", ""], rows) + "\n"


# ---- below a table -------------------------------------------------------------------------------


def footer(table: Table, record: Record, *, complete: bool = True) -> str:
    """Return one line on what the numbers are and where they are from, `complete` with what is absent."""
    runs = [run for entry in record.values() for run in entry["runs"]]
    tests = [test for run in runs for test in run["tests"].values()]
    machines = sorted({run["machine"] for run in runs if run["machine"]})
    devices = sorted({test["device"].replace("1 threads", "1 thread") for test in tests})
    versions = sorted({test["versions"]["torch"] for test in tests})
    tasks = sorted({test["tasks"] for test in tests})
    parts = [
        f"{' or '.join(f'{count:,}' for count in tasks)} test tasks" if tasks else "",
        "mean over seeds, ± its 95 % interval over tasks, in brackets the lowest and the highest seed",
        "several seeds without an interval: single tasks were not recorded" * lacks_interval(table, record),
        "" if table.accuracy else "after a semicolon the mean without diverged tasks, counted over all seeds",
        "`best.pt`, chosen on validation tasks",
        "; ".join([*machines, *devices]),
        f"torch {', '.join(versions)}" if versions else "",
    ]
    absent = [cell.method for cell in table.trained if cell.method not in record]
    text = "; ".join(part for part in parts if part) + "."
    return text + f" Not run: {', '.join(absent)}." * bool(absent and complete)


def lacks_interval(table: Table, record: Record) -> bool:
    """Return whether an interval is missing where several seeds were tested."""
    numbers = [
        number(table, column, entry) for entry in record.values() for column in table.columns if column.test
    ]
    return any(n and len(n.means) > 1 and math.isfinite(n.mean) and math.isnan(n.interval) for n in numbers)


def commands(table: Table, record: Record) -> list[str]:
    """Return the commands of the first seed's runs, and of the tests of one (that with baselines, if any)."""
    cells = [cell for cell in table.trained if cell.method in record]
    first = [record[cell.method]["runs"][0] for cell in cells]
    lines = [f"{run['trained_by']} --run-name {table.name}-{run['name']}" for run in first]
    number_of_tested = next((n for n, cell in enumerate(cells) if cell.baselines), 0)
    tested = f"checkpoints/{table.name}-{first[number_of_tested]['name']}"
    evaluate = f"python main.py --eval --load {tested}"
    for test in first[number_of_tested]["tests"].values():
        own = "--eval-dataset" not in test["flags"]
        lines.append(
            f"{evaluate} {test['flags']}" + " --baselines" * (own and cells[number_of_tested].baselines)
        )
    return lines


# ---- rows on other pages -------------------------------------------------------------------------

EXCERPT_STEPS, EXCERPT_SHOTS = (1, 5, 10), (5, 10)


def excerpts_on(page: str) -> list[tuple[str, str, list[str]]]:
    """Return mark, table and methods of each place of a page for rows of a table of curves."""
    marks = re.findall(r"<!-- (([\w-]+): (.*?)) -->", page)
    return [(mark, name, methods.split("; ")) for mark, name, methods in marks if name in TABLES]


def excerpt(table: Table, record: Record, methods: Sequence[str]) -> str:
    """Return the rows of some methods on curves after 1, 5 and 10 steps, and a line on what they are."""
    columns, rows = curve_columns(EXCERPT_STEPS, EXCERPT_SHOTS), []
    for method in methods:
        entry, cell = record[method], table.cell(method)
        numbers = [number(table, column, entry) for column in columns]
        trained = entry["runs"][0]["tests"]["K = 5"]["test_steps"]
        texts = ["" if value is None else value.text(table.digits) for value in numbers]
        rows.append([method, *texts, "" if cell.baseline_of else str(trained), str(len(entry["runs"]))])
    shown = {method: record[method] for method in methods}
    head = ["", *(column.title for column in columns), "trained for", "seeds"]
    return f"{markdown(head, rows)}\n\n{footer(table, shown, complete=False)}\n"

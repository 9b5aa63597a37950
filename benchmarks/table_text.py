"""Tables in Markdown, from the records of reproduce.py. Pure functions."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain

from harness import markdown
from tables import README, TABLES, Record, Table, slug

from evaluation.tables import Spread, format_decimal, plain_values

FAR_ENOUGH = 0.25  # of the planned iterations: shorter runs are in their own table alone


def find_row(table: Table, title: str, entry: Record) -> Record | None:
    """Return a method's numbers in a column, over its runs; None if they have not been measured."""
    test, steps, normalisation = table.columns[title]
    if not test:
        losses = [run["final_training_loss"]["mean"] for run in entry["runs"] if run["final_training_loss"]]
        values = [math.nan if loss is None else loss for loss in losses]
        return plain_values(asdict(Spread.over(values))) if values else None
    measured = entry["tests"].get(test, {"results": {}})
    rows = {row["steps"]: row for row in measured["results"].get(normalisation, ())}
    alone = rows.get(0) if len(rows) == 1 else None  # it does not adapt
    return rows.get(steps or measured.get("test_steps"), alone)


def quote(table: Table, row: Record) -> str:
    """Return the mean over seeds, its interval over tasks, the lowest and the highest seed.

    After a semicolon comes the mean without diverged tasks, if there are any.
    """

    def text(value: float | None, interval: float | None = None) -> str:
        if value is None:
            return "not finite"
        scale, digits = (100, 2) if table.is_accuracy else (1, 3)
        if value:  # two digits that are not 0
            digits = max(digits, 1 - math.floor(math.log10(abs(scale * value))))
        ends = "" if interval is None else f" ±{format_decimal(scale * interval, digits)}"
        return format_decimal(scale * value, digits) + ends

    words = text(row["mean"], row.get("interval_95_over_tasks"))
    if row["runs"] > 1 and row["lowest"] is not None:
        words += f" ({text(row['lowest'])} to {text(row['highest'])})"
    if row.get("diverged_tasks") and "mean_without_diverged" in row:
        without = text(row["mean_without_diverged"], row["interval_95_without_diverged"])
        words += f"; {without} without {row['diverged_tasks']:,} diverged"
    return words


def format_tables(
    table: Table, methods: Mapping[str, Record], titles: Sequence[str], *, with_published: bool = False
) -> list[str]:
    """Return the numbers of methods in these columns and their seeds, in tables of a few columns each.

    Published numbers stand below ours.
    """
    tables = []
    for begin in range(0, len(titles), table.across):
        part = titles[begin : begin + table.across]
        group = [title for title in part if any(find_row(table, title, entry) for entry in methods.values())]
        lines = []
        for method, entry in methods.items():
            rows = [find_row(table, title, entry) for title in group]
            if any(rows):
                seeds = str(len(entry["runs"])) + " (single run)" * (len(entry["runs"]) == 1)
                lines.append([f"**{method}**", *(quote(table, row) if row else "" for row in rows), seeds])
            published = table.published_numbers(method)
            if with_published and published.keys() & {*group}:
                source = f"*{table.published[method]['source']}*"
                lines.append([source, *(published.get(title, "") for title in group), ""])
        tables += [markdown(["", *group, "seeds"], lines) + "\n"] if lines else []
    return tables


# ---- a whole table -------------------------------------------------------------------------------


def table_text(table: Table, records: Mapping[str, Record]) -> str:
    """Return our numbers with the published ones below, their runs, and the commands."""
    ordered = {m: records[m] for m in (*table.methods, *table.baselines) if m in records}
    trained = {method: entry for method, entry in ordered.items() if method in table.methods}
    absent = "; ".join(method for method in table.methods if method not in records)
    lines, commands = [], []
    for method, entry in trained.items():
        runs = entry["runs"]
        times = [run["seconds"] / 60 for run in runs if run.get("seconds")]
        time = f"{statistics.mean(times):.1f} min" if times else "not recorded"
        best = format_range(run["best_iteration"] or run["iteration"] for run in runs)
        lines.append([f"**{method}**", describe_progress(runs) + describe_failures(runs), best, time])
        seeds = format_seeds([run["seed"] for run in runs])
        commands.append(f"python main.py {entry['flags']} {seeds} --run-name {table.name}-{slug(method)}")
    tested = table.measured_with if table.measured_with in trained else next(iter(trained))
    evaluate = f"python main.py --eval --load checkpoints/{table.name}-{slug(tested)}"
    commands += [f"{evaluate} {test['flags']}" for test in trained[tested]["tests"].values()]
    parts = [
        f"### {table.title}\n",
        *format_tables(table, ordered, [*table.columns], with_published=True),
        markdown(["", "iterations", "best at", "time of a run"], lines) + "\n",
        footer(table, records) + f" Not run: {absent}." * bool(absent) + "\n",
        "<details><summary>Commands</summary>\n",
        *("```sh", *commands, "```\n\n</details>\n"),
    ]
    return "\n".join(parts)


def format_seeds(seeds: Sequence[int]) -> str:
    """Return the flag of these seeds, in ascending order."""
    first, last = seeds[0], seeds[-1]
    if first == last:
        return f"--seed {first}"
    is_range = len(seeds) == last - first + 1
    return f"--seeds {first}-{last}" if is_range else f"--seeds {','.join(map(str, seeds))}"


def format_range(numbers: Iterable[int]) -> str:
    low, *_, high = sorted(numbers) * 2
    return f"{low:,}" + f" to {high:,}" * (low < high)


def are_unfinished(runs: Sequence[Record]) -> bool:
    return any(run["iteration"] < run["iterations"] for run in runs)


def describe_progress(runs: Sequence[Record]) -> str:
    """Return the iterations of the runs, and of how many if they are not finished."""
    planned = f" of {runs[0]['iterations']:,}" * are_unfinished(runs)
    return format_range(run["iteration"] for run in runs) + planned


def describe_failures(runs: Sequence[Record]) -> str:
    """Return words for runs that ended early at non-finite numbers."""
    failed = sum(run["failure"] is not None for run in runs)
    return f", ended by non-finite numbers in {failed} of {len(runs)}" * bool(failed)


def footer(table: Table, record: Mapping[str, Record]) -> str:
    """Return one line on what the numbers are and where they are from."""
    tests = [test for entry in record.values() for test in entry["tests"].values()]
    machines = {run["machine"] for entry in record.values() for run in entry["runs"] if run.get("machine")}
    versions: dict[str, set[str]] = defaultdict(set)  # of PyTorch, by device
    for condition in chain(*(test["conditions"] for test in tests)):
        device, _, words = condition.partition(", torch ")  # words: the version, and whether it was compiled
        versions[device].add(words.partition(",")[0])
    parts = [
        f"{' or '.join(f'{n:,}' for n in sorted({test['tasks'] for test in tests}))} test tasks",
        "mean over seeds, ± its 95 % interval over tasks, in brackets the lowest and the highest seed",
        *["after a semicolon the mean without diverged tasks"] * (not table.is_accuracy),
        "`best.pt`, chosen on validation tasks",
        *sorted(machines),
        *(f"{device}, torch {' or '.join(sorted(versions[device]))}" for device in sorted(versions)),
    ]
    return "; ".join(parts) + "."


# ---- published numbers ---------------------------------------------------------------------------


def judge(table: Table, published: str, row: Record, runs: Sequence[Record]) -> str:
    """Return how far our mean over all tasks is from a published number: all seeds, finished, *meet* it."""
    if row["mean"] is None:
        return "not met, not finite"
    scale, sign = (100, 1) if table.is_accuracy else (1, -1)
    incomplete = are_unfinished(runs) or row["runs"] < table.seeds
    gap = sign * (float(published.split()[0]) - scale * row["mean"])  # above 0: ours falls short
    if gap <= 0:
        by = "a single run" if row["runs"] == 1 else f"{row['runs']} seeds of {table.seeds}"
        return f"reached by {by}" if incomplete else "**met**"
    words = f"{'short' if incomplete else 'not met,'} by {format_decimal(gap, 2 if table.is_accuracy else 3)}"
    return words + ", within its interval" * (gap <= scale * (row.get("interval_95_over_tasks") or 0))


def summary(records: Mapping[str, Mapping[str, Record]], chosen: Sequence[tuple[str, str, str]] = ()) -> str:
    """Return one table of these published numbers, or of all whose runs are far enough."""
    keys = chosen or [
        (t.name, m, title) for t in TABLES.values() for m in t.methods for title in t.published_numbers(m)
    ]
    rows = []
    for name, method, title in keys:
        table, entry = TABLES[name], records.get(name, {}).get(method)
        row = entry and find_row(table, title, entry)
        if not entry or not row or any(r["iteration"] < FAR_ENOUGH * r["iterations"] for r in entry["runs"]):
            continue
        text, runs = table.published_numbers(method)[title], entry["runs"]
        words = judge(table, text, row, runs)
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else "single run"
        details = [seeds] * (not words.startswith("reached"))  # which has them
        details += [f"{describe_progress(runs)} iterations{describe_failures(runs)}"] * are_unfinished(runs)
        words += f" ({', '.join(details)})" * bool(details)
        words = "; ".join([words, *filter(None, [table.published[method].get("note")])])
        family = table.title.partition(":")[0].partition(", accuracy")[0]
        rows.append([f"{family}, {method}", title, text, quote(table, row), words])
    return markdown(["", "", "published", "ours", ""], rows) + "\n"


# ---- on pages ------------------------------------------------------------------------------------


def render_marks(page: str, records: Mapping[str, Mapping[str, Record]]) -> dict[str, str]:
    """Return the text that belongs below each mark of a page: a table, rows of one, or published numbers.

    Marks are `<!-- TABLE -->`, `<!-- TABLE: METHOD; METHOD -->` (of curves, with 5 and 10 points),
    `<!-- published -->` and `<!-- published: README -->`.
    """
    texts = {}
    for mark in re.findall(r"<!-- (\w[^/]*?) -->\n", page):
        name, _, methods = mark.partition(": ")
        if name == "published":
            texts[mark] = summary(records, README if methods else ())
        elif name in records and not methods:
            texts[mark] = table_text(TABLES[name], records[name])
            if TABLES[name].has_picture(records[name]):
                texts[mark] += f"\n![{TABLES[name].title}](../benchmarks/results/reproduce/{name}.png)\n"
        elif name in records:
            shown = {method: records[name][method] for method in methods.split("; ")}
            titles = [title for title, column in TABLES[name].columns.items() if column.test != "K = 20"]
            tables = format_tables(TABLES[name], shown, titles)
            texts[mark] = "\n".join([*tables, f"{footer(TABLES[name], shown)}\n"])
    return texts

"""The records of reproduce.py as text and as a picture, for the pages."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from harness import markdown
from matplotlib.ticker import NullFormatter
from tables import README, TABLES, Record, Table

from evaluation import style
from evaluation.tables import Spread, format_decimal, plain_values

FAR_ENOUGH = 0.25  # of the planned iterations: shorter runs are in their own table alone

# ---- numbers -------------------------------------------------------------------------------------


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


def format_range(numbers: Iterable[int]) -> str:
    low, *_, high = sorted(numbers) * 2
    return f"{low:,}" + f" to {high:,}" * (low < high)


def are_unfinished(runs: Sequence[Record]) -> bool:
    return any(run["iteration"] < run["iterations"] for run in runs)


def describe_progress(runs: Sequence[Record]) -> str:
    """Return the iterations of the runs: of how many if they are not finished, and whether some failed."""
    words = format_range(run["iteration"] for run in runs)
    words += f" of {runs[0]['iterations']:,}" * are_unfinished(runs) + " iterations"
    failed = sum(run["failure"] is not None for run in runs)
    return words + f", ended by non-finite numbers in {failed} of {len(runs)}" * bool(failed)


def judge(table: Table, published: str, row: Record, runs: Sequence[Record]) -> str:
    """Return how far our mean over all tasks is from a published number: all seeds, finished, *meet* it."""
    number, unfinished = "a single run" if len(runs) == 1 else f"{len(runs)} seeds", are_unfinished(runs)
    about = number + f" of {table.seeds}" * (1 < len(runs) < table.seeds)
    about += f", {describe_progress(runs)}" * unfinished
    if row["mean"] is None:
        return f"not met, not finite ({about})"
    scale, sign, digits = (100, 1, 2) if table.is_accuracy else (1, -1, 3)
    incomplete = unfinished or len(runs) < table.seeds
    gap = sign * (float(published.split()[0]) - scale * row["mean"])  # above 0: ours falls short
    words = "reached" if incomplete else "**met**"
    if gap > 0:
        words = f"{'short' if incomplete else 'not met,'} by {format_decimal(gap, digits)}"
        words += ", within its interval" * (gap <= scale * (row.get("interval_95_over_tasks") or 0))
    return f"{words} ({about})"


# ---- tables --------------------------------------------------------------------------------------


def format_tables(table: Table, records: Mapping[str, Record], titles: Sequence[str]) -> list[str]:
    """Return the numbers of methods, above the published ones, in tables of a few columns each."""
    tables = []
    for begin in range(0, len(titles), table.across):
        part = titles[begin : begin + table.across]
        group = [title for title in part if any(find_row(table, title, entry) for entry in records.values())]
        lines = []
        for method, entry in records.items():
            cells = [quote(table, row) if (row := find_row(table, t, entry)) else "" for t in group]
            lines += [[f"**{method}**", *cells, str(len(entry["runs"]))]] * any(cells)
            numbers = [table.published_numbers(method).get(title, "") for title in group]
            if any(numbers):
                lines.append([f"*{table.published[method]['source']}*", *numbers, ""])
        tables += [markdown(["", *group, "seeds"], lines) + "\n"] * bool(lines)
    return tables


def describe_tests(table: Table, records: Mapping[str, Record]) -> str:
    """Return one line on what the numbers are and where they are from."""
    tests = [test for entry in records.values() for test in entry["tests"].values()]
    parts = [
        f"{' or '.join(f'{n:,}' for n in sorted({test['tasks'] for test in tests}))} test tasks",
        "mean over seeds, ± its 95 % interval over tasks (the lowest to the highest seed)",
        *["after a semicolon the mean without diverged tasks"] * (not table.is_accuracy),
        "`best.pt`, chosen on validation tasks",
        *sorted({run["machine"] for e in records.values() for run in e["runs"] if run.get("machine")}),
        *sorted({re.sub(r", (un)?compiled", "", words) for test in tests for words in test["conditions"]}),
    ]
    return "; ".join(parts) + "."


def table_text(table: Table, records: Mapping[str, Record]) -> str:
    """Return our numbers with the published ones below, and the runs with their flags."""
    lines = []
    for method, entry in records.items():
        times = [run["seconds"] / 60 for run in entry["runs"] if run.get("seconds")]
        time = f"{statistics.mean(times):.1f} min" if times else "not recorded"
        best = format_range(run["best_iteration"] or run["iteration"] for run in entry["runs"])
        own = f"`{entry['flags'].removeprefix(table.flags).strip()}`"
        line = [f"**{method}**", describe_progress(entry["runs"]), best, time, own]
        lines += [line] * (method in table.methods)
    tests = " or ".join(f"`{flags}`" for flags in table.tests.values())
    absent = "; ".join(method for method in table.methods if method not in records)
    parts = [
        f"### {table.title}\n",
        *format_tables(table, records, [*table.columns]),
        describe_tests(table, records) + f" Not run: {absent}." * bool(absent) + "\n",
        markdown(["", "trained for", "best at", "time of a run", "flags"], lines) + "\n",
        f"`python benchmarks/reproduce.py {table.name}` trains with `python main.py {table.flags} --seed 0`,",
        f"the flags of a row and further seeds, and tests with `python main.py --eval` and {tests}."
        + f" The baselines are those of **{table.measured_with}** (`--baselines`)." * bool(table.baselines)
        + "\n",
    ]
    return "\n".join(parts)


def summary(records: Mapping[str, Mapping[str, Record]], chosen: Sequence[tuple[str, str, str]] = ()) -> str:
    """Return one table of these published numbers, or of all whose runs are far enough."""
    keys = chosen or [
        (t.name, m, title) for t in TABLES.values() for m in t.methods for title in t.published_numbers(m)
    ]
    rows = []
    for name, method, title in keys:
        table, entry = TABLES[name], records.get(name, {}).get(method)
        row = entry and find_row(table, title, entry)
        if entry and row and all(r["iteration"] >= FAR_ENOUGH * r["iterations"] for r in entry["runs"]):
            text, note = table.published_numbers(method)[title], table.published[method].get("note")
            words = judge(table, text, row, entry["runs"]) + f"; {note}" * bool(note)
            family = table.title.partition(":")[0].partition(", accuracy")[0]
            rows.append([f"{family}, {method}", title, text, quote(table, row), words])
    return markdown(["", "", "published", "ours", ""], rows) + "\n"


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
        elif name in records and methods:
            shown = {method: records[name][method] for method in methods.split("; ")}
            titles = [title for title, column in TABLES[name].columns.items() if column.test != "K = 20"]
            tables = format_tables(TABLES[name], shown, titles)
            texts[mark] = "\n".join([*tables, f"{describe_tests(TABLES[name], shown)}\n"])
        elif name in records:
            picture = f"\n![{TABLES[name].title}](../benchmarks/results/reproduce/{name}.png)\n"
            texts[mark] = table_text(TABLES[name], records[name]) + picture * TABLES[name].has_picture
    return texts


# ---- the picture ---------------------------------------------------------------------------------


@style.use_style()
def write_picture(table: Table, records: Mapping[str, Record], file: Path) -> None:
    """Draw the numbers of a table by method, a panel a test; of losses those without diverged tasks.

    Bars are 95 % intervals over tasks. Unfinished runs say how far they have come.
    """
    labels = []
    for name, entry in records.items():
        done, planned = (sum(run[key] for run in entry["runs"]) for key in ("iteration", "iterations"))
        labels.append(name + f", at {100 * done / planned:.0f} %" * (done < planned))
    figure = style.new_figure(2 + 2.7 * len(table.tests), 1.6 + 0.27 * len(records), table.title)
    panels = figure.subplots(1, len(table.tests), squeeze=False, sharey=True)[0]
    scale, which = 100, ("mean", "interval_95_over_tasks")
    if not table.is_accuracy:
        scale, which = 1, ("mean_without_diverged", "interval_95_without_diverged")
    for panel, test in zip(panels, table.tests, strict=True):
        titles = [title for title, column in table.columns.items() if column.test == test]
        hollow = {"marker": "D", "markersize": 8, "fillstyle": "none"}
        if any(title in table.published_numbers(method) for title in titles for method in records):
            panel.plot([], [], color=style.GREY, linestyle="", label="published", **hollow)
        for number, title in enumerate(titles):
            look = {"color": style.curve_style(number)["color"], "linestyle": ""}
            rows = [find_row(table, title, entry) or {} for entry in records.values()]
            if any(row.get(which[0]) is not None for row in rows):
                panel.plot([], [], marker="o", label=title.rpartition(", ")[2], **look)
            for place, (method, row) in enumerate(zip(records, rows, strict=True)):
                mean, interval = (row.get(name) for name in which)
                if mean is not None:
                    panel.errorbar(scale * mean, place, xerr=scale * (interval or 0), marker="o", **look)
                if text := table.published_numbers(method).get(title):
                    value = float(text.split()[0])
                    panel.plot(value, place, **look, **hollow)
        panel.set(title=test, xlabel="accuracy (%)" if table.is_accuracy else "query MSE, without diverged")
        panel.set_ylim(len(records) - 0.5, -0.5)
        if not table.is_accuracy and panel.dataLim.x1 > 10 * panel.dataLim.x0:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_yticks(range(len(records)), labels)
    style.add_legend(figure, panels[-1])
    style.write_figure(file, figure)

"""The pictures of the papers' tables, drawn from the records that jobs.py collects: one a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cells import Column, Table
from table_text import Record, number

from evaluation import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS_SHOWN = 10
MOST_CURVES = 6  # in a panel: each has a colour of its own
MOST_PANELS = 4  # of a figure; a table with more tests has none
DECADE = 10.0  # a narrower range has a linear axis, where bands would hide each other
WINDOW = 300  # tasks in a point of the assignment's curve


def draw(table: Table, record: Record, folder: Path) -> None:
    """Write the picture of a table, unless none of its runs has been tested."""
    shows_training = any(column.test is None for column in table.columns)
    figure = learning_figure(record) if shows_training else steps_figure(table, record)
    if figure is not None:
        style.write_figure(folder / f"{table.name}.png", figure)


# ---- numbers over inner steps --------------------------------------------------------------------


def points_of(table: Table, entry: Record, test: str) -> list[tuple[int, float, float]]:
    """Return step, mean without diverged tasks and its interval, after steps with a task that has not."""
    points, tests = [], [run["tests"].get(test, {"per_step": ()}) for run in entry["runs"]]
    adapts = any(row["steps"] for tested in tests for row in tested["per_step"])
    for step in range(STEPS_SHOWN + 1) if adapts else (0,):
        value = number(table, Column("", test, step, "transductive"), entry)
        if value is not None:
            mean, interval = value.kept if value.diverged else (value.mean, value.interval)
            points += [(step, as_error(table, mean), interval)] * math.isfinite(mean)
    return points


def as_error(table: Table, value: float) -> float:
    """Return an accuracy's distance from 100 percent, of which a logarithmic axis shows small differences."""
    return max(100 - value, 0.01) if table.accuracy else value


def steps_figure(table: Table, record: Record) -> Figure | None:
    """Return the query error over inner steps, a panel for each test.

    Many methods are drawn in rows of panels, in each of which the first one is repeated. Lines are means over
    seeds, bands intervals over tasks, hollow diamonds published numbers. None if no run has been tested, or
    there are too many panels.
    """
    tests = [test.name for test in table.tests]
    curves = {(m, test): points_of(table, entry, test) for m, entry in record.items() for test in tests}
    means = [mean for points in curves.values() for _, mean, _ in points]
    if not means or len(tests) > MOST_PANELS:
        return None
    wide = max(means) >= DECADE * min(means)
    shown = [cell for cell in table.cells if any(curves.get((cell.method, test)) for test in tests)]
    groups = groups_of(*([c.method for c in shown if bool(c.baseline_of) == kind] for kind in (False, True)))
    with style.styled():
        figure = style.new_figure(3.2 * len(tests) + 1.8, 2.7 * len(groups) + 0.5)
        shape = len(groups), len(tests)
        for group, panels in zip(groups, figure.subplots(*shape, sharey=True, squeeze=False), strict=True):
            for panel, test in zip(panels, tests, strict=True):
                for position, method in enumerate(group):
                    look = style.curve_style(position) | {"markersize": 3}
                    draw_curve(panel, curves[method, test], method, look, filled=wide)
                    draw_published(panel, table, method, test, look["color"])
                panel.set(title=test, yscale="log" if wide else "linear", xlabel="inner steps")
            measure = "query error (%)" if table.accuracy else "query MSE"
            panels[0].set_ylabel(measure)
            notes = ["diamonds: published"] * any(cell.published for cell in table.cells)
            note = ";\n".join(notes + ["diverged tasks left out"] * (not table.accuracy))
            named = {n: h for p in panels for h, n in zip(*p.get_legend_handles_labels(), strict=True)}
            place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
            panels[-1].legend(named.values(), named.keys(), **place, title=note)
    return figure


def groups_of(methods: Sequence[str], baselines: Sequence[str]) -> list[list[str]]:
    """Return methods and baselines in one group or, if they are more than `MOST_CURVES`, in several.

    Each begins with the first method.
    """
    first, *others = [*methods, *baselines]
    if len(others) < MOST_CURVES:
        return [[first, *others]]
    groups = []
    for part in (methods[1:], baselines):
        number = math.ceil(len(part) / (MOST_CURVES - 1))
        size = math.ceil(len(part) / max(1, number))
        groups += [[first, *part[size * n : size * (n + 1)]] for n in range(number)]
    return groups


def draw_curve(
    panel: Axes, points: Sequence[tuple[int, float, float]], label: str, look: dict[str, Any], *, filled: bool
) -> None:
    """Draw a method's curve with its band; a method that does not adapt is a dotted line."""
    if not points:
        return
    steps, means, intervals = zip(*points, strict=True)
    if len(points) == 1:
        panel.axhline(means[0], label=label, color=look["color"], linestyle=":")
        return
    panel.plot(steps, means, label=label, **look)
    if filled:
        low = [max(m - i, 1e-9) for m, i in zip(means, intervals, strict=True)]
        high = [m + i for m, i in zip(means, intervals, strict=True)]
        panel.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)


def draw_published(panel: Axes, table: Table, method: str, test: str, color: str) -> None:
    """Draw published numbers as hollow diamonds, those without a number of steps at the right edge."""
    for column in table.columns:
        published = table.cell(method).published.get(column.title)
        if published and column.test == test and column.normalisation == "transductive":
            step = STEPS_SHOWN if column.steps is None else column.steps
            look = {"markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.6}
            panel.plot([step], [as_error(table, published.value)], "D", markersize=7, zorder=4, **look)


# ---- the assignment's learning curve -------------------------------------------------------------


def learning_figure(record: Record) -> Figure:
    """Return the first seed's training losses against training from scratch on the same tasks, if measured.

    Points are means of consecutive windows; a window far above all others leaves the picture.
    """
    with style.styled():
        figure = style.new_figure(4.6 * len(record), 3.4)
        panels = figure.subplots(1, len(record), squeeze=False, sharey=True)[0]
        losses: list[float] = []
        for panel, (method, entry) in zip(panels, record.items(), strict=True):
            run = entry["runs"][0]
            measured = next((test["curves"] for test in run["tests"].values() if test.get("curves")), {})
            curves = [("first-order MAML", windows(run["training"]))]
            curves += [(n, (c["iteration"], c["query_loss"])) for n, c in measured.items() if "scratch" in n]
            for position, (name, points) in enumerate(curves):
                look = style.curve_style(position) | {"marker": None, "linewidth": 1.0}
                panel.plot(*points, label=name, **look)
                losses += points[1]
            panel.set(title=method, yscale="log", xlabel="iteration")
        panels[0].set_ylim(top=5 * max(statistics.quantiles(losses, n=50)))
        panels[0].set_ylabel(f"query MSE, means of {WINDOW} tasks")
        style.add_legend(figure, panels[0])
    return figure


def windows(training: Record) -> tuple[list[int], list[float]]:
    """Return ends and means of consecutive windows of a curve whose points are means of shorter ones."""
    ends, losses = training["iteration"], training["query_loss"]
    size = WINDOW // ends[0]
    starts = range(0, len(ends) - size + 1, size)
    return [ends[i + size - 1] for i in starts], [statistics.mean(losses[i : i + size]) for i in starts]

"""The picture of a table: the query error over inner steps, a panel for each test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator, NullFormatter
from tables import Record, Table

from evaluation import style
from evaluation.figures import draw_curve

STEPS, IN_PANEL = 10, 6  # the most steps, and methods in a panel


def collect_points(table: Table, entry: Record, test: str) -> list[tuple[int, float, float]]:
    """Return steps, mean errors without diverged tasks, and intervals over tasks, where they are finite."""
    points = []
    results = entry["tests"].get(test, {"results": {}})["results"]
    for row in results.get("transductive", ())[: STEPS + 1]:
        mean = row["mean"] if table.is_accuracy else row["mean_without_diverged"]
        interval = row["interval_95_over_tasks" if table.is_accuracy else "interval_95_without_diverged"]
        if mean is not None:  # an accuracy's distance from 100 percent, for a logarithmic axis
            mean, scale = (max(100 - 100 * mean, 0.01), 100) if table.is_accuracy else (mean, 1)
            points.append((row["steps"], mean, scale * (interval or 0.0)))
    return points


@style.use_style()
def write_picture(table: Table, record: Mapping[str, Record], file: Path) -> None:
    """Draw methods in rows of panels, each of which begins with the first one.

    Bands are intervals over tasks, hollow diamonds published numbers; dotted methods do not adapt.
    """
    methods = [method for method in (*table.methods, *table.baselines) if method in record]
    groups = [
        [methods[0], *methods[i : i + IN_PANEL - 1]] for i in range(1, max(2, len(methods)), IN_PANEL - 1)
    ]
    figure = style.new_figure(max(5, 3.4 * len(table.tests)), 3.2 * len(groups), table.title)
    for group, part in zip(groups, figure.subfigures(len(groups), 1, squeeze=False)[:, 0], strict=True):
        panels = part.subplots(1, len(table.tests), squeeze=False, sharey=True)[0]
        for panel, test in zip(panels, table.tests, strict=True):
            for number, method in enumerate(group):
                points = collect_points(table, record[method], test)
                colour = style.curve_style(number)["color"]
                if len(points) == 1:
                    panel.axhline(points[0][1], label=method, color=colour, linestyle=":")
                elif points:
                    steps, means, intervals = zip(*points, strict=True)
                    draw_curve(panel, number, method, [(steps, means)], torch.tensor(intervals))
                for title, text in table.published_numbers(method).items():
                    column, value = table.columns[title], float(text.split()[0])
                    if column.test == test and column.normalisation == "transductive":
                        place = column.steps or STEPS, 100 - value if table.is_accuracy else value
                        panel.plot(*place, "D", color=colour, markerfacecolor="none", markersize=7)
            panel.set(title=test, xlabel="inner steps")
        panels[0].set_ylabel(f"query {'error (%)' if table.is_accuracy else 'MSE'}")
        low, high = panels[0].get_ylim()
        if not 0 < high < 2 * low:  # a logarithmic axis of less has a single label
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panels[0].yaxis.set_major_formatter("{x:g}")
            panels[0].yaxis.set_minor_formatter(NullFormatter())
        style.add_legend(part, panels[0])
    style.write_figure(file, figure)

"""The pictures of benchmarks/reproduce.py: what a table's JSON says, in light and in dark."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cells import Table  # noqa: E402

from evaluation.figures import (  # noqa: E402
    THEMES,
    Theme,
    curve_style,
    legend_below,
    new_figure,
    over_iterations,
    over_steps,
    style,
)
from evaluation.tables import write_figure  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]  # of a table, as reproduce.py writes it


def draw(table: Table, record: Record, folder: Path, checkpoint: Path | None = None) -> list[Path]:
    """Writes a table's pictures in both themes. `checkpoint`: of MAML, beside which its baselines are."""
    written = []
    for name, theme in THEMES.items():
        suffix = "" if name == "light" else f"-{name}"
        figures: dict[str, Figure | None] = {}
        if table.accuracy:
            figures[table.name] = accuracies_figure(table, record, theme)
        elif any(column.steps for column in table.columns):
            figures[table.name] = errors_figure(table, record, theme)
        if any(column.test is None for column in table.columns):
            figures[table.name] = learning_figure(table, record, theme)
        if checkpoint is not None:
            figures[f"{table.name}-fits"] = fits_figure(table, checkpoint, theme)
        for stem, figure in figures.items():
            if figure is not None:
                written.append(folder / f"{stem}{suffix}.png")
                write_figure(written[-1], figure)
    return written


# ---- errors over inner steps ---------------------------------------------------------------------


def curve(runs: Sequence[Record], test: str, steps: int) -> list[tuple[int, float, float]]:
    """Steps, mean over the seeds that have been tested, and interval over tasks; without the steps after
    which all tasks of a seed have diverged."""
    tested = [run["tests"][test]["per_step"] for run in runs if test in run["tests"]]
    found = []
    for step in range(steps + 1):
        rows = [row for of_run in tested for row in of_run if row["steps"] == step]
        values = [row["loss_without_diverged"] for row in rows]
        if values and len(values) == len(tested) and None not in values:
            intervals = [row["loss_without_diverged_interval_95"] or 0.0 for row in rows]
            found.append((step, statistics.mean(values), statistics.mean(intervals)))
    return found


DECADE = 10.0  # errors of a narrower range have a linear axis, where bands would hide each other


def look_of(table: Table, method: str, theme: Theme) -> dict[str, Any]:
    """A method's colour, line and marker: by its place in the table, also where others are not run."""
    return curve_style([cell.method for cell in table.cells].index(method), theme)


def errors_figure(table: Table, record: Record, theme: Theme) -> Figure | None:
    """Query error over inner steps, a panel a number of shots: mean over seeds, band over tasks; hollow
    diamonds are published numbers. None where no run has been tested."""
    steps = table.steps_shown
    shown = [
        point
        for found in record["methods"].values()
        for test in table.tests
        for point in curve(found["runs"], test.name, steps)
    ]
    if not shown:
        return None
    wide = max(mean for _, mean, _ in shown) >= DECADE * min(mean for _, mean, _ in shown)
    usual = statistics.median(interval for *_, interval in shown)
    with style(theme):
        figure = new_figure(3.5 * len(table.tests) + 0.4, 4.4)
        panels = figure.subplots(1, len(table.tests), sharey=True, squeeze=False)[0]
        for panel, test in zip(panels, table.tests, strict=True):
            for method, found in record["methods"].items():
                points = curve(found["runs"], test.name, steps)
                look = look_of(table, method, theme) | {"markersize": 3}
                if len(points) == 1:
                    panel.axhline(points[0][1], label=method, color=look["color"], linestyle=":")
                elif points:
                    _band(panel, points, method, look, filled=wide)
                _published(panel, table, test.name, found, look["color"], theme)
            panel.set(title=test.name, yscale="log" if wide else "linear")
            over_steps(panel)
        panels[0].set_ylabel("query MSE" if wide else f"query MSE (95 % interval over tasks: ±{usual:.2g})")
        if any(found["published"] for found in record["methods"].values()):
            _hollow(panels[0], [], [], "D", theme.grey, theme, label="published, in the method's colour")
        legend_below(figure, panels[0], columns=7)
    return figure


def _band(
    panel: Axes,
    points: Sequence[tuple[int, float, float]],
    label: str,
    look: dict[str, Any],
    *,
    filled: bool,
) -> None:
    steps, means, intervals = zip(*points, strict=True)
    panel.plot(steps, means, label=label, **look)
    if not filled:
        return
    low = [max(m - i, 1e-9) for m, i in zip(means, intervals, strict=True)]
    high = [m + i for m, i in zip(means, intervals, strict=True)]
    panel.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _published(panel: Axes, table: Table, test: str, found: Record, colour: str, theme: Theme) -> None:
    for column in table.columns:
        if column.test == test and column.title in found["published"]:
            value = found["published"][column.title]["value"]
            _hollow(panel, [column.steps or 0], [value], "D", colour, theme)


def _hollow(
    panel: Axes, x: list[float], y: list[float], marker: str, colour: str, theme: Theme, **more: Any
) -> None:
    """The mark of a published number."""
    panel.plot(
        x, y, marker=marker, markersize=7, linestyle="", zorder=4,
        markerfacecolor=theme.background, markeredgecolor=colour, markeredgewidth=1.6, **more,
    )  # fmt: skip


# ---- accuracies ----------------------------------------------------------------------------------


def accuracies_of(table: Table, found: Record) -> Iterator[tuple[int, list[float], float]]:
    """Of a method: the position of a column, each seed's accuracy in percent, the interval over tasks."""
    for at, column in enumerate(table.columns):
        values, intervals = [], []
        for run in found["runs"]:
            test = run["tests"].get(column.test, {})
            for row in test.get("per_step", []):
                if row["normalisation"] == column.normalisation and row["steps"] == test["test_steps"]:
                    values.append(100 * row["accuracy"])
                    intervals.append(100 * row["accuracy_interval_95"])
        if values:
            yield at, values, statistics.mean(intervals)


def left_end(values: Sequence[float]) -> float:
    """Where an axis of accuracies begins: at the lowest, or above a few that lie far below all others."""
    ordered = sorted(values)
    for at in range(len(ordered) // 5, 0, -1):
        if ordered[at] - ordered[at - 1] > 25:
            return ordered[at]
    return ordered[0]


def accuracies_figure(table: Table, record: Record, theme: Theme) -> Figure:
    """Left, a row a method: mean over seeds with its interval over tasks, a small mark a seed, and what was
    published as a hollow mark; what lies far below all others is an arrow with its number. Right, how far the
    runs are."""
    methods = list(record["methods"])
    with style(theme):
        figure = new_figure(11, max(3.8, 0.75 * len(methods) + 1.5))
        figure.suptitle(table.title)
        panel, progress = figure.subplots(1, 2, width_ratios=(3, 2))
        rows = len(table.columns)
        named = set()
        means = [
            statistics.mean(values)
            for found in record["methods"].values()
            for _, values, _ in accuracies_of(table, found)
        ]
        begin = left_end(means) if means else 0.0
        for line, method in enumerate(methods):
            found = record["methods"][method]
            for at, values, interval in accuracies_of(table, found):
                look = curve_style(at, theme)
                y = line + 0.7 * (at - (rows - 1) / 2) / rows
                label = table.columns[at].title
                mean = statistics.mean(values)
                inside = mean >= begin
                panel.errorbar(
                    [mean] if inside else [], [y] if inside else [], xerr=[interval] if inside else [],
                    color=look["color"], marker=look["marker"], markersize=6, capsize=2, linestyle="",
                    label=None if label in named else label,
                )  # fmt: skip
                named.add(label)
                if not inside:
                    panel.annotate(
                        f"{mean:.1f}", (0, y), (22, 0), xycoords=panel.get_yaxis_transform(),
                        textcoords="offset points", color=look["color"], va="center", fontsize="small",
                        arrowprops={"arrowstyle": "->", "color": look["color"]},
                    )  # fmt: skip
                elif len(values) > 1:
                    panel.plot(values, [y] * len(values), "|", color=look["color"], markersize=7)
                published = found["published"].get(table.columns[at].title)
                if published:
                    panel.errorbar(
                        published["value"], y - 0.35 / rows, xerr=published["interval"],
                        marker=look["marker"], markersize=6, capsize=2, color=look["color"],
                        markerfacecolor=theme.background, linestyle="",
                    )  # fmt: skip
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.5, -0.5)
        panel.set_xlabel("test accuracy (%); hollow: published")
        _progress(progress, table, record, theme)
        legend_below(figure, panel, columns=3, loc="outside lower left")
        legend_below(figure, progress, columns=3, loc="outside lower right")
    return figure


def _progress(panel: Axes, table: Table, record: Record, theme: Theme) -> None:
    """Validation errors over training, both axes logarithmic, on which a power law is a line; a hollow
    mark at the right edge is what was published."""
    from matplotlib.ticker import LogLocator

    marked = False
    for method, found in record["methods"].items():
        look = look_of(table, method, theme) | {"markersize": 4, "linewidth": 1.2}
        first = found["runs"][0]
        for run in found["runs"]:
            seen = [(i, 100 - 100 * a) for i, a in zip(*run["validation"].values(), strict=True) if a < 1]
            if seen:
                label = method if run is first else None
                panel.plot(*zip(*seen, strict=True), label=label, markevery=max(1, len(seen) // 8), **look)
        published = found["published"].get(table.columns[0].title)
        if published:
            marked = True
            _hollow(
                panel, [1.0], [100 - published["value"]], look["marker"], look["color"], theme,
                transform=panel.get_yaxis_transform(), clip_on=False,
            )  # fmt: skip
    hollow = "\nhollow: published, on test tasks"
    panel.set(xscale="log", yscale="log", xlabel="iteration", ylabel="validation error (%)" + hollow * marked)
    for axis, limits in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        narrow = limits[1] < 5 * limits[0]
        axis.set_major_locator(LogLocator(subs=range(1, 10) if narrow else (1, 2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")


# ---- the assignment's learning curve -------------------------------------------------------------


WINDOW = 300  # episodes in a point


def learning_figure(table: Table, record: Record, theme: Theme) -> Figure | None:
    """Training losses of the first seed, means of consecutive windows of episodes, against training from
    scratch on the same tasks, as far as that has been measured. A window far above all others leaves
    the picture, and says how far it goes."""
    methods = record["methods"]
    with style(theme):
        figure = new_figure(4.6 * len(methods), 3.4)
        panels = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
        tops: list[float] = []
        for panel, (method, found) in zip(panels, methods.items(), strict=True):
            own = {"first-order MAML": windows(found["runs"][0]["training"])}
            curves = own | _scratch(found)
            for number, (name, (ends, losses)) in enumerate(curves.items()):
                look = curve_style(number, theme) | {"marker": None, "linewidth": 1.0}
                panel.plot(ends, losses, label=name, **look)
            panel.set(title=method, yscale="log")
            over_iterations(panel)
            losses = [loss for _, of_curve in curves.values() for loss in of_curve]
            usual = statistics.quantiles(losses, n=50)[-1] if len(losses) > 1 else math.inf
            tops.append(5 * usual)
            for x, loss in zip(*own["first-order MAML"], strict=True):
                if loss > tops[-1]:
                    panel.annotate(
                        f"to {loss:,.0f}", (x, 1), (6, -12), xycoords=panel.get_xaxis_transform(),
                        textcoords="offset points", color=theme.grey, fontsize="small",
                    )  # fmt: skip
        panels[0].set_ylim(top=min(max(tops), panels[0].get_ylim()[1]))
        panels[0].set_ylabel(f"query MSE, means of {WINDOW} episodes")
        legend_below(figure, panels[0])
    return figure


def windows(training: Record) -> tuple[list[int], list[float]]:
    """Ends and means of consecutive windows, of a curve whose points are means of shorter ones."""
    ends, losses = training["iteration"], training["query_loss"]
    size = WINDOW // ends[0]
    starts = range(0, len(ends) - size + 1, size)
    return [ends[i + size - 1] for i in starts], [statistics.mean(losses[i : i + size]) for i in starts]


def _scratch(found: Record) -> dict[str, tuple[list[int], list[float]]]:
    """Of the first seed."""
    tests = found["runs"][0]["tests"].values()
    curves = next((test["curves"] for test in tests if test.get("curves")), {})
    return {n: (c["iteration"], c["query_loss"]) for n, c in curves.items() if "scratch" in n}


# ---- the paper's fits ----------------------------------------------------------------------------


def fits_figure(table: Table, checkpoint: Path, theme: Theme) -> Figure | None:
    """One test task with 5 and with 10 points, MAML and the pretrained network: before, after 1 and after
    10 steps (figure 2 of Finn et al. 2017)."""
    import torch

    from commands import adapt as using
    from dataset import Sinusoid
    from evaluation import meta_test as evaluation

    pretrained = checkpoint.parent / "baselines" / "pretrained"
    if not pretrained.is_dir():
        return None
    kinds = [("MAML", checkpoint, None, k) for k in (5, 10)] + [
        ("pretrained, rate 0.02", pretrained, 0.02, k) for k in (5, 10)
    ]
    with style(theme):
        figure = new_figure(11, 3.0)
        panels = figure.subplots(1, 4, sharey=True)
        for panel, (name, file, rate, shots) in zip(panels, kinds, strict=True):
            maml, parameters, _ = using.load(file, torch.zeros(1, 1))
            tasks = Sinusoid(shots=shots, queries=10)
            with maml.at_rate(rate):
                batch, outputs = evaluation.examples(
                    maml, parameters, tasks, "test", tasks=3, steps=10, normalisation="transductive"
                )
            _fit(panel, batch, outputs, theme, shown=2)
            panel.set(title=f"{name}, K = {shots}", xlabel="x")
        panels[0].set_ylabel("y")
        legend_below(figure, panels[0])
    return figure


def _fit(panel: Axes, batch: Any, outputs: Any, theme: Theme, shown: int) -> None:
    """One task of a batch; which one is the same in all panels."""
    x = batch.query_x[shown, :, 0].numpy()
    panel.plot(
        x, batch.query_y[shown, :, 0].numpy(), color=theme.grey, linewidth=3.5, alpha=0.5, label="task"
    )
    looks = ((0, ":", theme.green), (1, "--", theme.orange), (10, "-", theme.blue))
    for step, line, colour in looks:
        label = f"after {step} step{'s' * (step > 1)}" if step else "before"
        panel.plot(x, outputs[shown, step, :, 0].numpy(), line, color=colour, label=label)
    panel.scatter(
        batch.support_x[shown, :, 0].numpy(), batch.support_y[shown, :, 0].numpy(), color=theme.red, s=26,
        edgecolor=theme.background, linewidth=0.5, zorder=3, label="support",
    )  # fmt: skip

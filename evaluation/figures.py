"""Pictures of results over inner steps, of learning curves, and of paired differences.

A curve is the mean of a setting's runs in a band: from the lowest to the highest run or, where a setting has
one run, the 95 % intervals over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from evaluation import style
from evaluation.examples import Examples, draw_fits
from evaluation.paired import Side, difference
from evaluation.tables import ALL, Caption, Curve, StepResults, write_json

LEAST_ERROR = 0.01  # percent, drawn in place of 0, which a logarithmic axis lacks
MOST_MARKED = 100  # points of a curve that have markers
MOST_DRAWN = 500  # points of a training curve in its picture
Curves = Mapping[str, Sequence[Curve]]  # curves of a setting's runs, by label


def draw_curve(
    panel: Axes, number: int, label: str, runs: Sequence[Curve], interval: Tensor | None = None
) -> None:
    """Draw the mean of the runs at the points that all have, in a band with this half width, `[points]`."""
    points = [dict(zip(*run, strict=True)) for run in runs]
    x = [point for point in points[0] if all(point in other for other in points)]
    if not x:
        panel.plot([], [], label=f"{label}: not recorded", **style.curve_style(number))
        return
    y = torch.tensor([[values[point] for point in x] for values in points], dtype=torch.float64)
    mean = y.mean(0)
    low, high = (y.amin(0), y.amax(0)) if interval is None else (mean - interval, mean + interval)
    look = style.curve_style(number) | ({"marker": ""} if len(x) > MOST_MARKED else {})
    panel.plot(x, mean.numpy(), label=label, **look)
    panel.fill_between(x, low.numpy(), high.numpy(), color=look["color"], alpha=0.15, linewidth=0)


def window_means(curve: Curve) -> tuple[Curve, int]:
    """Return means over windows of a long curve's points, at their last ones, and the points of a window.

    Points that are not numbers are left out.
    """
    x, y = curve
    size = math.ceil(len(x) / MOST_DRAWN) or 1
    starts = range(0, len(x), size)
    windows = [[value for value in y[start : start + size] if math.isfinite(value)] for start in starts]
    means = [sum(window) / len(window) if window else math.nan for window in windows]
    return ([x[min(start + size, len(x)) - 1] for start in starts], means), size


def draw_learning(panel: Axes, curves: Curves, measure: str, numbers: Sequence[int] = ()) -> None:
    """Draw a measure over iterations; `numbers`: those of the curves' styles, from 0 unless given."""
    for number, (label, runs) in zip(numbers or range(len(curves)), curves.items(), strict=True):
        draw_curve(panel, number, label, runs)
    style.label_axes(panel, "iteration", measure)
    panel.set_xlim(left=0)


def draw_results(
    panel: Axes, results: Mapping[str, StepResults], caption: Caption, marks: Mapping[int, str]
) -> None:
    """Draw results over inner steps, some of which have marks; one that is not adapted is a horizontal line.

    Of an accuracy the error is drawn, whose axis shows what happens near 100 %.
    """
    measure = next(iter(results.values())).measure(caption.loss_name)
    is_accuracy, alone = measure == "accuracy", any(p.kept_means.shape[1] == 1 for p in results.values())
    errors = [100 * (1 - part.kept_means).nan_to_num(0.0).max().item() for part in results.values()]
    least = LEAST_ERROR if max(errors) > 2 * LEAST_ERROR else 0.0
    for number, (name, part) in enumerate(results.items()):
        runs = part.kept_means.shape[1]
        mean = "mean" + f" of {runs}" * (runs > 1)
        label = mean if name == ALL else name + f": {mean}" * (runs > 1)
        if part.is_loss and any(part.diverged):
            label += f"\n(without {max(part.diverged)} that diverged)"
        if any(part.undefined):
            label += f"\n(without {max(part.undefined)} for which it is undefined)"
        means, intervals = part.kept_means.T, part.kept_intervals
        if is_accuracy:
            means, intervals = 100 * (1 - means), 100 * intervals
        if len(intervals) == 1:
            panel.axhline(means.mean().item(), color=style.GREY, linestyle="--", label=label)
        else:
            means = means.clamp(min=least) if is_accuracy else means
            curves = [(range(len(run)), run) for run in means.tolist()]
            draw_curve(panel, number, label, curves, intervals if alone else None)
    drawn = "error (%)" if is_accuracy else measure
    style.label_axes(panel, "inner steps", f"query {drawn}", wide=2 if is_accuracy else 10)
    if is_accuracy and not least:
        panel.set_ylim(bottom=0.0)
    band = "95 % interval" if alone else "range of the runs"
    panel.fill_between([], [], color=style.GREY, alpha=0.25, linewidth=0, label=band)
    for (step, label), line in zip(marks.items(), (":", "-."), strict=False):
        panel.axvline(step, color=style.GREY, linestyle=line, label=label, zorder=1)


@style.use_style()
def results_figure(
    results: Mapping[str, StepResults],
    caption: Caption,
    *,
    fits: Examples | None = None,
    learning: Curves | None = None,
    learning_measure: str = "",
) -> Figure:
    """Draw results over inner steps and, to the right, example fits or losses while training.

    The first curve of `learning` is the first result's, and looks like it; the others have their own looks.
    """
    others = len(fits.outputs) if fits else int(bool(learning))
    widths = [4.2, *[2.6 if fits else 3.8] * others]
    figure = style.new_figure(sum(widths), 3.4, caption.title)
    panel, *rest = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    draw_results(panel, results, caption, caption.marks)
    if learning:
        looks = sum(len(part.kept_means) > 1 for part in results.values())
        labels = ["_", *list(learning)[1:]]  # the legend has the first
        curves = dict(zip(labels, learning.values(), strict=True))
        draw_learning(rest[0], curves, learning_measure, (0, *range(looks, looks + len(labels) - 1)))
    if fits:
        draw_fits(rest, fits)
    style.add_legend(figure, panel, *rest[:1])
    return figure


@style.use_style()
def learning_figure(curves: Curves, measure: str, title: str = "", *, zoom: bool = False) -> Figure:
    """Draw learning curves, by label; with `zoom`, the axis has the range of what follows the beginning."""
    figure = style.new_figure(5.4, 3.6, title)
    panel = figure.subplots()
    draw_learning(panel, curves, measure)
    if zoom:
        style.zoom(panel)
    style.add_legend(figure, panel)
    return figure


@style.use_style()
def comparison_figure(sides: Sequence[Side], caption: Caption) -> Figure:
    """Draw validation over iterations, the result over inner steps and, below, the paired differences.

    A side has one colour and marker in all panels.
    """
    measure = sides[0].results.measure(caption.loss_name)
    heights = [3.1, 0.8 + 0.3 * len(sides)]
    figure = style.new_figure(9.0, sum(heights), caption.title)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    learning, steps = top.subplots(1, 2)
    curves = {side.name: list(side.curves.values()) for side in sides}
    draw_learning(learning, curves, f"validation {measure}")
    marks = caption.marks if len({side.steps for side in sides}) == 1 else {}
    draw_results(steps, {side.name: side.results for side in sides}, caption, marks)
    style.add_legend(top, steps)
    panel = bottom.subplots()
    panel.axvline(0.0, color=style.GREY, linestyle=":")
    for number, side in enumerate(sides):
        look, paired = style.curve_style(number), difference(side, sides[0])
        points = {"fmt": look["marker"], "color": look["color"], "capsize": 3, "markersize": 6}
        panel.errorbar([paired.mean], [number], xerr=[paired.interval_95_over_tasks], **points)
        if len(paired.by_seed) > 1 and number:
            seeds = list(paired.by_seed.values())
            panel.plot(seeds, [number + 0.25] * len(seeds), "o", color=look["color"], markersize=2.5)
    panel.set_yticks(range(len(sides)), [side.name for side in sides])
    better = "right" if sides[0].results.more_is_better else "left"
    label = f"{measure}: paired difference to the first, 95 % interval over tasks (better: {better})"
    panel.set(ylim=(len(sides) - 0.5, -0.5), xlabel=label)
    return figure


def write_results(stem: Path | str, record: Mapping[str, Any], figure: Figure, **more: Figure) -> str:
    """Write a record as JSON, its picture, and more pictures by name; return the line that says so."""
    write_json(Path(f"{stem}.json"), record)
    pictures = {".png": figure} | {f"-{name}.png": picture for name, picture in more.items()}
    for ending, picture in pictures.items():
        style.write_figure(Path(f"{stem}{ending}"), picture)
    return f"Written: {stem}{' and '.join(', '.join(['.json', *pictures]).rsplit(', ', 1))}"

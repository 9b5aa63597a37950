"""Pictures: one style, in two themes, and a function for each figure. Nothing here writes files.

Functions take plain numbers and CPU tensors, and give a matplotlib figure; matplotlib is imported when used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common.batch import TaskBatch
from evaluation.features import moved, nearest_mean_accuracy, on_components
from evaluation.meta_test import Evaluation
from evaluation.tables import Words, of_the_rest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from commands.adapt import Task


# ---- the style ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. Those of the palette are Okabe and Ito's, made lighter or darker until each has a
    contrast of 3 : 1 to the background, and colour-blind readers still can tell them apart."""

    background: str
    ink: str  # text, axes
    grid: str
    grey: str  # what is there for comparison
    blue: str
    orange: str
    green: str
    red: str
    purple: str
    sky: str

    @property
    def palette(self) -> tuple[str, ...]:
        """Colours of curves, in this order."""
        return (self.blue, self.orange, self.green, self.red, self.purple, self.sky)


LIGHT = Theme(
    background="#FFFFFF", ink="#1A1A1A", grid="#E3E3E3", grey="#767676", blue="#005A9C", orange="#BF8500",
    green="#008F6B", red="#B83A00", purple="#C565A0", sky="#3399DD",
)  # fmt: skip
DARK = Theme(
    background="#0D1117", ink="#E6EDF3", grid="#2A3038", grey="#9AA0A6", blue="#3D8BDB", orange="#F0AE1A",
    green="#12B58A", red="#E8602C", purple="#E39BC6", sky="#8CD3FF",
)  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}

DASHES = ["-", "--", "-.", ":"]  # beside colours, for those who do not see these
MARKERS = "osD^vPX"  # as many as have no common divisor with the palette
WIDE = 50.0  # between the largest and the smallest value of a loss
SMALL = 8  # points: what stands in a legend, or beside an image
RIGHT, WRONG = "✓", "✗"


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 10,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "legend.facecolor": theme.background,  # that of the panel: words can be read where a line passes
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "lines.linewidth": 1.6,
        "lines.markersize": 3.5,
    }


@contextmanager
def style(theme: Theme = LIGHT) -> Iterator[Theme]:
    """Within it, figures are made in this theme."""
    import matplotlib

    with matplotlib.rc_context(_settings(theme)):
        yield theme


def new_figure(width: float, height: float) -> Figure:
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curve_style(number: int, theme: Theme) -> dict[str, Any]:
    """Colour, line and marker of a curve of several: colours come again with other lines."""
    palette = theme.palette
    return {
        "color": palette[number % len(palette)],
        "linestyle": DASHES[number // len(palette) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


Place = Literal["outside lower left", "outside lower center", "outside lower right"]


def legend_below(figure: Figure, panel: Axes, columns: int = 6, loc: Place = "outside lower center") -> None:
    """One for all panels, or left and right one of each; outside of them: it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc=loc, ncols=min(columns, len(labels)))


def over_iterations(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("iteration")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def over_steps(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("inner steps")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def measured(panel: Axes, name: str, *, accuracy: bool) -> None:
    """The axis of an accuracy, up to 100 %, or of a loss: from 0, or logarithmic where the panel's lines have
    a wide range."""
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    panel.set_ylabel(f"{name} (%)" if accuracy else name)
    if accuracy:
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
        panel.set_ylim(top=1.0)
        return
    drawn = [float(y) for line in panel.lines for y in np.asarray(line.get_ydata()) if 0 < y < math.inf]
    if drawn and max(drawn) > WIDE * min(drawn):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0.0)


# ---- regression: curves before and after ----------------------------------------------------


def fits_figure(
    batch: TaskBatch, outputs: Tensor, steps: Sequence[int], title: str, theme: Theme = LIGHT
) -> Figure:
    """Curves before and after adaptation, a panel a task.

    `batch` has a dense query; `outputs` is `[tasks, all steps + 1, points, 1]`, of which `steps` are
    shown, three at most.
    """
    with style(theme):
        tasks = len(outputs)
        figure = new_figure(2.6 * tasks + 0.3, 2.8)
        figure.suptitle(title)
        panels = figure.subplots(1, tasks, squeeze=False)[0]
        _draw_fits(panels, batch, outputs, steps, theme)
        legend_below(figure, panels[0])
    return figure


def _draw_fits(
    panels: Sequence[Axes], batch: TaskBatch, outputs: Tensor, steps: Sequence[int], theme: Theme
) -> None:
    kinds = [(":", theme.green), ("--", theme.orange), ("-", theme.blue)]
    kinds = [kinds[0], *kinds[4 - len(steps) :]]  # the first is before adaptation, the last the solid one
    for task, panel in enumerate(panels):
        x = batch.query_x[task, :, 0].numpy()
        truth = batch.query_y[task, :, 0].numpy()
        panel.plot(x, truth, color=theme.grey, linewidth=3.5, alpha=0.5, label="task")
        for step, (line, colour) in zip(steps, kinds, strict=True):
            panel.plot(x, outputs[task, step, :, 0].numpy(), line, color=colour, label=_after(step))
        support_x, support_y = batch.support_x[task, :, 0].numpy(), batch.support_y[task, :, 0].numpy()
        panel.scatter(
            support_x, support_y, color=theme.red, edgecolor=theme.background, linewidth=0.5, s=26, zorder=3,
            label="support",
        )  # fmt: skip
        margin = 0.3 * float(truth.max() - truth.min()) + 0.5
        panel.set_ylim(float(truth.min()) - margin, float(truth.max()) + margin)
        panel.set_xlabel("x")
    panels[0].set_ylabel("y")


def _after(step: int) -> str:
    return f"after {step} step{'s' * (step > 1)}" if step else "before adaptation"


# ---- images: task sheets --------------------------------------------------------------------

MOST_WAYS, MOST_SHOTS, MOST_QUERIES = 20, 5, 3  # that a sheet shows
MOST_INCHES = 16.0  # that it is wide, where it shows more than one task
GAP = 0.12  # between images, in heights of one
TOP = 1.9  # room for titles, in heights of an image
ANSWER = 0.9  # width of an answer, in heights of an image


def tasks_figure(
    batch: TaskBatch, outputs: Tensor, *, ways: int, shots: int, queries: int, step: int, title: str,
    theme: Theme = LIGHT,
) -> Figure:  # fmt: skip
    """Image tasks side by side: a row a class, with support, query, and what was predicted for it before
    adaptation and after `step` steps. Marks and lines, not colours alone, tell right from wrong.

    `outputs` is `[tasks, all steps + 1, ways * queries, ways]`. What there is too much of is left out, and
    the picture says so; the numbers of right answers are those of all.
    """
    shown = (min(ways, MOST_WAYS), min(shots, MOST_SHOTS), min(queries, MOST_QUERIES))
    rows, supports, asked = shown
    inch = 0.5 if rows <= 10 else 0.42
    pitch = _pitch(batch.query_x[0])
    width = 0.6 + supports * pitch + asked * (0.3 + pitch + 2 * ANSWER) + 0.4
    kinds = ("classes", "support images a class", "query images a class")
    parts = zip(kinds, shown, (ways, shots, queries), strict=True)
    left_out = [f"{few} of {there} {what}" for what, few, there in parts if few < there]
    outputs = outputs[: max(1, int(MOST_INCHES / (width * inch)))]
    answers = outputs[:, [0, step]].argmax(-1).view(len(outputs), 2, ways, queries)
    with style(theme):
        figure, panel = _sheet(len(outputs) * width, rows * pitch + TOP + 0.4 * bool(left_out), inch)
        panel.text(len(outputs) * width / 2, -1.5, title, ha="center", va="center", fontsize=10)
        for task in range(len(outputs)):
            left = task * width + 0.6
            support = batch.support_x[task].unflatten(0, (ways, shots))[:rows, :supports]
            query = batch.query_x[task].unflatten(0, (ways, queries))[:rows, :asked]
            right = (answers[task] == torch.arange(ways)[:, None]).flatten(1).sum(1).tolist()
            total = ways * queries
            panel.text(left, -0.85, f"right: {right[0]} → {right[1]} of {total}", va="center")
            panel.text(left, -0.28, "support", va="center", fontsize=SMALL)
            _draw_images(panel, support, left, 0.0, theme)
            for row in range(rows):
                panel.text(left - 0.15, row * pitch + 0.5, str(row), ha="right", va="center", fontsize=SMALL)
                for shot in range(supports):
                    _frame(panel, left + shot * pitch, row * pitch, theme.grey, "-", 0.6)
            left += supports * pitch
            for number in range(asked):
                left += 0.3
                _draw_images(panel, query[:, number : number + 1], left, 0.0, theme)
                _draw_answers(panel, answers[task, :, :rows, number], left, pitch, theme)
                left += pitch + 2 * ANSWER
        if left_out:
            note = f"Shown: {', '.join(left_out)}."
            panel.text(0.6, rows * pitch + 0.2, note, va="center", fontsize=SMALL)
    return figure


def _draw_answers(panel: Axes, answers: Tensor, left: float, pitch: float, theme: Theme) -> None:
    """Beside a column of query images, what was predicted: `answers` `[before and after, classes]`."""
    columns = [left + pitch + ANSWER / 2, left + pitch + 1.5 * ANSWER]
    headings = zip((left + 0.5, *columns), ("query", "before", "after"), strict=True)
    for x, heading in headings:
        panel.text(x, -0.28, heading, ha="center", va="center", fontsize=SMALL)
    for row in range(answers.shape[1]):
        for x, answer in zip(columns, answers[:, row].tolist(), strict=True):
            right = answer == row
            panel.text(
                x, row * pitch + 0.5, f"{answer} {RIGHT if right else WRONG}", ha="center", va="center",
                fontsize=SMALL, color=theme.blue if right else theme.red,
                fontweight="normal" if right else "bold",
            )  # fmt: skip
        _frame(panel, left, row * pitch, theme.blue if right else theme.red, "-" if right else "--", 1.4)


def _sheet(width: float, height: float, inch: float, top: float = TOP) -> tuple[Figure, Axes]:
    """A figure of images and words alone, and its one panel, in units of `inch` inches, from the upper left;
    `top` of them, above 0, are for titles. Faster by far than a panel an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * inch, height * inch))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_axis_off()
    panel.set(xlim=(0, width), ylim=(height - top, -top), autoscale_on=False)
    return figure, panel


def _pitch(images: Tensor, gap: float = GAP) -> float:
    """From an image to the next one, in heights of one: room between them is whole pixels."""
    return 1 + round(gap * images.shape[-1]) / images.shape[-1]


def _draw_images(panel: Axes, images: Tensor, x: float, y: float, theme: Theme, below: float = GAP) -> None:
    """A table of images `[rows, columns, channels, height, width]` in [0, 1], each of height and width 1,
    with room between: colour, or one channel from the background (0) to the ink (1)."""
    from matplotlib.colors import to_rgb

    background, ink = (torch.tensor(to_rgb(c)) for c in (theme.background, theme.ink))
    images = images.float().clamp(0, 1)
    if images.shape[2] == 1:
        colours = (ink - background)[:, None, None]
        images = background[:, None, None] + images * colours
    rows, columns, _, height, width = images.shape
    down, right = round(below * height), round(GAP * width)
    table = background[:, None, None].repeat(rows, columns, 1, height + down, width + right)
    table[..., :height, :width] = images
    pixels = table.permute(0, 3, 1, 4, 2).reshape(rows * (height + down), columns * (width + right), 3)
    extent = (x, x + columns * (1 + right / width), y + rows * (1 + down / height), y)
    panel.imshow(pixels.numpy(), extent=extent, aspect="auto", interpolation="nearest", zorder=0)


def _frame(panel: Axes, x: float, y: float, colour: str, line: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linestyle=line, linewidth=width))


# ---- how features move ----------------------------------------------------------------------

MOST_CLASSES = 10  # in the picture of features


def class_features_figure(
    features: Tensor, labels: Tensor, support: int, title: str, theme: Theme = LIGHT
) -> Figure:
    """The features of one task's examples before adaptation and, with their ways, after it, on the two
    principal components of all of them.

    `features` `[steps + 1, examples, features]` with `labels` `[examples]`, the first `support` of them the
    support set.
    """
    shares = nearest_mean_accuracy(features, labels, support)
    before, after = (_percent(float(share)) for share in shares[[0, -1]])
    nearest = f"query nearest to its class's support mean: {before} before, {after} after"
    classes = labels.unique().tolist()[:MOST_CLASSES]
    filled = {number: (labels[:support] == number).nonzero()[:MOST_SHOTS, 0] for number in classes}
    opened = {
        number: (labels[support:] == number).nonzero()[:MOST_QUERIES, 0] + support for number in classes
    }
    shown = sum(map(len, (*filled.values(), *opened.values())))
    left_out = f"\n({shown} of {len(labels)} examples shown)" if shown < len(labels) else ""
    with style(theme):
        figure, panels, positions = _feature_panels(
            features, f"{title}\n{_moved(features)}; {nearest}{left_out}"
        )
        for step, panel in zip((0, len(features) - 1), panels, strict=True):
            for number in classes:
                colour, marker = _class_colour(number, theme), MARKERS[number % len(MARKERS)]
                ways = positions[: step + 1, torch.cat([filled[number], opened[number]])]
                _draw_ways(panel, ways, [colour] * ways.shape[1])
                x, y = positions[step, filled[number]].T.numpy()
                panel.scatter(
                    x, y, 55, marker=marker, facecolor=colour, edgecolor=theme.ink, linewidth=0.6, zorder=3,
                    label=f"class {number}",
                )  # fmt: skip
                x, y = positions[step, opened[number]].T.numpy()
                panel.scatter(x, y, 22, marker=marker, facecolor="none", edgecolor=colour, zorder=4)
        handles, names = panels[0].get_legend_handles_labels()
        words = "filled: support\nopen: query"
        figure.legend(handles, names, loc="outside right center", title=words, title_fontsize=SMALL)
    return figure


def curve_features_figure(
    features: Tensor, x: Tensor, support: int, title: str, theme: Theme = LIGHT
) -> Figure:
    """The same of a regression with one input: a curve along the query's inputs, dense and sorted.

    `x` `[examples]`, of support and query.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    with style(theme):
        figure, panels, positions = _feature_panels(features, f"{title}\n{_moved(features)}")
        scale = Normalize(float(x.min()), float(x.max()))
        colours = ScalarMappable(
            scale, LinearSegmentedColormap.from_list("x", [theme.blue, theme.purple, theme.orange])
        )
        for step, panel in zip((0, len(features) - 1), panels, strict=True):
            if step:
                before = positions[0, support:].T.numpy()
                panel.plot(*before, ":", color=theme.grey, linewidth=1.2, label="before")
                panel.legend()
            _draw_ways(panel, positions[: step + 1, :support], [theme.grey] * support)
            curve = positions[step, support:]
            pieces = list(torch.stack([curve[:-1], curve[1:]], 1).numpy())
            panel.add_collection(
                LineCollection(pieces, colors=colours.to_rgba(x[support:-1].numpy()), linewidths=2.2)
            )
            points_x, points_y = positions[step, :support].T.numpy()
            panel.scatter(
                points_x, points_y, s=30, c=colours.to_rgba(x[:support].numpy()),
                edgecolor=theme.ink, linewidth=0.8, zorder=3,
            )  # fmt: skip
        figure.colorbar(colours, ax=panels, label="x (circles: support)", aspect=30).outline.set_visible(
            False
        )
    return figure


def _class_colour(number: int, theme: Theme) -> str:
    return theme.palette[number % len(theme.palette)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _moved(features: Tensor) -> str:
    return f"moved by {_percent(moved(features))} of their spread"


def _feature_panels(features: Tensor, title: str) -> tuple[Figure, Sequence[Axes], Tensor]:
    """Two panels with the same axes, and the positions in them `[steps + 1, examples, 2]`."""
    positions, shares = on_components(features)
    steps = len(features) - 1
    figure = new_figure(8.6, 4.2)
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    low, high = positions.flatten(0, 1).amin(0), positions.flatten(0, 1).amax(0)
    room = 0.06 * (high - low) + 1e-9
    for panel, name in zip(panels, (_after(0), _after(steps)), strict=True):
        panel.set_title(name)
        panel.set_xlabel(f"component 1 ({_percent(float(shares[0]))} of the variance)")
        panel.set_xlim((low - room)[0].item(), (high + room)[0].item())
        panel.set_ylim((low - room)[1].item(), (high + room)[1].item())
    panels[0].set_ylabel(f"component 2 ({_percent(float(shares[1]))} of the variance)")
    return figure, panels, positions


def _draw_ways(panel: Axes, positions: Tensor, colours: Sequence[str]) -> None:
    """The way of each example, fainter the longer ago; `positions` `[steps + 1, examples, 2]`."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    steps = len(positions) - 1
    for step in range(steps):
        pieces = list(positions[step : step + 2].transpose(0, 1).numpy())
        faint = [to_rgba(colour, 0.35 + 0.5 * (step + 1) / steps) for colour in colours]
        panel.add_collection(LineCollection(pieces, colors=faint, linewidths=1.2, zorder=1))


# ---- results over inner steps ---------------------------------------------------------------


def evaluation_figure(
    evaluation: Evaluation,
    words: Words,
    fits: tuple[TaskBatch, Tensor, Sequence[int]] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """The result over inner steps with its 95 % interval and, for regression, example fits.

    Tasks that have diverged are left out, and counted.
    """
    with style(theme):
        tasks = len(fits[0].query_x) if fits else 0
        figure = new_figure(4.2 + 2.6 * tasks, 3.0)
        figure.suptitle(words.title)
        panels = figure.subplots(1, 1 + tasks, squeeze=False, width_ratios=[1.5] + [1] * tasks)[0]
        results = evaluation.accuracies or evaluation.losses
        for number, name in enumerate(results):
            label = name if len(results) > 1 else "mean and 95 % interval"
            diverged = int(evaluation.diverged(name).any(1).sum())
            if diverged:
                label += f"\n(without the {diverged} task{'s' * (diverged > 1)} that diverged)"
            draw_over_steps(panels[0], of_the_rest(evaluation, name), label, number, theme)
        name = "query accuracy" if evaluation.accuracies else f"query {words.loss_name}"
        measured(panels[0], name, accuracy=bool(evaluation.accuracies))
        if words.trained_steps is not None:
            trained_for(panels[0], words.trained_steps, theme)
        panels[0].legend()
        if fits:
            _draw_fits(panels[1:], *fits, theme)
            legend_below(figure, panels[1])
    return figure


def draw_over_steps(
    panel: Axes, found: Sequence[tuple[Tensor, Tensor]], label: str, number: int, theme: Theme
) -> None:
    """A curve of several: mean and half width of the interval after 0, 1, ... inner steps."""
    mean, interval = (torch.stack(part).numpy() for part in zip(*found, strict=True))
    kind = curve_style(number, theme)
    panel.plot(range(len(mean)), mean, label=label, **kind)
    panel.fill_between(
        range(len(mean)), mean - interval, mean + interval, color=kind["color"], alpha=0.2, linewidth=0
    )
    over_steps(panel)


def trained_for(panel: Axes, steps: int, theme: Theme) -> None:
    panel.axvline(steps, color=theme.grey, linestyle=":", label="trained for")


def comparison_figure(
    results: Mapping[str, Evaluation],
    normalisation: str,
    words: Words,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    theme: Theme = LIGHT,
) -> Figure:
    """Methods over inner steps and, where there are any, their losses over the iterations of training.

    Tasks that have diverged are left out.
    """
    with style(theme):
        figure = new_figure(5.5 + 4.5 * bool(curves), 3.6)
        figure.suptitle(words.title)
        panels = figure.subplots(1, 1 + bool(curves), squeeze=False)[0]
        for number, (name, evaluation) in enumerate(results.items()):
            found = of_the_rest(evaluation, normalisation)
            label = name.replace("\n", ", ")
            if len(found) == 1:
                panels[0].axhline(found[0][0].item(), color=theme.grey, linestyle="--", label=label)
            else:
                draw_over_steps(panels[0], found, label, number, theme)
        accuracies = bool(next(iter(results.values())).accuracies)
        name = "query accuracy" if accuracies else f"query {words.loss_name}"
        measured(panels[0], name, accuracy=accuracies)
        legend_below(figure, panels[0], columns=3)
        for number, (name, (ends, losses)) in enumerate(curves.items()):
            kind = curve_style(number, theme) | ({"marker": None} if len(ends) > 1 else {})
            panels[1].plot(ends, losses, linewidth=1.2, label=name, **kind)
            measured(panels[1], f"query {words.loss_name}, means of {ends[0]:,} iterations", accuracy=False)
        if curves:
            over_iterations(panels[1])
            panels[1].legend()
    return figure


def learning_figure(
    training: Mapping[str, Sequence[float]],
    validation: Mapping[str, Sequence[float]],
    *,
    measure: str,
    label: str,
    log_every: int,
    theme: Theme = LIGHT,
) -> Figure:
    """Training means over consecutive, disjoint windows of iterations, and validation."""
    with style(theme):
        figure = new_figure(6, 3.4)
        panel = figure.subplots()
        window = f"training, means of {log_every:,} iteration{'s' * (log_every > 1)}"
        panel.plot(training["iteration"], training[measure], color=theme.blue, linewidth=0.9, label=window)
        panel.plot(validation["iteration"], validation[measure], "o-", color=theme.orange, label="validation")
        over_iterations(panel)
        measured(panel, label, accuracy=measure == "query_accuracy")
        legend_below(figure, panel)
    return figure


# ---- predictions on one's own tasks ---------------------------------------------------------

IMAGES_SHOWN = 60


def predictions_figure(
    tasks: Sequence[Task], found: Sequence[Tensor], title: str, theme: Theme = LIGHT
) -> Figure:
    """A contact sheet of images, or a panel a task: curves, numbers by row, or probabilities by row.

    `found` is, by task, `[query examples, classes]` of probabilities or `[query examples, targets]`.
    """
    import matplotlib

    with style(theme), matplotlib.rc_context({"text.parse_math": False}):  # a name may have a $ in it
        if tasks[0].support_x.dim() == 4:
            return _contact_sheet(tasks[0], found[0], title, theme)
        shown = min(len(tasks), 6)
        figure = new_figure(3.0 * shown + 0.6, 3.2)
        figure.suptitle(title)
        panels = figure.subplots(1, shown, squeeze=False)[0]
        for panel, task, predicted in zip(panels, tasks, found, strict=False):
            panel.set_title(task.name)
            if task.classes:
                _draw_shares(panel, task, predicted, theme)
            elif task.support_x.shape[-1] == 1:
                _draw_curve(panel, task, predicted, theme)
            else:
                for target, values in enumerate(predicted.unbind(1)):
                    kind = curve_style(target, theme) | {"linestyle": "none"}
                    panel.plot(range(len(values)), values.numpy(), label=f"target {target}", **kind)
                panel.set(xlabel="predicted row", ylabel="prediction")
        legend_below(figure, panels[0])
    return figure


def _draw_curve(panel: Axes, task: Task, predicted: Tensor, theme: Theme) -> None:
    order = task.query_x[:, 0].argsort()
    x = task.query_x[order, 0].numpy()
    for target in range(predicted.shape[-1]):
        first = target == 0
        panel.plot(
            x, predicted[order, target].numpy(), ".-", color=theme.blue, label="predicted" if first else None
        )
        panel.scatter(task.support_x[:, 0].numpy(), task.support_y[:, target].numpy(), color=theme.red, s=18,
                      zorder=3, label="support" if first else None)  # fmt: skip
    panel.set(xlabel="x", ylabel="y")


def _draw_shares(panel: Axes, task: Task, shares: Tensor, theme: Theme) -> None:
    bottom = torch.zeros(len(shares))
    for number, name in enumerate(task.classes):
        panel.bar(
            range(len(shares)), shares[:, number].numpy(), bottom=bottom.numpy(), width=1.0, label=name,
            color=_class_colour(number, theme), hatch=HATCHES[number // len(theme.palette) % len(HATCHES)],
            edgecolor=theme.background, linewidth=0.3,
        )  # fmt: skip
        bottom = bottom + shares[:, number]
    panel.set(xlabel="predicted row", ylabel="probability")


HATCHES = ["", "////", "....", "xxxx"]


def _contact_sheet(task: Task, shares: Tensor, title: str, theme: Theme) -> Figure:
    """Labelled images, a row a class, above those that were predicted, with class and probability."""
    columns, classes = 10, len(task.classes)
    queries = min(len(task.query_x), IMAGES_SHOWN)
    rows = classes + -(-queries // columns)
    left_out = f" (the first {queries} of {len(task.query_x)})" if queries < len(task.query_x) else ""
    below = 0.4  # for the words above the next row
    across, down = _pitch(task.query_x), _pitch(task.query_x, below)
    figure, panel = _sheet(columns * across + 2 * GAP, rows * down + 0.8, 0.9, top=0.8)
    panel.text(GAP, -0.55, f"{title}{left_out}", va="center", fontsize=10)

    def draw(images: Tensor, row: int, words: Sequence[str], colour: str) -> None:
        _draw_images(panel, images.float()[None], GAP, row * down, theme, below)
        for column, said in enumerate(words):
            panel.text(
                GAP + column * across,
                row * down - 0.06,
                said,
                fontsize=SMALL - 1,
                color=colour,
                va="bottom",
            )

    for label, name in enumerate(task.classes):
        draw(task.support_x[task.support_y == label][:columns], label, [f"support: {name}"], theme.grey)
    for first in range(0, queries, columns):
        numbers = range(first, min(first + columns, queries))
        best = [int(shares[number].argmax()) for number in numbers]
        words = [
            f"{task.classes[b][:12]} {100 * float(shares[n, b]):.0f} %"
            for n, b in zip(numbers, best, strict=True)
        ]
        draw(task.query_x[first : numbers.stop], classes + first // columns, words, theme.ink)
    return figure

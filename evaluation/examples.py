"""Pictures of single tasks before and after adaptation.

Curves are drawn as fits, image tasks as sheets. Examples are validation tasks while training and test tasks
in --eval, from the same `MAML.predictions` that `meta_test` measures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from common.batch import TaskBatch, TaskDistribution, tree_map
from common.optimizers import Weights
from common.task import complete_mask
from evaluation import style
from evaluation.meta_test import SEED, derive_randomness
from evaluation.tables import after_steps
from learners.reading import choose_reading, main_tensor
from maml import MAML

TASKS = 3  # in a picture of examples
LETTERS = 22  # of a line beside a row of fits
FARTHEST = 1.0  # spans of the true curves by which predictions may exceed them within a panel
MOST_WAYS, MOST_SHOTS = 20, 5  # shown of an image task


@dataclass(frozen=True)
class Examples:
    """A few tasks, on the CPU, and the outputs on their query sets."""

    batch: TaskBatch
    outputs: Tensor  # [tasks, shown steps, query examples, ...], or predicted classes without the last axis
    steps: list[int]  # numbers of inner steps that are shown, up to three, of which the first is 0
    ways: int | None  # of image tasks; None: curves
    deviations: Tensor | None = None  # of outputs that are means of normal distributions


def adapt_examples(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    steps: Collection[int],
    inner_batch: int | None = None,
) -> Examples | None:
    """Adapt to the first tasks of a split, by 0 and these numbers of steps; None for tasks without a picture.

    Curves are predicted on a dense grid. Batch norm is that of the query in training.
    """
    reading = choose_reading(maml.reading, distribution.most_ways)
    if distribution.kind == "other" or (distribution.most_ways and not reading.has_accuracy):
        return None
    batch = distribution.sample_to_draw(split, SEED, TASKS)
    shown, norm = sorted({0, *steps}), maml.choices.query_norm
    numbers, mask = range(TASKS), batch.support_mask
    order, keys = derive_randomness(split, batch.support_x, numbers, inner_batch, shown[-1], mask)
    outputs = maml.predictions(parameters, batch, shown[-1], (norm,), order=order, keys=keys)
    on_cpu = tree_map(Tensor.cpu, batch)
    if distribution.most_ways is None:
        normal = reading.kind == "normal"
        parts = reading.moments(outputs[norm], 2) if normal else (main_tensor(outputs[norm]),)
        shape = (*parts[0][:, shown].shape[:3], -1)
        mean, *deviation = (part[:, shown].float().reshape(shape).cpu() for part in parts)
        return Examples(on_cpu, mean, shown, None, *deviation)
    labels = reading.predict(outputs[norm], 2)[:, shown].long()
    return None if labels.dim() > 3 else Examples(on_cpu, labels.cpu(), shown, distribution.most_ways)


@style.use_style()
def examples_figure(examples: Examples, title: str) -> Figure:
    """Draw tasks before and after adaptation, a panel for each."""
    if examples.steps[1:]:
        title += f": before and {after_steps(examples.steps[-1])}"
    if examples.ways is not None:
        return _draw_image_tasks(examples, examples.ways, title)
    figure = style.new_figure(5.2, 4.2, title)  # in TensorBoard's small cards letters stay readable
    *panels, corner = figure.subplots(2, 2).flat
    draw_fits(panels, examples)
    corner.set_axis_off()
    corner.legend(*panels[0].get_legend_handles_labels(), loc="center")
    return figure


@style.use_style()
def fits_figure(fits: Mapping[str, Examples], title: str) -> Figure:
    """Draw how methods fit the same curves, a row a method, as in figure 2 of Finn et al. 2017."""
    figure = style.new_figure(8.2, 1.9 * len(fits) + 0.7, title)
    rows = figure.subplots(len(fits), TASKS, sharex="col", squeeze=False)
    for panels, (name, examples) in zip(rows, fits.items(), strict=True):
        draw_fits(panels, examples)
        lines = [textwrap.fill(part, LETTERS) for part in name.rsplit(", ", 1)]
        panels[0].set_ylabel("\n".join(lines))
    for panel in rows[:-1].flat:
        panel.set_xlabel("")
    truth = next(iter(fits.values())).batch.query_y[..., 0]
    _share_limits([*rows.flat], float(truth.min()), float(truth.max()))
    style.add_legend(figure, *rows[:, 0])
    return figure


def draw_fits(panels: Sequence[Axes], examples: Examples) -> None:
    """Draw the true curve, the support set and the predictions after each shown step, a task a panel.

    The last prediction lies in its bands, if it is a normal distribution.
    """
    between = [("--", style.ORANGE)] * (len(examples.steps) - 2)
    looks = [(":", style.GREEN), *between, ("-", style.BLUE)][-len(examples.steps) :]
    batch, outputs = examples.batch, examples.outputs.shape[-1]
    support_x, support_y, query_x, query_y = (t[..., 0].numpy() for t in batch.parts.values())
    counts = complete_mask(batch.support_x, batch.support_mask, 1).numpy()
    for task, panel in enumerate(panels):
        truth = query_y[task]
        panel.plot(query_x[task], truth, color=style.GREY, linewidth=3, alpha=0.45, label="true curve")
        predictions = examples.outputs[task, ..., 0].numpy()
        for step, predicted, (line, colour) in zip(examples.steps, predictions, looks, strict=True):
            label = after_steps(step) if step else "before adaptation" if examples.steps[1:] else "prediction"
            label += f" (output 1 of {outputs})" * (outputs > 1)
            panel.plot(query_x[task], predicted, line, color=colour, label=label)
        if examples.deviations is not None:
            style.draw_bands(panel, query_x[task], predicted, examples.deviations[task, -1, :, 0].numpy())
        x, y = (values[task][counts[task]] for values in (support_x, support_y))
        panel.scatter(x, y, 26, style.RED, linewidth=0.5, label="support set", zorder=3)
        panel.set_xlabel("x")
    _share_limits(panels, float(query_y.min()), float(query_y.max()))
    panels[0].set_ylabel("y")


def _share_limits(panels: Sequence[Axes], low: float, high: float) -> None:
    """Give panels one y axis that holds all their curves; one that diverges, as far as `FARTHEST`."""
    drawn = torch.cat([torch.as_tensor(line.get_ydata()).float() for p in panels for line in p.lines])
    drawn, span = drawn[drawn.isfinite()], high - low
    low = max(min(low, float(drawn.min())), low - FARTHEST * span)
    high = min(max(high, float(drawn.max())), high + FARTHEST * span)
    margin = 0.05 * (high - low) or 0.5
    for panel in panels:
        panel.set_ylim(low - margin, high + margin)


def draw_images(panel: Axes, images: Tensor, above: float = 0.0) -> None:
    """Draw images `[rows, columns, channels, height, width]` in [0, 1], each in its unit square of the panel.

    One channel is drawn dark on white, and NaN white. `above`: more gap above each row, in image heights.
    """
    images = images.float().clamp(0, 1)
    if images.shape[2] == 1:
        images = (1 - images).expand(-1, -1, 3, -1, -1)
    images = images.nan_to_num(1.0)
    rows, columns, _, height, _ = images.shape
    gap = max(1, round(0.06 * height))
    padded = functional.pad(images, (gap, gap, gap + round(above * height), gap), value=1.0)
    pixels = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [height, width, 3] of the grid
    aspect = padded.shape[3] / padded.shape[4]
    panel.imshow(pixels.numpy(), extent=(0, columns, rows, 0), aspect=aspect, interpolation="nearest")
    panel.set_axis_off()


def _draw_image_tasks(examples: Examples, ways: int, title: str) -> Figure:
    """Draw image tasks: a row a class, with its support images and its first query image.

    Next to a query is its label before adaptation and after the last step, if there is one; marks tell right
    from wrong, not colours alone. The numbers of correct labels are those of all queries of all classes.
    """
    rows, inch, batch = min(ways, MOST_WAYS), 0.5 if ways <= 10 else 0.42, examples.batch
    shown = min(batch.support_x.shape[1] // ways, MOST_SHOTS)
    figure = style.new_figure(TASKS * (inch * (shown + 1) + 1.5), rows * inch + 1.2, title)
    for task, panel in enumerate(figure.subplots(1, TASKS)):
        of_support = _places_by_class(batch.support_y[task], batch.support_mask, task, rows)
        of_query = _places_by_class(batch.query_y[task], batch.query_mask, task, rows)
        support = _take_images(batch.support_x[task], of_support, shown)
        query = _take_images(batch.query_x[task], of_query, 1)
        labels = examples.outputs[task, [0, -1][: len(examples.steps)]]
        names = ("before", "after") if len(labels) > 1 else ("label",)
        columns = dict(zip(names, (shown + 1.5, shown + 2.3), strict=False))
        counts = complete_mask(batch.query_y, batch.query_mask, 1)[task]
        correct = ((labels == batch.query_y[task]) & counts).sum(1).tolist()
        panel.set_title(f"correct: {' → '.join(map(str, correct))} of {counts.sum()}", loc="left", pad=18)
        framed = functional.pad(torch.cat([support, query], 1), (1, 1, 1, 1), value=0.4)
        draw_images(panel, framed)
        panel.set_xlim(-0.5, shown + 2.9)  # with room for the labels
        for heading, x in ({"support": shown / 2, "query": shown + 0.5} | columns).items():
            panel.text(x, -0.15, heading, ha="center", fontsize=style.SMALL)
        for row, places in enumerate(of_query):
            panel.text(-0.15, row + 0.5, str(row), ha="right", va="center", fontsize=style.SMALL)
            for x, label in zip(columns.values(), labels[:, places[0]].tolist(), strict=True):
                colour, mark = (style.BLUE, "✓") if label == row else (style.RED, "✗")
                look = {"color": colour, "ha": "center", "va": "center", "fontsize": style.SMALL}
                panel.text(x, row + 0.5, f"{label} {mark}", **look)
    return figure


def _places_by_class(labels: Tensor, mask: Tensor | None, task: int, rows: int) -> list[Tensor]:
    """Return the places of the examples of each of the first classes that a task has."""
    labels = labels if mask is None else labels.where(mask[task], -1)
    places = ((labels == row).nonzero()[:, 0] for row in range(rows))
    return [part for part in places if len(part)]


def _take_images(images: Tensor, places: list[Tensor], most: int) -> Tensor:
    """Return the first images of each class, `[classes, most, ...]`, NaN where there are fewer."""
    grid = images.new_full((len(places), most, *images.shape[1:]), torch.nan, dtype=torch.float32)
    for row, part in zip(grid, places, strict=True):
        row[: len(part[:most])] = images[part[:most]]
    return grid

"""Pictures of single tasks before and after adaptation: curves as fits, image tasks as sheets.

Drawn of validation tasks while training and of test tasks by --eval, from the same `MAML.predictions` that
`meta_test` measures.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from common.batch import TaskBatch, TaskDistribution, first_tensor, tree_map
from common.optimizers import Weights
from evaluation import style
from evaluation.meta_test import SEED, randomness_of
from evaluation.tables import after_steps
from maml import MAML

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TASKS = 3  # in a picture


@dataclass(frozen=True)
class Examples:
    """A few tasks, on the CPU, and the outputs on their query sets."""

    batch: TaskBatch
    outputs: Tensor  # [tasks, shown steps, query examples, ...]
    steps: list[int]  # numbers of inner steps that are shown, two or three, of which the first is 0
    ways: int | None  # of image tasks; None: curves


def adapt_examples(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    *,
    steps: Collection[int],
    normalisation: str,
    inner_batch: int | None = None,
) -> Examples | None:
    """Adapt to the first tasks of a split, by 0 and these numbers of steps; None for tasks without a picture.

    Curves are predicted on a dense grid.
    """
    if distribution.kind == "other":
        return None
    batch = distribution.sample_to_draw(split, SEED, TASKS)
    shown = sorted({0, *steps})
    order, keys = randomness_of(split, batch, range(TASKS), inner_batch, shown[-1])
    outputs = maml.predictions(parameters, batch, shown[-1], (normalisation,), order=order, keys=keys)
    on_cpu = TaskBatch(*(tree_map(Tensor.cpu, tree) for tree in batch))
    return Examples(on_cpu, first_tensor(outputs[normalisation])[:, shown].cpu(), shown, distribution.ways)


@style.styled()
def examples_figure(examples: Examples, title: str) -> Figure:
    """Draw tasks before and after adaptation, a panel for each."""
    title = f"{title}: before and {after_steps(examples.steps[-1])}"
    if examples.ways is not None:
        return _draw_images(examples, examples.ways, title)
    figure = style.new_figure(2.6 * TASKS + 0.3, 2.8)
    figure.suptitle(title)
    panels = figure.subplots(1, TASKS)
    draw_fits(panels, examples)
    style.add_legend(figure, panels[0])
    return figure


def draw_fits(panels: Sequence[Axes], examples: Examples) -> None:
    """Draw the true curve, the support set and the predictions after each shown step, a task a panel."""
    first, *later = [(":", style.GREEN), ("--", style.ORANGE), ("-", style.BLUE)]
    looks = [first, *later[1 - len(examples.steps) :]]  # the last one is solid
    support_x, support_y, query_x, query_y = (t[..., 0].numpy() for t in examples.batch)
    for task, panel in enumerate(panels):
        x, truth = query_x[task], query_y[task]
        panel.plot(x, truth, color=style.GREY, linewidth=3.5, alpha=0.5, label="true curve")
        predictions = examples.outputs[task, ..., 0].numpy()
        for step, predicted, (line, colour) in zip(examples.steps, predictions, looks, strict=True):
            label = after_steps(step) if step else "before adaptation"
            panel.plot(x, predicted, line, color=colour, label=label)
        panel.scatter(
            support_x[task], support_y[task], 26, style.RED, linewidth=0.5, label="support set", zorder=3
        )
        margin = 0.3 * float(truth.max() - truth.min()) + 0.5
        panel.set_ylim(float(truth.min()) - margin, float(truth.max()) + margin)
        panel.set_xlabel("x")
    panels[0].set_ylabel("y")


# ---- images ---------------------------------------------------------------------------------

MOST_WAYS, MOST_SHOTS = 20, 5  # shown of a task
RIGHT, WRONG = "✓", "✗"


def _draw_images(examples: Examples, ways: int, title: str) -> Figure:
    """Draw image tasks: a row a class, with its support images and its first query image.

    Next to a query is its label before adaptation and after the last step. Marks and lines tell right from
    wrong, not colours alone. The numbers of correct labels are those of all queries of all classes.
    """
    rows, inch = min(ways, MOST_WAYS), 0.5 if ways <= 10 else 0.42
    shots, queries = (x.shape[1] // ways for x in (examples.batch.support_x, examples.batch.query_x))
    shown = min(shots, MOST_SHOTS)
    left_out = f"\nshown: {rows} of {ways} classes, {shown} of {shots} shots"
    figure = style.new_figure(TASKS * (inch * (shown + 1) + 1.5), rows * inch + 1.2)
    figure.suptitle(title)
    for task, panel in enumerate(figure.subplots(1, TASKS)):
        support = examples.batch.support_x[task].unflatten(0, (ways, shots))[:rows, :shown]
        query = examples.batch.query_x[task].unflatten(0, (ways, queries))[:rows, :1]
        labels = examples.outputs[task, [0, -1]].argmax(-1).view(2, ways, queries)
        before, after = (labels == torch.arange(ways)[:, None]).flatten(1).sum(1).tolist()
        words = f"correct: {before} → {after} of {ways * queries}"
        panel.set_title(words + left_out * ((rows, shown) != (ways, shots)), loc="left", pad=18)
        framed = functional.pad(torch.cat([support, query], 1).float(), (1, 1, 1, 1), value=0.4)
        style.draw_images(panel, framed)
        _label_images(panel, labels[:, :rows, 0].T.tolist(), shown)
    return figure


def _label_images(panel: Axes, labels: Sequence[Sequence[int]], query: int) -> None:
    """Write the labels of a task's classes and, next to the query images, those predicted before and after.

    Args:
        labels: by class, predicted for its query before and after adaptation.
        query: column of the query images.
    """
    from matplotlib.patches import Rectangle

    columns = {"support": query / 2, "query": query + 0.5, "before": query + 1.5, "after": query + 2.3}
    for heading, x in columns.items():
        panel.text(x, -0.15, heading, ha="center", fontsize=style.SMALL)
    panel.set_yticks([row + 0.5 for row in range(len(labels))], [str(row) for row in range(len(labels))])
    for row, (before, after) in enumerate(labels):
        for heading, label in (("before", before), ("after", after)):
            colour, weight = (style.BLUE, "normal") if label == row else (style.RED, "bold")
            place = (columns[heading], row + 0.5, f"{label} {RIGHT if label == row else WRONG}")
            panel.text(*place, ha="center", va="center", color=colour, weight=weight, fontsize=style.SMALL)
        frame = Rectangle((query + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=1.4)
        frame.set_linestyle("-" if after == row else "--")
        panel.add_patch(frame)

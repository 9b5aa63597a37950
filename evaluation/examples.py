"""Pictures of single tasks before and after adaptation: curves as fits, image tasks as sheets.

Drawn of validation tasks while training and of test tasks by --eval, from the same `MAML.predictions` that
`meta_test` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

CURVES, SHEETS = 4, 3  # tasks in a picture


@dataclass(frozen=True)
class Examples:
    """A few tasks, on the CPU, and the outputs on their query sets: `[tasks, steps + 1, examples, ...]`."""

    batch: TaskBatch
    outputs: Tensor


def adapt_examples(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    *,
    tasks: int,
    steps: int,
    normalisation: str,
    inner_batch: int | None = None,
) -> Examples:
    """Adapt to the first tasks of a split; curves are predicted on a dense grid."""
    batch = distribution.sample_to_draw(split, SEED, tasks)
    order, keys = randomness_of(split, batch, range(tasks), inner_batch, steps)
    outputs = maml.predictions(parameters, batch, steps, (normalisation,), order=order, keys=keys)
    on_cpu = TaskBatch(*(tree_map(Tensor.cpu, tree) for tree in batch))
    return Examples(on_cpu, first_tensor(outputs[normalisation]).cpu())


def examples_figure(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    *,
    steps: int,
    test_steps: int,
    normalisation: str,
    title: str,
    inner_batch: int | None = None,
) -> Figure | None:
    """Draw tasks of a split before and after adaptation; None for tasks that have no picture.

    Args:
        steps: inner steps of training, drawn for curves alongside `test_steps`.
    """
    if distribution.kind == "other":
        return None
    curves = distribution.kind == "curves"
    examples = adapt_examples(
        maml,
        parameters,
        distribution,
        split,
        tasks=CURVES if curves else SHEETS,
        steps=max(steps, test_steps) if curves else test_steps,
        normalisation=normalisation,
        inner_batch=inner_batch,
    )
    if curves:
        return fits_figure(examples, sorted({0, steps, test_steps}), title)
    assert distribution.ways is not None
    when = f"before and {after_steps(test_steps)}"
    return tasks_figure(examples, distribution.ways, f"{title}: {when}")


# ---- curves ---------------------------------------------------------------------------------


@style.styled()
def fits_figure(examples: Examples, steps: Sequence[int], title: str) -> Figure:
    """Draw curves before and after adaptation, a panel for each task; `steps` as in `draw_fits`."""
    tasks = len(examples.outputs)
    figure = style.new_figure(2.6 * tasks + 0.3, 2.8)
    figure.suptitle(title)
    panels = figure.subplots(1, tasks, squeeze=False)[0]
    draw_fits(panels, examples, steps)
    style.add_legend(figure, panels[0])
    return figure


def draw_fits(panels: Sequence[Axes], examples: Examples, steps: Sequence[int]) -> None:
    """Draw the true curve, the support set and the predictions after each of `steps`, a task a panel.

    Args:
        steps: two or three numbers of inner steps, of which the first is 0.
    """
    first, *later = [(":", style.GREEN), ("--", style.ORANGE), ("-", style.BLUE)]
    looks = [first, *later[-(len(steps) - 1) :]]  # the last one is solid
    support_x, support_y, query_x, query_y = (t[..., 0].numpy() for t in examples.batch)
    for task, panel in enumerate(panels):
        x, truth = query_x[task], query_y[task]
        panel.plot(x, truth, color=style.GREY, linewidth=3.5, alpha=0.5, label="true curve")
        for step, (line, colour) in zip(steps, looks, strict=True):
            predicted = examples.outputs[task, step, :, 0].numpy()
            label = after_steps(step) if step else "before adaptation"
            panel.plot(x, predicted, line, color=colour, label=label)
        points: dict[str, Any] = {
            "color": style.RED,
            "edgecolor": style.BACKGROUND,
            "linewidth": 0.5,
            "s": 26,
            "zorder": 3,
        }
        panel.scatter(support_x[task], support_y[task], label="support set", **points)
        margin = 0.3 * float(truth.max() - truth.min()) + 0.5
        panel.set_ylim(float(truth.min()) - margin, float(truth.max()) + margin)
        panel.set_xlabel("x")
    panels[0].set_ylabel("y")


# ---- images ---------------------------------------------------------------------------------

MOST_WAYS, MOST_SHOTS = 20, 5  # shown of a task
RIGHT, WRONG = "✓", "✗"


@style.styled()
def tasks_figure(examples: Examples, ways: int, title: str) -> Figure:
    """Draw image tasks side by side: a row a class, with its support images and its first query image.

    Next to a query is its label before adaptation and after the last step. Marks and lines tell right from
    wrong, not colours alone. The numbers of correct labels are those of all queries of all classes.
    """
    tasks, rows = len(examples.outputs), min(ways, MOST_WAYS)
    shots, queries = (x.shape[1] // ways for x in (examples.batch.support_x, examples.batch.query_x))
    shown = min(shots, MOST_SHOTS)
    inch = 0.5 if rows <= 10 else 0.42
    figure = style.new_figure(tasks * (inch * (shown + 1) + 1.5), rows * inch + 1.2)
    figure.suptitle(title)
    for task, panel in enumerate(figure.subplots(1, tasks, squeeze=False)[0]):
        support = examples.batch.support_x[task].unflatten(0, (ways, shots))[:rows, :shown]
        query = examples.batch.query_x[task].unflatten(0, (ways, queries))[:rows, :1]
        labels = examples.outputs[task, [0, -1]].argmax(-1).view(2, ways, queries)
        correct = (labels == torch.arange(ways)[:, None]).flatten(1).sum(1).tolist()
        left_out = f"\nshown: {rows} of {ways} classes, {shown} of {shots} shots" * (
            (rows, shown) != (ways, shots)
        )
        panel.set_title(
            f"correct: {correct[0]} → {correct[1]} of {ways * queries}{left_out}", loc="left", pad=18
        )
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

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

from common.batch import TaskBatch, TaskDistribution, first_tensor, tree_map
from common.optimizers import Weights
from evaluation import style
from evaluation.meta_test import SEED, randomness_of
from evaluation.sheet import Sheet, pitch
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

MOST_WAYS, MOST_SHOTS, MOST_QUERIES = 20, 5, 3  # shown of a task
MOST_INCHES = 16.0  # width of a sheet of several tasks
# in image heights
TOP = 1.9
LEFT = 0.6
BEFORE_QUERY = 0.3
ANSWER = 0.9
RIGHT, WRONG = "✓", "✗"


@style.styled()
def tasks_figure(examples: Examples, ways: int, title: str) -> Figure:
    """Draw image tasks side by side, a row a class: support images, query images and the labels predicted
    before adaptation and after the last step.

    Marks and lines tell right from wrong, not colours alone. What does not fit is left out, and a note says
    so; the numbers of correct predictions are those of all queries.
    """
    shots, queries = (x.shape[1] // ways for x in (examples.batch.support_x, examples.batch.query_x))
    rows, supports, asked = min(ways, MOST_WAYS), min(shots, MOST_SHOTS), min(queries, MOST_QUERIES)
    parts = [(rows, ways, "classes"), (supports, shots, "support images a class"),
             (asked, queries, "query images a class")]  # fmt: skip
    left_out = [f"{shown} of {count} {what}" for shown, count, what in parts if shown < count]
    step = pitch(examples.batch.query_x)
    width = LEFT + supports * step + asked * (BEFORE_QUERY + step + 2 * ANSWER) + 0.4
    inch = 0.5 if rows <= 10 else 0.42
    tasks = min(len(examples.outputs), max(1, int(MOST_INCHES / (width * inch))))
    sheet = Sheet(tasks * width, rows * step + TOP + 0.4 * bool(left_out), inch=inch, top=TOP)
    sheet.text(tasks * width / 2, -1.5, title, ha="center", fontsize=10)
    for task in range(tasks):
        support = examples.batch.support_x[task].unflatten(0, (ways, shots))[:rows, :supports]
        query = examples.batch.query_x[task].unflatten(0, (ways, queries))[:rows, :asked]
        answers = examples.outputs[task, [0, -1]].argmax(-1).view(2, ways, queries)
        correct = (answers == torch.arange(ways)[:, None]).flatten(1).sum(1).tolist()
        left = task * width + LEFT
        sheet.text(left, -0.85, f"correct: {correct[0]} → {correct[1]} of {ways * queries}")
        _draw_support(sheet, support, left, step)
        for number in range(asked):
            place = left + supports * step + BEFORE_QUERY + number * (BEFORE_QUERY + step + 2 * ANSWER)
            sheet.images(query[:, number : number + 1], place, 0.0)
            _draw_answers(sheet, answers[:, :rows, number], place, step)
    if left_out:
        sheet.text(LEFT, rows * step + 0.2, f"Shown: {', '.join(left_out)}.", fontsize=style.SMALL)
    return sheet.figure


def _draw_support(sheet: Sheet, images: Tensor, left: float, step: float) -> None:
    """Draw the labelled images `[classes, shots, channels, height, width]`, and the labels before them."""
    sheet.text(left, -0.28, "support", fontsize=style.SMALL)
    sheet.images(images, left, 0.0)
    for row in range(images.shape[0]):
        sheet.text(left - 0.15, row * step + 0.5, str(row), ha="right", fontsize=style.SMALL)
        for shot in range(images.shape[1]):
            sheet.frame(left + shot * step, row * step, style.GREY, "-", 0.6)


def _draw_answers(sheet: Sheet, answers: Tensor, left: float, step: float) -> None:
    """Write the predicted labels `[before and after, classes]` next to a column of query images."""
    columns = [left + step + ANSWER / 2, left + step + 1.5 * ANSWER]
    for x, heading in zip((left + 0.5, *columns), ("query", "before", "after"), strict=True):
        sheet.text(x, -0.28, heading, ha="center", fontsize=style.SMALL)
    for row, labels in enumerate(answers.T.tolist()):
        for x, label in zip(columns, labels, strict=True):
            look = {"color": style.BLUE} if label == row else {"color": style.RED, "fontweight": "bold"}
            words = f"{label} {RIGHT if label == row else WRONG}"
            sheet.text(x, row * step + 0.5, words, ha="center", fontsize=style.SMALL, **look)
        colour, line = (style.BLUE, "-") if labels[-1] == row else (style.RED, "--")
        sheet.frame(left, row * step, colour, line, 1.4)

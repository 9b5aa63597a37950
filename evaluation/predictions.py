"""Pictures of adapted predictions (--adapt): what a learner says about the queries of a user's own task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation import style
from evaluation.sheet import GAP, Sheet, pitch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TASKS = 6
MOST_IMAGES, COLUMNS = 60, 10
HATCHES = ("", "////", "....", "xxxx")  # after the last colour they begin again with the next hatch


@dataclass(frozen=True)
class Prediction:
    """A user's task and the predictions for it, on the CPU."""

    name: str
    classes: list[str]  # names of the labels; empty for regression
    support_x: Tensor  # [support examples, ...]
    support_y: Tensor  # [support examples] of labels, or [support examples, targets]
    query_x: Tensor  # [query examples, ...]
    predicted: Tensor  # probabilities [query examples, classes], or [query examples, targets]


@style.styled()
def predictions_figure(tasks: Sequence[Prediction], title: str) -> Figure:
    """Draw a contact sheet of images, or a panel a task: curves, numbers by row or probabilities by row."""
    if tasks[0].support_x.dim() == 4:
        return _contact_sheet(tasks[0], title)
    shown = min(len(tasks), MOST_TASKS)
    figure = style.new_figure(3.0 * shown + 0.6, 3.2)
    figure.suptitle(title)
    panels = figure.subplots(1, shown, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=False):
        panel.set_title(task.name)
        if task.classes:
            _draw_probabilities(panel, task)
        elif task.support_x.shape[-1] == 1:
            _draw_curve(panel, task)
        else:
            for target, values in enumerate(task.predicted.unbind(1)):
                look = style.curve_style(target) | {"linestyle": "none"}
                panel.plot(range(len(values)), values.numpy(), label=f"target {target}", **look)
            panel.set(xlabel="predicted row", ylabel="prediction")
    style.add_legend(figure, panels[0])
    return figure


def _draw_curve(panel: Axes, task: Prediction) -> None:
    """Draw a function of one input: its predictions and its support set."""
    order = task.query_x[:, 0].argsort()
    panel.plot(task.query_x[order, 0].numpy(), task.predicted[order].numpy(), ".-", color=style.BLUE)
    panel.lines[0].set_label("predicted")
    for target in range(task.predicted.shape[-1]):
        label = None if target else "support set"
        x, y = task.support_x[:, 0].numpy(), task.support_y[:, target].numpy()
        panel.scatter(x, y, color=style.RED, s=18, zorder=3, label=label)
    panel.set(xlabel="x", ylabel="y")


def _draw_probabilities(panel: Axes, task: Prediction) -> None:
    """Stack the probabilities of each row to a bar."""
    bottom = torch.zeros(len(task.predicted))
    for number, (name, height) in enumerate(zip(task.classes, task.predicted.T, strict=True)):
        panel.bar(
            range(len(height)),
            height.numpy(),
            bottom=bottom.numpy(),
            width=1.0,
            label=name,
            color=style.PALETTE[number % len(style.PALETTE)],
            hatch=HATCHES[number // len(style.PALETTE) % len(HATCHES)],
            edgecolor=style.BACKGROUND,
            linewidth=0.3,
        )
        bottom = bottom + height
    panel.set(xlabel="predicted row", ylabel="probability")


def _contact_sheet(task: Prediction, title: str) -> Figure:
    """Draw the labelled images, a row a class, and below them the predicted ones with their confidence."""
    classes, queries = len(task.classes), min(len(task.query_x), MOST_IMAGES)
    if queries < len(task.query_x):
        title += f" (the first {queries} of {len(task.query_x)})"
    below = 0.4  # room for the words over the next row
    across, down = pitch(task.query_x), pitch(task.query_x, below)
    rows = classes + -(-queries // COLUMNS)
    sheet = Sheet(COLUMNS * across + 2 * GAP, rows * down + 0.8, inch=0.9, top=0.8)
    sheet.text(GAP, -0.55, title, fontsize=10)

    def draw(images: Tensor, row: int, words: Sequence[str], colour: str) -> None:
        sheet.images(images[None], GAP, row * down, below)
        for column, word in enumerate(words):
            place = (GAP + column * across, row * down - 0.06)
            sheet.text(*place, word, fontsize=style.SMALL - 1, color=colour, va="bottom")

    for label, name in enumerate(task.classes):
        draw(task.support_x[task.support_y == label][:COLUMNS], label, [f"support: {name}"], style.GREY)
    confidence, best = task.predicted[:queries].max(-1)
    pairs = zip(best.tolist(), confidence.tolist(), strict=True)
    words = [f"{task.classes[label][:12]} {100 * share:.0f} %" for label, share in pairs]
    for first in range(0, queries, COLUMNS):
        rows_of = slice(first, min(first + COLUMNS, queries))
        draw(task.query_x[rows_of], classes + first // COLUMNS, words[rows_of], style.INK)
    return sheet.figure

"""Pictures of adapted predictions (--adapt): what a learner says about the queries of a user's own task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TASKS = 6
MOST_IMAGES, COLUMNS = 60, 10


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
    """Draw a contact sheet of images, or a panel a task: curves of one input, or predictions by row."""
    if tasks[0].support_x.dim() == 4:
        return _contact_sheet(tasks[0], title)
    shown = min(len(tasks), MOST_TASKS)
    figure = style.new_figure(3.0 * shown + 0.6, 3.2)
    figure.suptitle(title)
    panels = figure.subplots(1, shown, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=False):
        panel.set_title(task.name)
        if task.support_x.shape[-1] == 1 and not task.classes:
            _draw_curve(panel, task)
            continue
        names = task.classes or [f"target {number}" for number in range(task.predicted.shape[1])]
        for number, (name, values) in enumerate(zip(names, task.predicted.T, strict=True)):
            look = style.curve_style(number) | {"linestyle": "none"}
            panel.plot(range(len(values)), values.numpy(), label=name, **look)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(xlabel="predicted row", ylabel="probability" if task.classes else "prediction")
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


def _contact_sheet(task: Prediction, title: str) -> Figure:
    """Draw the labelled images, a row a class, and below them the predicted ones with their confidence."""
    classes, queries = len(task.classes), min(len(task.query_x), MOST_IMAGES)
    if queries < len(task.query_x):
        title += f" (the first {queries} of {len(task.query_x)})"
    rows = -(-queries // COLUMNS)
    figure = style.new_figure(10.0, 0.8 * classes + 1.05 * rows + 1.0)
    figure.suptitle(title)
    support, query = figure.subplots(2, 1, height_ratios=[classes, 1.3 * rows])
    examples = [
        _filled(task.support_x[task.support_y == label][:COLUMNS], COLUMNS) for label in range(classes)
    ]
    style.draw_images(support, torch.stack(examples))
    support.set_yticks([label + 0.5 for label in range(classes)], task.classes)
    support.set_title("support set", loc="left")
    images = _filled(task.query_x[:queries], rows * COLUMNS)
    style.draw_images(query, images.unflatten(0, (rows, COLUMNS)), above=0.3)
    query.set_title("predicted", loc="left")
    confidence, best = task.predicted[:queries].max(-1)
    for number, (label, share) in enumerate(zip(best.tolist(), confidence.tolist(), strict=True)):
        row, column = divmod(number, COLUMNS)
        words = f"{task.classes[label][:10]} {100 * share:.0f} %"
        query.text(column + 0.06, row + 0.22, words, fontsize=style.SMALL - 1)
    return figure


def _filled(images: Tensor, count: int) -> Tensor:
    """Append empty images, up to `count`."""
    empty = 0.0 if images.shape[1] == 1 else 1.0  # one channel is drawn dark on white
    return torch.cat([images, images.new_full((count - len(images), *images.shape[1:]), empty)])

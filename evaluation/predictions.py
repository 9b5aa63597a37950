"""Predictions for a user's own task (--adapt): columns with names, arrays where outputs are dense, a picture.

A column is named after a target only if it holds predictions of it: outputs of a loss of the user's, whose
meaning nobody has said, are called outputs.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from common.batch import Tree
from common.task import UserTask
from evaluation import style
from evaluation.examples import draw_images
from evaluation.tables import table
from learners.reading import Reading, main_tensor

MOST_COLUMNS = 16  # of one output; more are an array
ROWS_PRINTED, LONGEST_CELL = 20, 24  # in the terminal
MOST_PREDICTED, MOST_IMAGES, COLUMNS = 6, 60, 10  # tasks, predicted images and images in a row
LETTERS, LINES = 14, 6  # above an image, at most


@dataclass
class Prediction:
    """Predictions of a task's query examples."""

    examples: int
    columns: dict[str, Tensor | list[str]] = field(default_factory=dict)  # by heading, one value an example
    arrays: dict[str, Tensor] = field(default_factory=dict)  # other outputs, most `[examples, ...]`, by name
    drawn: list[str] = field(default_factory=list)  # headings of the columns in a picture
    deviations: dict[str, Tensor] = field(default_factory=dict)  # of drawn columns that are means
    of_targets: bool = False  # the drawn columns are in the order of the targets
    measure: str = "output"  # what they are
    between: tuple[Tensor, Prediction] | None = None  # of a curve: inputs on a dense grid, what they predict

    def rows(self, digits: int) -> Iterator[dict[str, str]]:
        """Yield the cells of each example, by heading."""
        shares = ("p(", "share(")
        forms = {name: ".6f" if name.startswith(shares) else f".{digits}g" for name in self.columns}
        for number in range(self.examples):
            values = {name: column[number] for name, column in self.columns.items()}
            yield {n: v if isinstance(v, str) else format(v.item(), forms[n]) for n, v in values.items()}

    def add_output(self, name: str, values: Tensor) -> None:
        """Add an output as columns called after it, or as an array if it is large or not of the examples."""
        name = f"output {name}".strip() if not name or name.isdigit() else name
        columns = values[:, None] if values.dim() == 1 else values
        as_array = columns.dim() != 2 or len(columns) != self.examples or columns.shape[1] > MOST_COLUMNS
        numbers = [""] if as_array or columns.shape[1] == 1 else range(1, columns.shape[1] + 1)
        headings = [f"{name} {number}".strip() for number in numbers]
        if {*headings} & (self.columns.keys() | self.arrays.keys()):
            headings = [f"output {heading}" for heading in headings]
        if as_array:
            self.arrays[headings[0]] = values
        else:
            self.columns |= dict(zip(headings, columns.T, strict=True))


def read_predictions(
    outputs: Tree,
    numbers: Tensor,
    reading: Reading,
    classes: Sequence[str],
    targets: Sequence[str],
    *,
    predicts_targets: bool,
    deviations: Tensor | None = None,
) -> Prediction:
    """Return what a learner's outputs for query examples predict.

    Args:
        numbers: the main output in the targets' units; of normal distributions the means.
        classes: names of the classes; empty: their numbers.
        targets: names of the targets.
        predicts_targets: outputs that are numbers are of the targets; else only the user knows what they are.
        deviations: standard deviations of normal distributions, in the targets' units.
    """
    main, parts = main_tensor(outputs), name_tensors(outputs)
    prediction = Prediction(len(main))
    if reading.has_accuracy:
        prediction.measure = "probability"
        predicted, shares = reading.predict(outputs), reading.probabilities(outputs)
        if reading.kind == "labels":
            _add_labels(prediction, predicted, shares, classes, targets)
        else:
            _add_classes(prediction, predicted, shares, reading, classes)
    else:
        name = next((name for name, part in parts.items() if part is main), "")
        numbers = numbers[:, None] if numbers.dim() == 1 else numbers
        if numbers.dim() == 2 and numbers.shape[1] == len(targets) and (predicts_targets or not name):
            headings = targets if predicts_targets else [f"output({target})" for target in targets]
            prediction.columns |= dict(zip(headings, numbers.T, strict=True))
        else:
            prediction.add_output(name, numbers)
        prediction.drawn = [*prediction.columns]
        prediction.of_targets = {*targets} <= prediction.columns.keys()
        prediction.measure = "prediction" if prediction.of_targets else "output"
        if deviations is not None and prediction.of_targets:
            prediction.deviations = dict(zip(targets, deviations.T, strict=True))
            prediction.columns |= {f"std({name})": part for name, part in prediction.deviations.items()}
        elif deviations is not None:
            prediction.add_output("std", deviations)
    for name, part in parts.items():
        if part is not main:
            prediction.add_output(name, part)
    return prediction


def name_tensors(tree: Tree, name: str = "") -> dict[str, Any]:
    """Return the leaves of outputs by key, field, or position from 1; "" is the name of a single one."""
    if is_dataclass(tree):
        values = [(part.name, getattr(tree, part.name)) for part in fields(tree)]
        parts = [(key, value) for key, value in values if value is not None]
    elif isinstance(tree, Mapping):
        parts = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", None) or map(str, range(1, len(tree) + 1))
        parts = [*zip(names, tree, strict=True)]
    else:
        return {name: tree}
    tensors = [name_tensors(part, f"{name}.{key}".lstrip(".")) for key, part in parts]
    return {key: leaf for leaves in tensors for key, leaf in leaves.items()}


def _add_classes(
    prediction: Prediction, predicted: Tensor, shares: Tensor, reading: Reading, classes: Sequence[str]
) -> None:
    names = classes or [str(number) for number in range(reading.classes)]
    if predicted.dim() > 1:  # pixels
        integers = torch.uint8 if reading.classes < 256 else torch.int64
        prediction.arrays = {"classes": predicted.to(integers), "p": shares}
        for number, name in enumerate(names):
            prediction.columns[f"share({name})"] = (predicted == number).flatten(1).double().mean(1)
        return
    ordinal = reading.kind == "ordinal" and reading.classes > 2
    headings = [f"p(above {name})" for name in names[:-1]] if ordinal else [f"p({name})" for name in names]
    prediction.columns["prediction"] = [names[label] for label in predicted.tolist()]
    prediction.columns |= dict(zip(headings, shares.T, strict=True))
    prediction.drawn = headings


def _add_labels(
    prediction: Prediction, predicted: Tensor, shares: Tensor, classes: Sequence[str], targets: Sequence[str]
) -> None:
    if len(classes) == 2 and predicted.dim() == 1:  # one logit, of the second class
        prediction.columns["prediction"] = [classes[int(label)] for label in predicted.tolist()]
        prediction.drawn = [f"p({name})" for name in classes]
        prediction.columns |= dict(zip(prediction.drawn, (1 - shares, shares), strict=True))
        return
    if predicted.dim() > 2:
        prediction.arrays = {"labels": predicted.to(torch.uint8), "p": shares}
        prediction.columns["share(1)"] = predicted.flatten(1).double().mean(1)
        return
    predicted, shares = (part if part.dim() == 2 else part[:, None] for part in (predicted, shares))
    has_names = len(targets) == shares.shape[1]
    names = targets if has_names else [f"label {number}" for number in range(1, shares.shape[1] + 1)]
    for name, labels in zip(names, predicted.T, strict=True):
        prediction.columns[name] = [str(int(label)) for label in labels.tolist()]
    prediction.columns |= {f"p({name})": part for name, part in zip(names, shares.T, strict=True)}
    prediction.drawn, prediction.of_targets = [f"p({name})" for name in names], True


def predictions_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the first rows of predictions, as the terminal shows them."""
    more = f"\n... and {len(rows) - ROWS_PRINTED} more" if len(rows) > ROWS_PRINTED else ""
    return table(header, [[cell[:LONGEST_CELL] for cell in row] for row in rows[:ROWS_PRINTED]]) + more


# ---- pictures ------------------------------------------------------------------------------------


@style.use_style()
def predictions_figure(tasks: Sequence[UserTask], predictions: Sequence[Prediction], title: str) -> Figure:
    """Draw dense outputs as images, images as a contact sheet, or a panel a task: curves, values by row."""
    images = tasks[0].support_x.dim() == 4 and tasks[0].support_x.shape[1] in (1, 3)
    dense = any(array.dim() > 2 for array in predictions[0].arrays.values())
    if dense and not predictions[0].drawn:
        return _draw_maps(tasks[0], predictions[0], title, images=images)
    if images:
        return _draw_contact_sheet(tasks[0], predictions[0], title)
    shown = min(len(tasks), MOST_PREDICTED)
    figure = style.new_figure(3.0 * shown + 0.6, 3.2, title)
    panels = figure.subplots(1, shown, squeeze=False)[0]
    for panel, task, prediction in zip(panels, tasks, predictions, strict=False):
        _draw_columns(panel, task, prediction)
    style.add_legend(figure, panels[0])
    return figure


def _draw_columns(panel: Axes, task: UserTask, prediction: Prediction) -> None:
    """Draw a task's columns: over the only input, with the support set, or by row."""
    support_x, support_y, query_x = (x.cpu() for x in (task.support_x, task.support_y, task.query_x))
    curve = support_x.dim() == 2 and support_x.shape[1] == 1 and not task.classes
    rows_of = torch.tensor([int(n) if n.isdigit() else place for place, n in enumerate(task.query_names, 1)])
    query = query_x[:, 0] if curve else rows_of
    points, shown = prediction.between or (query, prediction)
    x, order = points.sort()
    for number, name in enumerate(prediction.drawn):
        values, rows = shown.columns[name], prediction.columns[name]
        assert isinstance(values, Tensor) and isinstance(rows, Tensor)
        look = style.curve_style(number) | ({"marker": ""} if curve else {"linestyle": "none"})
        panel.plot(x.numpy(), values[order].numpy(), label=name, **look)
        if curve:
            label = "predicted rows" if number == 0 else None
            panel.plot(query.numpy(), rows.numpy(), "o", color=look["color"], mfc="white", label=label)
        if name in prediction.deviations:
            bands = values[order].numpy(), shown.deviations[name][order].numpy()
            style.draw_bands(panel, x.numpy(), *bands, look["color"])
        if curve and prediction.of_targets:
            support = support_x[:, 0].numpy(), support_y.view(len(support_x), -1)[:, number].numpy()
            panel.scatter(*support, 18, style.RED, zorder=3, label="support set" if number == 0 else None)
    panel.set(title=task.name, xlabel="x" if curve else "predicted row", ylabel=prediction.measure)
    if not curve:
        panel.locator_params("x", integer=True)


def _draw_maps(task: UserTask, prediction: Prediction, title: str, *, images: bool) -> Figure:
    """Draw the first query examples, and the first dense output of each below it, its first channel."""
    name, maps = next((n, array) for n, array in prediction.arrays.items() if array.dim() > 2)
    if maps.dim() > 3:
        maps = maps.flatten(1, -3)
        name, maps = name + f" (channel 1 of {maps.shape[1]})" * (maps.shape[1] > 1), maps[:, 0]
    shown = min(len(maps), MOST_PREDICTED)
    figure = style.new_figure(1.7 * shown + 1.0, 4.2 if images else 2.4, f"{title}: {name}")
    rows = figure.subplots(1 + images, shown, squeeze=False)
    for column in range(shown):
        if images:
            draw_images(rows[0][column], task.query_x[None, column : column + 1].cpu())
        limits = {"vmin": float(maps.min()), "vmax": float(maps.max())}
        drawn = rows[-1][column].imshow(maps[column].numpy(), interpolation="nearest", **limits)
        rows[-1][column].set_axis_off()
    numbers = None if maps.is_floating_point() else range(int(maps.min()), int(maps.max()) + 1)
    figure.colorbar(drawn, ax=rows[-1].tolist(), shrink=0.8, ticks=numbers)
    return figure


def _draw_contact_sheet(task: UserTask, prediction: Prediction, title: str) -> Figure:
    """Draw the support images below their targets, and the predicted ones below name and prediction."""
    if len(task.query_x) > MOST_IMAGES:
        title += f" (the first {MOST_IMAGES} of {len(task.query_x)})"
    values = [target.flatten()[0].item() for target in task.support_y[:MOST_IMAGES]]  # class, or first number
    labels = [task.classes[int(value)] if task.classes else f"{value:.3g}" for value in values]
    words, names = [[f"support: {target}" for target in labels]], enumerate(task.query_names[:MOST_IMAGES])
    words += [[f"{name}\n{_describe_example(prediction, number)}" for number, name in names]]
    columns = min(COLUMNS, max(map(len, words)))
    grids, texts = list[Tensor](), list[tuple[int, str, str]]()
    for images, part, colour in zip((task.support_x, task.query_x), words, (style.RED, "black"), strict=True):
        texts += [(columns * len(grids) + n, _wrap(text), colour) for n, text in enumerate(part)]
        shown, missing = images[: len(part)].cpu().float(), -len(part) % columns
        grid = functional.pad(shown, (*[0] * 7, missing), value=torch.nan)
        grids += [*grid.unflatten(0, (-1, columns))]
    above = 0.13 * max(text.count("\n") + 1 for _, text, _ in texts) + 0.05  # in heights of an image
    figure = style.new_figure(max(4.0, 1.1 * columns), len(grids) * (1 + above) + 0.6, title)
    panel = figure.subplots()
    draw_images(panel, torch.stack(grids), above=above)
    for place, text, colour in texts:
        row, column = divmod(place, columns)
        x, y = column + 0.06, row + above / (1 + above)
        panel.text(x, y, text, color=colour, fontsize=style.SMALL - 1, va="bottom", linespacing=1.05)
    return figure


def _describe_example(prediction: Prediction, number: int) -> str:
    """Return what is predicted for an example, in a few words."""
    drawn, label = prediction.drawn, prediction.columns.get("prediction")
    numbers = [float(prediction.columns[name][number]) for name in drawn]
    if not isinstance(label, list):
        return f"{drawn[0]} {numbers[0]:.3g}" if numbers else ""
    ordinal = any(name.startswith("p(above ") for name in drawn)
    return label[number] + ("" if ordinal else f" {100 * max(numbers):.0f}\N{NO-BREAK SPACE}%")


def _wrap(words: str) -> str:
    """Break lines above an image; a long name may break after `_`, `/` and `-`."""
    parts = re.sub(r"(?<=[_/-])(?=\w)", " \0", words).splitlines()
    lines = [line for part in parts for line in textwrap.wrap(part, LETTERS, max_lines=LINES)]
    return "\n".join(line.replace(" \0", "").replace("\0", "") for line in lines)

"""What a learner's outputs mean: scores of classes, logits of labels, or numbers.

Accuracy, predictions, pictures and what a metric is given follow from it. It is decided once, from one pass
on a task (`read_outputs`), and travels with the `MAML`. Of several outputs, the main one is read.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.batch import TaskBatch, Tree, append_axes, cast_tree, first_tensor, index_tree, tree_map
from common.errors import UsageError, fold_message
from learners.gaussian import CENTRAL, FLOOR, measure_normal, split_normal
from learners.padding import cut

IGNORED = -100  # PyTorch's default of `ignore_index`
NEAR_ONE = 1e-3  # probabilities sum to 1 within this
UNDEFINED = re.compile(r"meaningless|undefined|\bnan\b|no (positive|negative)", re.IGNORECASE)  # in warnings


MAIN_NAMES = ("logits", "out")  # of Hugging Face's models, and of torchvision's segmentation


def main_tensor(outputs: Tree) -> Tensor:
    """Return the main one of a learner's outputs: "logits" or "out" if one is called so, else the first."""
    for name in () if isinstance(outputs, Tensor) else MAIN_NAMES:
        value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    return first_tensor(outputs)


def hide_classes(outputs: Tree, ways: Tensor) -> Tree:
    """Return outputs whose scores `[examples, classes, ...]` of classes from `ways` on never win.

    They are large and negative, and finite: products with zero have to be zero.
    """
    scores = main_tensor(outputs)
    absent = torch.arange(scores.shape[1], device=scores.device) >= ways
    absent = append_axes(absent, scores.dim() - 1)
    return _with_main(outputs, scores.masked_fill(absent, torch.finfo(scores.dtype).min / 4))


def cut_outputs(outputs: Tree, mask: Tensor | None, ways: Tensor | None) -> Tree:
    """Return one task's outputs without padding: of the examples that count, for its own classes."""
    outputs = cut(outputs, mask)
    return outputs if ways is None else _with_main(outputs, main_tensor(outputs)[:, : int(ways)])


def _with_main(outputs: Tree, scores: Tensor) -> Tree:
    main = main_tensor(outputs)
    return tree_map(lambda part: scores if part is main else part, outputs)


def has_overflowed(outputs: Tree, reading: Reading) -> bool:
    """Return whether a task's numbers are not finite, or its classes and labels have no probabilities."""
    if reading.kind == "numbers":
        return not main_tensor(outputs).isfinite().all()
    if reading.kind == "normal":  # mean and deviation
        return not all(part.isfinite().all() for part in outputs)
    return bool(reading.probabilities(outputs).isnan().any())


@dataclass(frozen=True)
class Metric:
    """A measure of one task: `metric(outputs, targets, reading)`."""

    name: str  # in tables and TensorBoard
    more_is_better: bool
    function: Callable[[Tree, Tree, Reading], Any]
    flag: str  # as it was typed

    def __call__(self, outputs: Tree, targets: Tree, reading: Reading) -> float:
        """Return the measure of a task's outputs `[examples, ...]`, NaN where it is undefined."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                number = float(self.function(outputs, targets, reading))
        except UsageError:
            raise
        except Exception as error:  # the library or the user's code may fail in any way
            reason = f"{type(error).__name__}: {fold_message(error):.200}"
            raise UsageError(f"{self.flag} gives no number for a task's outputs: {reason}") from error
        undefined = any(UNDEFINED.search(str(warning.message)) for warning in caught)
        return math.nan if undefined or not math.isfinite(number) else number

    def per_step(self, outputs: Tree, batch: TaskBatch, reading: Reading) -> Tensor:
        """Return the measure of outputs `[tasks, steps, query examples, ...]`: float64 `[tasks, steps]`.

        A task whose outputs have overflowed has the worst value: it is not undefined.
        """
        outputs, batch = (tree_map(lambda t: t.detach().cpu(), tree) for tree in (outputs, batch))
        targets = batch.query_y
        if reading.in_units:
            targets = reading.in_units(first_tensor(targets))
        if reading.kind == "normal":
            outputs = reading.moments(outputs, 2, in_units=reading.in_units)
        elif reading.in_units:
            outputs = reading.in_units(main_tensor(outputs))
        elif reading.kind == "numbers":  # squares of large ones are finite in float64
            outputs, targets = cast_tree((outputs, targets), torch.float64)
        tasks, steps = first_tensor(outputs).shape[:2]

        def measure(task: int, step: int) -> float:
            """Return the measure of a task without its padding."""
            mask, ways = (None if size is None else size[task] for size in (batch.query_mask, batch.ways))
            task_reading = reading if ways is None else replace(reading, classes=int(ways))
            task_outputs = cut_outputs(index_tree(outputs, (task, step)), mask, ways)
            if has_overflowed(task_outputs, task_reading):
                return -math.inf if self.more_is_better else math.inf
            return self(task_outputs, cut(index_tree(targets, task), mask), task_reading)

        rows = [[measure(task, step) for step in range(steps)] for task in range(tasks)]
        return torch.tensor(rows, dtype=torch.float64).view(tasks, steps)


@dataclass(frozen=True)
class Reading:
    """How outputs are read; methods take `before`, the number of axes before that of the examples.

    Attributes:
        kind: "classes", scores `[examples, classes, ...]`; "ordinal", logits `[examples, classes - 1, ...]`
            of being above each class but the last; "labels", logits of the shape of targets that are 0 or
            1; "numbers"; or "normal", means and variances (see gaussian.py).
        ignored: label that is no class; None: all labels are classes.
        numbers: how many the main output has per example.
        independent: scores are logits of a class against the rest.
        in_units: gives standardised targets the units of the data, and deviations with `centre=False`; None:
            they were not standardised.
        metric: the user's own measure, if any.
        floor: of a variance that is read.
    """

    kind: str
    classes: int = 0
    ignored: int | None = None
    numbers: int = 1
    independent: bool = False
    in_units: Callable[..., Tensor] | None = None
    metric: Metric | None = None
    floor: float = FLOOR

    @property
    def has_accuracy(self) -> bool:
        return self.kind not in ("numbers", "normal")

    @property
    def further(self) -> tuple[str, ...]:
        """Return the names of measures that are reported alongside the loss (see `measure_further`)."""
        return ("mse", *(f"coverage_{percent}" for percent in CENTRAL)) if self.kind == "normal" else ()

    @property
    def is_masked(self) -> bool:
        """Return whether some targets may be unknown, so that accuracy may be undefined."""
        return self.kind == "labels" or self.ignored is not None

    @property
    def measures(self) -> tuple[str, ...]:
        """Return the names of all measures of a task."""
        plain = ["loss", *["accuracy"] * self.has_accuracy, *["metric"] * (self.metric is not None)]
        return *plain, *self.further

    @property
    def measure(self) -> str:
        """Return what decides: the metric's name, "accuracy", or "loss"."""
        return self.metric.name if self.metric else "accuracy" if self.has_accuracy else "loss"

    @property
    def more_is_better(self) -> bool:
        return self.metric.more_is_better if self.metric else self.has_accuracy

    def predict(self, outputs: Tree, before: int = 0) -> Tensor:
        """Return predicted classes, int64 `[..., examples, ...]`; of labels, whether each is above 0.5."""
        scores = main_tensor(outputs)
        if self.kind == "classes":
            return scores.argmax(before + 1)
        above = scores > 0  # the sigmoid is above 0.5
        return above.sum(before + 1) if self.kind == "ordinal" else above

    def probabilities(self, outputs: Tree) -> Tensor:
        """Return probabilities of the shape of the outputs; one logit for two classes becomes two of them.

        Outputs whose sums over the classes are 1 are probabilities already, and stay as they are.
        """
        scores = main_tensor(outputs)
        if self.kind == "classes" and not self.independent:
            total_off = (scores.sum(1) - 1).abs().max() if scores.numel() else scores.sum()
            is_probability = bool((scores >= 0).all()) and bool(total_off < NEAR_ONE)
            return scores if is_probability else scores.softmax(1)
        share = scores.sigmoid()
        return torch.cat([1 - share, share], 1) if (self.kind, self.classes) == ("ordinal", 2) else share

    def decode_labels(self, targets: Tree, predicted: Tensor, before: int = 0) -> tuple[Tensor, Tensor]:
        """Return the labels that `predicted` should be, and which of them count, as bool."""
        labels = first_tensor(targets)
        if self.kind == "labels":
            return labels == 1, (labels == 0) | (labels == 1)  # others, such as NaN, are unknown
        if labels.is_floating_point():  # one-hot
            labels = labels.argmax(before + 1)
        elif labels.dim() > predicted.dim():
            labels = labels.squeeze(-1)
        valid = (labels >= 0) & (labels < self.classes)
        return labels, valid if self.ignored is None else valid & (labels != self.ignored)

    def accuracy(self, outputs: Tree, targets: Tree, mask: Tensor | None = None, before: int = 1) -> Tensor:
        """Return the share of correct classes, pixels or labels by task, float32 `[...]`; NaN without any.

        `mask`, `[..., examples]`, says which examples count; None: all.
        """
        predicted = self.predict(outputs, before)
        plain = first_tensor(targets)
        is_complete = mask is None and plain.dim() == predicted.dim() == before + 1
        if (self.kind, self.ignored) == ("classes", None) and is_complete:
            return (predicted == plain).float().mean(-1)
        labels, valid = self.decode_labels(targets, predicted, before)
        if mask is not None:
            valid = valid & append_axes(mask, valid.dim())
        right = (predicted == labels) & valid
        return right.flatten(before).sum(-1) / valid.expand_as(right).flatten(before).sum(-1)

    def moments(
        self, outputs: Tree, before: int = 0, *, in_units: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the means and the standard deviations in outputs that are normal distributions."""
        mean, variance = split_normal(main_tensor(outputs), self.floor, before)
        deviation = variance.sqrt()
        return (in_units(mean), in_units(deviation, centre=False)) if in_units else (mean, deviation)

    def measure_further(
        self, outputs: Tree, targets: Tree, mask: Tensor | None = None, before: int = 1
    ) -> dict[str, Tensor]:
        """Return the measures `further` of each task, `[...]`, by name."""
        if not self.further:
            return {}
        return measure_normal(first_tensor(targets), *self.moments(outputs, before), mask, before)

    def describe(self) -> str:
        """Return in words how accuracy is measured, or why it is not."""
        left_out = "" if self.ignored is None else f"; a label {self.ignored} is left out"
        return {
            "classes": f"scores of {self.classes} classes on the second axis{left_out}",
            "ordinal": f"logits of being above each of {self.classes} classes but the last: the class is the "
            f"number of logits above 0{left_out}",
            "labels": "logits of labels that are 0 or 1, with the threshold 0.5 of the sigmoid",
            "numbers": "numbers",
            "normal": "means of the targets, then numbers whose softplus gives the variances",
        }[self.kind]


def choose_reading(reading: Reading | None, ways: int | None) -> Reading:
    """Return a learner's reading; without one, the plain reading of tasks with so many classes."""
    return reading or Reading("classes" if ways else "numbers", ways or 0)


def read_outputs(
    outputs: Tree,
    targets: Tree,
    *,
    kind: str = "auto",
    ways: int | None = None,
    loss: str = "",
    ignored: int | None = None,
    floor: float = FLOOR,
) -> Reading:
    """Decide what outputs mean from those of one task; ValueError where they cannot be what `kind` says.

    Args:
        kind: see `Reading`; "auto": by the number of classes, the loss and the shapes.
        ways: classes of a task; None in regression.
        loss: name of a built-in loss, or of the user's.
        ignored: label that is no class; None: there is none.
        floor: of variances, if the loss is "gaussian-nll".
    """
    scores, labels = main_tensor(outputs), first_tensor(targets)
    numbers = scores[:1].numel()
    same = scores.shape == labels.shape
    bare = labels.squeeze(-1) if labels.dim() == scores.dim() and labels.shape[-1] == 1 else labels
    indexed = scores.dim() > 1 and not labels.is_floating_point()
    indexed = indexed and bare.shape == scores.shape[:1] + scores.shape[2:]
    columns = scores.shape[1] if scores.dim() > 1 else 0
    if kind == "auto":
        kind = _kind_by_shape(scores, labels, indexed=indexed, ways=ways, loss=loss)
    elif kind == "classes" and not (indexed or same):
        raise ValueError(f"scores {tuple(scores.shape)} are none of classes {tuple(labels.shape)}")
    elif kind == "ordinal" and not indexed:
        raise ValueError(f"logits {tuple(scores.shape)} are none of integer labels {tuple(labels.shape)}")
    elif kind == "labels" and not same:
        raise ValueError(f"logits {tuple(scores.shape)} are none of labels {tuple(labels.shape)}")
    masked = ignored if ignored is not None or scores.dim() < 3 else IGNORED
    classes = {"classes": columns, "ordinal": columns + 1}.get(kind, 0)
    return Reading(kind, classes, masked, numbers, independent=loss == "bce", floor=floor)


def _kind_by_shape(scores: Tensor, labels: Tensor, *, indexed: bool, ways: int | None, loss: str) -> str:
    """Return how outputs are read where the user does not say."""
    if ways:
        if indexed and scores.shape[1] in (ways, ways - 1):
            return "classes" if scores.shape[1] == ways else "ordinal"
        return "labels" if ways == 2 and scores.shape == labels.shape else "numbers"
    if loss in ("bce", "gaussian-nll"):
        return "labels" if loss == "bce" else "normal"
    if labels.is_floating_point() or loss in ("mse", "huber"):
        return "numbers"
    if scores.shape == labels.shape:
        return "labels" if ((labels == 0) | (labels == 1)).all() else "numbers"
    return "classes" if indexed and scores.shape[1] > 1 else "numbers"

"""Try a learner on one task before anything else: which outputs it gives, and what they mean.

Accuracy, predictions and a metric depend on it; so does the line that tells the user how they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from commands.config import Config
from common.batch import Tree, first_tensor, make_arguments, register_tree, tree_map
from common.errors import UsageError, is_out_of_memory
from common.names import is_own_code
from common.sizes import find_largest
from learners.batch_norm import convert_batch_norm
from learners.copies import copy_module
from learners.diagnosis import blame_layer
from learners.elementary import Elementary
from learners.gaussian import target_axis
from learners.losses import LOSSES, ignored_label, variance_floor
from learners.metrics import Metric, build_metric
from learners.reading import Reading, main_tensor, read_outputs
from tasks.scales import Scales, undo_scale


@contextmanager
def blame_flags(words: str) -> Iterator[None]:
    """Raise UsageError that begins with these words where the user's code fails in the block."""
    try:
        yield
    except Exception as error:  # it may fail in any way
        if isinstance(error, UsageError) or is_out_of_memory(error):
            raise
        raise UsageError(f"{words}: {shorten(str(error), 200)}") from error


def are_equal(a: Any, b: Any, tolerance: float, rounding: float = 0.0) -> bool:
    """Return whether trees of tensors are the same but for rounding, relative to their largest numbers.

    Differences up to `rounding` are none, however small the numbers of a tensor.
    """
    leaves, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
    if len(leaves) != len(others):
        return False
    for x, y in zip(leaves, others, strict=True):
        if isinstance(x, Tensor) and isinstance(y, Tensor) and y.numel():
            x, y = (t.cpu().to(torch.complex128) for t in (x, y))
            near = max(rounding, tolerance * float(y.abs().nan_to_num(0, 0).max()))
            if x.shape != y.shape or not torch.allclose(x, y, rtol=tolerance, atol=near, equal_nan=True):
                return False
    return True


def count_outputs(config: Config, targets: Tree) -> int:
    """Return with how many outputs a learner is built: classes, or numbers for targets `[examples, ...]`."""
    if config.tasks.classification and config.tasks.ways:
        return find_largest(config.tasks.ways)
    shape, per_target = first_tensor(targets).shape, 2 if config.learner.loss == "gaussian-nll" else 1
    return per_target * shape[target_axis(len(shape))]


def find_ignored_label(config: Config) -> int | None:
    """Return the label that the loss leaves out in the user's own tasks; None: it leaves none out."""
    if not is_own_code(config.tasks.dataset):
        return None
    return ignored_label(config.learner.loss, config.learner.loss_args)


def find_metric(config: Config) -> Metric | None:
    """Return the user's metric, if any; UsageError if there is none of that name."""
    options = config.evaluation
    return build_metric(options.metric, options.metric_mode) if options.metric else None


def try_outputs(
    learner: nn.Module, example: Tree, targets: Tree | None, outputs: int, config: Config
) -> Reading | None:
    """Call the learner on a task's inputs, and return what its outputs mean; None without targets.

    Raises UsageError where it fails, or its outputs fit neither the loss nor --outputs.
    """
    name, loss = f"--learner {config.learner.learner}", config.learner.loss
    shapes = tree_map(lambda part: tuple(part.shape), example)
    examples = len(first_tensor(example))
    output = _call_learner(learner, example, name, shapes)
    scores = main_tensor(output)
    if scores.shape[:1] != (examples,):
        raise UsageError(
            f"{name} gives outputs {tuple(scores.shape)} for inputs {shapes}: the main one, called logits or "
            "out, or the first, should be [examples, ...]"
        )
    expected = _expected_shape(scores, targets, examples, outputs, loss)
    if loss in LOSSES and tuple(scores.shape) != expected:
        raise UsageError(
            f"{name} gives outputs {tuple(scores.shape)} for inputs {shapes}: they should be {expected}"
            + ", [examples, outputs]" * (len(expected) == 2)
        )
    if targets is None:
        return None
    _check_shares(scores, first_tensor(targets), loss)
    try:
        return read_outputs(
            output,
            targets,
            kind=config.learner.outputs,
            ways=outputs if config.tasks.classification else None,
            loss=loss,
            ignored=find_ignored_label(config),
            floor=variance_floor(loss, config.learner.loss_args),
        )
    except ValueError as error:
        raise UsageError(f"--outputs {config.learner.outputs}: {error}") from error


def _call_learner(learner: nn.Module, example: Tree, name: str, shapes: Tree) -> Tree:
    """Return the outputs of one pass; UsageError where it fails, or they are no tensors."""
    positional, keywords = make_arguments(example)
    first = first_tensor(example)
    keys = torch.zeros(2, dtype=torch.int64, device=first.device)
    with blame_flags(name):
        copied = convert_batch_norm(copy_module(learner))  # PyTorch's takes no single example
    failing = blame_flags(f"{name} fails on the inputs of a task, {shapes}")
    with failing, blame_layer(copied), torch.no_grad(), Elementary(keys, first):
        output = copied(*positional, **keywords)
    register_outputs(output)
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor):
            kinds = "tensors, or tuples, dictionaries and dataclasses of them"
            raise UsageError(f"{name} gives a {type(leaf).__name__} as an output: outputs should be {kinds}")
    if not pytree.tree_leaves(output):
        raise UsageError(f"{name} gives no output for inputs {shapes}")
    return output


def _check_shares(scores: Tensor, targets: Tensor, loss: str) -> None:
    """Raise UsageError for targets of binary cross-entropy that are neither labels nor shares of them."""
    if loss == "bce" and targets.shape == scores.shape and bool(((targets < 0) | (targets > 1)).any()):
        low, high = targets.min().item(), targets.max().item()
        raise UsageError(
            f"--loss bce takes targets from 0 to 1: a task has some from {low:.4g} to {high:.4g}"
        )


def register_outputs(tree: Tree) -> None:
    """Make the dataclasses among a learner's outputs trees for PyTorch's transforms."""
    if is_dataclass(tree) and type(tree) not in pytree.SUPPORTED_NODES:
        register_tree(type(tree))
    for part in pytree.tree_flatten(tree, is_leaf=lambda part: part is not tree)[0]:
        if part is not tree:
            register_outputs(part)


def _expected_shape(
    scores: Tensor, targets: Tree | None, examples: int, outputs: int, loss: str
) -> tuple[int, ...]:
    """Return the shape that a built-in loss requires of the main output."""
    if targets is None:
        return examples, outputs, *scores.shape[2:]
    labels = first_tensor(targets)
    if loss == "gaussian-nll":
        shape = [*labels.shape]
        shape[target_axis(len(shape))] *= 2
        return tuple(shape)
    alike = loss in ("mse", "huber") or labels.is_floating_point() or labels.shape == scores.shape
    return tuple(labels.shape) if alike else (examples, outputs, *labels.shape[1:])


def describe_reading(reading: Reading, targets: Tree, config: Config) -> str | None:
    """Return how outputs are read, in words, unless it goes without saying."""
    own_loss, labels = config.learner.loss not in LOSSES, first_tensor(targets)
    if reading.kind == "numbers" and config.tasks.classification:
        ways = config.tasks.ways
        return f"they are no scores of {ways} classes, so that no accuracy is measured (see --outputs)"
    if reading.kind == "numbers":
        zero_or_one = bool(((labels == 0) | (labels == 1)).all())
        hint = "numbers, though the targets are 0 and 1: logits are read as such with --outputs labels"
        return hint if own_loss and zero_or_one else None
    plain = reading.kind == "classes" and reading.numbers == reading.classes and reading.ignored is None
    return None if plain else reading.describe()


def with_metric(reading: Reading | None, config: Config, scales: Scales) -> Reading | None:
    """Return a reading with the user's metric, if there is one, which is measured in the targets' units."""
    metric = find_metric(config)
    if not (reading and metric):
        return reading
    if metric.name in reading.further:
        words = f"{metric.name} is measured anyway; give your own function another name"
        raise UsageError(f"{metric.flag}: {words}")
    in_units = partial(undo_scale, scales=scales, part="target") if "target" in scales else None
    return replace(reading, metric=metric, in_units=in_units)

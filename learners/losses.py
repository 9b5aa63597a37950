"""Losses: functions of the outputs and the targets of one task, averaged over its examples.

`MAML` takes one loss, built from `--loss` by `build_loss`. The losses here read the main output of a network
with several outputs; the user's own loss gets all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.batch import Tree, first_tensor
from common.errors import UsageError
from common.names import is_own_code, parse_name
from common.own_code import check_order, find_parameters, load_code, parse_arguments
from learners.elementary import Elementary
from learners.gaussian import FLOOR, log_density, split_normal
from learners.reading import IGNORED, main_tensor


def mse(outputs: Tree, targets: Tree) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(main_tensor(outputs), first_tensor(targets))


def cross_entropy(
    outputs: Tree, targets: Tree, *, label_smoothing: float = 0.0, ignore_index: int = IGNORED
) -> Tensor:
    """Return the cross-entropy of logits `[examples, classes, ...]` and classes, int64 `[examples, ...]`."""
    smoothing, ignored = label_smoothing, ignore_index
    logits, labels = main_tensor(outputs), first_tensor(targets)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=ignored)


def bce(outputs: Tree, targets: Tree) -> Tensor:
    """Return the binary cross-entropy of logits `[examples, outputs]`.

    Targets have the same shape, or are classes, int64 `[examples]`: 1 for the class, 0 for the others.
    """
    logits, labels = main_tensor(outputs), first_tensor(targets)
    if not labels.is_floating_point() and labels.shape != logits.shape:
        labels = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def huber(outputs: Tree, targets: Tree, *, delta: float = 1.0) -> Tensor:
    """Return half the squared error up to `delta`, and a linear function beyond it."""
    return F.huber_loss(main_tensor(outputs), first_tensor(targets), delta=delta)


def gaussian_nll(outputs: Tree, targets: Tree, *, floor: float = FLOOR) -> Tensor:
    """Return the negative log-likelihood of a target, in nats; outputs are normal distributions."""
    mean, variance = split_normal(main_tensor(outputs), floor)
    return -log_density(first_tensor(targets), mean, variance).mean()


LOSSES: dict[str, Callable[..., Tensor]]
LOSSES = {"mse": mse, "cross-entropy": cross_entropy, "bce": bce, "huber": huber}
LOSSES |= {"gaussian-nll": gaussian_nll}
_TITLES = {"mse": "MSE", "bce": "binary cross-entropy", "huber": "Huber loss", "gaussian-nll": "Gaussian NLL"}


def loss_name(name: str) -> str:
    """Return what tables and figures call a loss: a title, or the name of the user's function."""
    return _TITLES.get(name, parse_name(name).factory or name)


def build_loss(name: str, arguments: tuple[str, ...] = ()) -> Callable[[Any, Any], Tensor]:
    """Return a loss by name, a key of `LOSSES` or `file.py:function`, with `NAME=VALUE` arguments bound.

    Raises UsageError if there is no such function, or if a built-in one does not take the arguments.
    """
    function = load_code(name, "--loss") if is_own_code(name) else LOSSES[name]
    loss = partial(function, **parse_arguments(arguments)) if arguments else function
    if name not in LOSSES:
        check_order(function, f"--loss {name}")
        _check_fixed(function, f"--loss {name}")
        return partial(_one_number, loss, name)
    if arguments:
        target = torch.zeros(1, dtype=torch.int64) if name == "cross-entropy" else torch.zeros(1, 1)
        try:  # report a wrong argument before there is work with the data
            loss(torch.zeros(1, 1 + (name == "gaussian-nll")), target)
        except Exception as error:
            raise UsageError(f"--loss-args {' '.join(arguments)} with --loss {name}: {error}") from error
    return loss


def _check_fixed(function: Callable[..., Tensor], flag: str) -> None:
    """Raise UsageError for a loss with trainable weights: a module, or a function that reads its file's."""
    code, values = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    parts = {"": function} if code is None else {name: values.get(name) for name in code.co_names}
    for place, part in parts.items():
        weights = dict(part.named_parameters(place)) if isinstance(part, nn.Module) else {place: part}
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                raise UsageError(
                    f"{flag} has a trainable weight, {name}, which training would leave as it is: let the "
                    "learner keep it and return it with its outputs, or freeze it, requires_grad_(False)"
                )


def ignored_label(name: str, arguments: tuple[str, ...] = ()) -> int:
    """Return the label that a loss leaves out: its argument `ignore_index`, or PyTorch's default of it."""
    function = load_code(name, "--loss") if is_own_code(name) else LOSSES[name]
    default = getattr(find_parameters(function).get("ignore_index"), "default", IGNORED)
    value = parse_arguments(arguments).get("ignore_index", default)
    return value if isinstance(value, int) else IGNORED


def variance_floor(name: str, arguments: tuple[str, ...] = ()) -> float:
    """Return the floor of the variances that a loss reads in outputs: the argument of "gaussian-nll"."""
    return parse_arguments(arguments).get("floor", FLOOR) if name == "gaussian-nll" else FLOOR


def _one_number(loss: Callable[[Any, Any], Tensor], name: str, outputs: Any, targets: Any) -> Tensor:
    with Elementary(like=first_tensor(outputs)):  # a layer norm or a determinant may be in a loss, too
        try:
            value = loss(outputs, targets)
        except ValueError as error:
            if "give keys" in str(error):
                raise UsageError(f"--loss {name} draws random numbers: draw them in the learner") from error
            raise
    if not isinstance(value, Tensor) or value.dim():
        shape = getattr(value, "shape", type(value).__name__)
        raise UsageError(f"--loss {name} gives {shape}: it should give one number, a tensor")
    return value

"""Losses: functions of the outputs and the targets of one task, means over its examples.

A network with several outputs: the losses here look at the first; one of the user's own gets all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.batch import Tree, first_tensor
from common.errors import UsageError
from common.own_code import arguments_from, is_own_code, load_code

NAMES = {  # in tables and figures
    "mse": "MSE",
    "cross-entropy": "cross-entropy",
    "bce": "binary cross-entropy",
    "huber": "Huber loss",
}


def mse(outputs: Tree, targets: Tree) -> Tensor:
    return functional.mse_loss(first_tensor(outputs), first_tensor(targets))


def cross_entropy(outputs: Tree, targets: Tree, *, label_smoothing: float = 0.0) -> Tensor:
    return functional.cross_entropy(
        first_tensor(outputs), first_tensor(targets), label_smoothing=label_smoothing
    )


def bce(outputs: Tree, targets: Tree) -> Tensor:
    """Of logits. Classes become one target for each output: 1 for the class, 0 for all others."""
    logits, wanted = first_tensor(outputs), first_tensor(targets)
    if not wanted.is_floating_point():
        wanted = wanted[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    return functional.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype))


def huber(outputs: Tree, targets: Tree, *, delta: float = 1.0) -> Tensor:
    """Half the squared error up to `delta`, linear beyond it."""
    error = first_tensor(outputs) - first_tensor(targets)
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error * error, delta * (size - 0.5 * delta)).mean()


def accuracy(outputs: Tree, targets: Tensor) -> Tensor:
    """Return the share of correct classes, averaged over the last axis.

    Args:
        outputs: scores `[..., examples, classes]`; the first tensor of several outputs.
        targets: classes, int64 `[..., examples]`.

    Returns:
        float32 `[...]`, between 0 and 1.
    """
    return (first_tensor(outputs).argmax(-1) == targets).float().mean(-1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "cross-entropy": cross_entropy,
    "bce": bce,
    "huber": huber,
}


def loss_name(name: str) -> str:
    """What tables and figures call the loss."""
    return NAMES.get(name, name.rpartition(":")[2])


def build_loss(name: str, arguments: tuple[str, ...] = ()) -> Callable[[Any, Any], Tensor]:
    """The loss of that name, or the user's function.

    Raises UsageError where there is none, or it does not take the arguments.
    """
    given = arguments_from(arguments)
    function = load_code(name, "--loss") if is_own_code(name) else LOSSES[name]
    loss = partial(function, **given) if given else function
    if given and not is_own_code(name):  # a wrong name or value is better known now
        target = torch.zeros(1, dtype=torch.int64) if name == "cross-entropy" else torch.zeros(1, 1)
        try:
            loss(torch.zeros(1, 1), target)
        except Exception as error:
            raise UsageError(f"--loss-args {' '.join(arguments)} with --loss {name}: {error}") from error
    return loss

"""Losses: functions of the outputs and the targets of one task, averaged over its examples.

`MAML` takes one loss, built from `--loss` by `build_loss`. The losses here read the main output of a network
with several outputs; the user's own loss gets all of them. `mask` says which examples count, `ways` how many
of the classes; None: all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from common.batch import Tree, append_axes, first_tensor, index_tree
from common.errors import UsageError
from common.names import is_own_code, parse_name
from common.own_code import check_order, find_parameters, load_code, parse_arguments, select_accepted
from common.task import Extras
from learners.elementary import Elementary
from learners.gaussian import FLOOR, log_density, split_normal
from learners.padding import cut, masked_mean
from learners.reading import IGNORED, cut_outputs, main_tensor


def mse(outputs: Tree, targets: Tree, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error."""
    return _mean(partial(F.mse_loss, *_of_one_type(outputs, targets)), mask)


def cross_entropy(
    outputs: Tree,
    targets: Tree,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED,
    mask: Tensor | None = None,
    ways: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of logits `[examples, classes, ...]` and classes, int64 `[examples, ...]`.

    Smoothing is over the classes of the task.
    """
    logits, labels = main_tensor(outputs), first_tensor(targets)
    if mask is not None:
        labels = labels.where(append_axes(mask, labels.dim()), ignore_index)
    smoothing = label_smoothing if ways is None else 0.0
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=ignore_index)
    if ways is None or not label_smoothing:
        return loss
    real = torch.arange(logits.shape[1], device=logits.device) < ways
    logs = logits.log_softmax(1).movedim(1, -1).where(real, 0.0).sum(-1) / ways  # [examples, ...]
    labelled = (labels != ignore_index).to(logs.dtype)
    return (1 - label_smoothing) * loss - label_smoothing * (logs * labelled).sum() / labelled.sum()


def bce(outputs: Tree, targets: Tree, *, mask: Tensor | None = None, ways: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropy of logits `[examples, outputs]`.

    Targets have the same shape, or are classes, int64 `[examples]`: 1 for the class, 0 for the others.
    """
    logits, labels = main_tensor(outputs), first_tensor(targets)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    if not labels.is_floating_point() and labels.shape != logits.shape:
        labels = labels[..., None] == classes
    loss = _mean(partial(F.binary_cross_entropy_with_logits, logits, labels.to(logits.dtype)), mask)
    return loss if ways is None else loss * logits.shape[-1] / ways  # hidden classes cost nothing


def huber(outputs: Tree, targets: Tree, *, delta: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return half the squared error up to `delta`, and a linear function beyond it."""
    return _mean(partial(F.huber_loss, *_of_one_type(outputs, targets), delta=delta), mask)


def _of_one_type(outputs: Tree, targets: Tree) -> tuple[Tensor, Tensor]:
    """Return both as tensors; targets, whole numbers too, get the type of outputs, as PyTorch 2.11 wants."""
    main = main_tensor(outputs)
    return main, first_tensor(targets).to(main.dtype)


def _mean(loss: Callable[..., Tensor], mask: Tensor | None) -> Tensor:
    """Return a mean over examples that PyTorch computes, or of those that count."""
    return loss() if mask is None else masked_mean(loss(reduction="none"), mask)


class TaskLoss:
    """A loss as the loops call it: the mean over the examples of a task that count.

    Args:
        loss: maps outputs and targets to a mean over examples. It may have parameters `mask` and `ways`,
            which say what counts; else it is called with single examples, and their mean is taken.
        unpads: call it with tasks without padding, as they are; not under `vmap`.
    """

    def __init__(self, loss: Callable[..., Tensor], *, unpads: bool = False) -> None:
        self.loss, self.unpads = loss, unpads

    def __call__(self, outputs: Tree, targets: Tree, extras: Extras | None = None) -> Tensor:
        mask, ways = (extras.mask, extras.ways) if extras else (None, None)
        if mask is None and ways is None:
            return self.loss(outputs, targets)
        if self.unpads:
            return self.loss(cut_outputs(outputs, mask, ways), cut(targets, mask))
        sizes = {name: size for name, size in (("mask", mask), ("ways", ways)) if size is not None}
        loss, accepted = self.loss, select_accepted(self.loss, sizes)
        if mask is None or "mask" in accepted:
            return loss(outputs, targets, **accepted)

        def of_one(*example: Tree) -> Tensor:
            return loss(*index_tree(example, None), **accepted)

        return masked_mean(vmap(of_one)(outputs, targets), mask)


def gaussian_nll(outputs: Tree, targets: Tree, *, floor: float = FLOOR, mask: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of a target, in nats; outputs are normal distributions."""
    mean, variance = split_normal(main_tensor(outputs), floor)
    return -masked_mean(log_density(first_tensor(targets), mean, variance), mask)


LOSSES: dict[str, Callable[..., Tensor]]
LOSSES = {"mse": mse, "cross-entropy": cross_entropy, "bce": bce, "huber": huber}
LOSSES |= {"gaussian-nll": gaussian_nll}
SCALED = ("mse", "huber", "gaussian-nll")  # of standardised targets; others may need them as they are
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
        return update_wrapper(partial(_one_number, loss, name), loss)  # with its parameters
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


def ignored_label(name: str, arguments: tuple[str, ...] = ()) -> int | None:
    """Return the label that a loss leaves out: its argument `ignore_index`, or PyTorch's default of it.

    None for a built-in loss without that argument, which leaves nothing out.
    """
    parameters = find_parameters(load_code(name, "--loss") if is_own_code(name) else LOSSES[name])
    if name in LOSSES and "ignore_index" not in parameters:
        return None
    default = getattr(parameters.get("ignore_index"), "default", IGNORED)
    value = parse_arguments(arguments).get("ignore_index", default)
    return value if isinstance(value, int) else IGNORED


def variance_floor(name: str, arguments: tuple[str, ...] = ()) -> float:
    """Return the floor of the variances that a loss reads in outputs: the argument of "gaussian-nll"."""
    return parse_arguments(arguments).get("floor", FLOOR) if name == "gaussian-nll" else FLOOR


def _one_number(loss: Callable[..., Tensor], name: str, outputs: Any, targets: Any, **sizes: Any) -> Tensor:
    with Elementary(like=first_tensor(outputs)):  # a layer norm or a determinant may be in a loss, too
        try:
            value = loss(outputs, targets, **sizes)
        except ValueError as error:
            if "give keys" in str(error):
                raise UsageError(f"--loss {name} draws random numbers: draw them in the learner") from error
            raise
    if not isinstance(value, Tensor) or value.dim():
        shape = getattr(value, "shape", type(value).__name__)
        raise UsageError(f"--loss {name} gives {shape}: it should give one number, a tensor")
    return value

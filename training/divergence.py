"""Why the numbers of an iteration are not finite, in words: looked into once it has happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import TaskBatch, first_tensor
from common.optimizers import Weights
from evaluation.meta_test import diverged, loss_per_step
from maml import MAML
from training.meta_gradients import Reptile

UNKNOWN = (
    "the loss or what it leads to is not finite, and computed again it is: try a smaller --meta-lr or "
    "--grad-clip"
)
SHOWN = 5  # losses of a task


def cause(
    maml: MAML, parameters: Weights, batch: TaskBatch, given: dict[str, Any], *, first: int = 0
) -> str | None:
    """What is wrong with these tasks under these meta-parameters, and what to do; None: nothing is.

    Arguments:
        given: what else `MAML.meta_gradient` takes.
        first: the number of the first task.
    """
    found = _in_data(batch, first)
    if found:
        return found
    if any(not bool(w.isfinite().all()) for w in parameters.values()):
        return "the meta-parameters are not finite: begin again from an earlier checkpoint"
    # Reptile's minibatches are of support and query together
    order = None if isinstance(maml.way, Reptile) else given.get("order")
    outputs = maml.predictions(
        parameters, batch, maml.steps, (maml.normalisation,), order=order, keys=given.get("keys")
    )
    predicted = outputs[maml.normalisation]
    losses = loss_per_step(maml, predicted, batch.query_y)
    infinite = ~losses.isfinite()
    if infinite[:, 0].any():
        task = _where(infinite[:, 0])
        said = f"the query loss of task {first + task} is {losses[task, 0]:.3g} before the first inner step"
        if bool(first_tensor(predicted)[task, 0].isfinite().all()):
            return f"{said}, though the outputs are finite: look at the loss, or at the size of the targets"
        return f"{said}: the weights have become too large; try a smaller --meta-lr, or --grad-clip"
    grown = diverged(losses)
    worst = losses.nan_to_num(nan=torch.inf).amax(1).argmax()
    result = maml.meta_gradient(parameters, batch, **given)
    bad = [name for name, g in result.gradients.items() if not bool(g.isfinite().all())]
    if grown.any():
        return (
            f"the inner loop diverges in {int(grown.any(1).sum())} of {len(losses)} tasks (query loss of "
            f"task {first + int(worst)}: {_listed(losses[worst].tolist())}): try a smaller --inner-lr, "
            "--inner-clip, or fewer steps (-s)"
        )
    if bad:
        return (
            f"the losses are finite (up to {losses.max():.3g}), but not the meta-gradient of {bad[0]}: try "
            "--first-order, a smaller --inner-lr or another loss"
        )
    norm = torch.stack([g.double().norm() for g in result.gradients.values()]).norm()
    if norm > 1e15:
        return f"the meta-gradient's norm is {norm:.3g}, too large for Adam: try --grad-clip-norm"
    return None


def _in_data(batch: TaskBatch, first: int) -> str | None:
    parts = dict(
        zip(("support inputs", "support targets", "query inputs", "query targets"), batch, strict=True)
    )
    for name, tree in parts.items():
        for tensor in filter(Tensor.is_floating_point, pytree.tree_leaves(tree)):
            bad = ~tensor.isfinite().flatten(1).all(1)
            if bad.any():
                return f"the {name} of task {first + _where(bad)} are not all finite: clean the data"
    return None


def _where(flags: Tensor) -> int:
    """The position of the first that is set."""
    return int(flags.int().argmax())


def _listed(values: Sequence[float]) -> str:
    shown = [f"{value:.3g}" for value in values]
    return ", ".join(shown if len(shown) <= SHOWN else [*shown[: SHOWN - 1], "...", shown[-1]])

"""Why the numbers of an iteration are not finite, in words.

The trainer asks once an iteration has failed; the answer ends up in the run's error line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import TaskBatch, first_tensor
from common.optimizers import Weights
from evaluation.meta_test import diverged, loss_per_step
from maml import MAML, MetaGradient
from training.meta_gradients import make_meta_gradient

UNKNOWN = (
    "the loss or what it leads to is not finite, and computed again it is: try a smaller --meta-lr or "
    "--grad-clip"
)
SHOWN = 5  # losses of a task


def find_cause(
    maml: MAML, parameters: Weights, batch: TaskBatch, inputs: dict[str, Any], *, first: int = 0
) -> str | None:
    """Return what is wrong with these tasks under these meta-parameters, and what to do about it.

    Args:
        inputs: what else `MAML.meta_gradient` takes, by name.
        first: the number of the batch's first task.

    Returns:
        One line; None where everything is finite.
    """
    problem = _check_data(batch, first)
    if problem:
        return problem
    if any(not bool(w.isfinite().all()) for w in parameters.values()):
        return "the meta-parameters are not finite: start again from an earlier checkpoint"
    # Reptile's minibatches are of support and query together
    order = None if maml.choices.meta_gradient == "reptile" else inputs.get("order")
    outputs = maml.predictions(
        parameters, batch, maml.steps, (maml.normalisation,), order=order, keys=inputs.get("keys")
    )[maml.normalisation]
    losses = loss_per_step(maml, outputs, batch.query_y)  # [tasks, steps + 1]
    at_start = ~losses[:, 0].isfinite()
    if at_start.any():
        task = _first_set(at_start)
        line = f"the query loss of task {first + task} is {losses[task, 0]:.3g} before the first inner step"
        if bool(first_tensor(outputs)[task, 0].isfinite().all()):
            return f"{line}, though the outputs are finite: check the loss and the size of the targets"
        return f"{line}: the weights have become too large; try a smaller --meta-lr, or --grad-clip"
    growth = _explain_growth(losses, first)
    return growth or _check_gradient(make_meta_gradient(maml)(parameters, batch, **inputs), losses)


def _check_data(batch: TaskBatch, first: int) -> str | None:
    parts = {
        "support inputs": batch.support_x,
        "support targets": batch.support_y,
        "query inputs": batch.query_x,
        "query targets": batch.query_y,
    }
    for name, tree in parts.items():
        for tensor in filter(Tensor.is_floating_point, pytree.tree_leaves(tree)):
            bad = ~tensor.isfinite().flatten(1).all(1)
            if bad.any():
                return f"the {name} of task {first + _first_set(bad)} are not all finite: clean the data"
    return None


def _explain_growth(losses: Tensor, first: int) -> str | None:
    """Say which tasks diverge in the inner loop; `losses`: [tasks, steps + 1]."""
    grown = diverged(losses).any(1)
    if not grown.any():
        return None
    worst = losses.nan_to_num(nan=torch.inf).amax(1).argmax()
    return (
        f"the inner loop diverges in {int(grown.sum())} of {len(losses)} tasks (query loss of "
        f"task {first + int(worst)}: {_listed(losses[worst].tolist())}): try a smaller --inner-lr, "
        "--inner-clip, or fewer steps (-s)"
    )


def _check_gradient(result: MetaGradient, losses: Tensor) -> str | None:
    bad = [name for name, g in result.gradients.items() if not bool(g.isfinite().all())]
    if bad:
        return (
            f"the losses are finite (up to {losses.max():.3g}), but not the meta-gradient of {bad[0]}: try "
            "--first-order, a smaller --inner-lr or another loss"
        )
    norm = torch.stack([g.double().norm() for g in result.gradients.values()]).norm()
    if norm > 1e15:
        return f"the meta-gradient's norm is {norm:.3g}, too large for Adam: try --grad-clip-norm"
    return None


def _first_set(flags: Tensor) -> int:
    return int(flags.int().argmax())


def _listed(values: Sequence[float]) -> str:
    shown = [f"{value:.3g}" for value in values]
    return ", ".join(shown if len(shown) <= SHOWN else [*shown[: SHOWN - 1], "...", shown[-1]])

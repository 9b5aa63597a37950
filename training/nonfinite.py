"""Explain in words why the numbers of an iteration are not finite.

The trainer asks once an iteration has failed; the answer ends up in the run's error line.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import TaskBatch
from common.optimizers import Weights
from evaluation.meta_test import find_diverged, loss_per_step
from maml import MAML

LARGE = 100.0  # far from the 1 that initial weights and learning rates are made for
UNKNOWN = "weights, targets or the update are too large: try --grad-clip-norm or a smaller --meta-lr"


def find_cause(
    maml: MAML, parameters: Weights, batch: TaskBatch, inputs: dict[str, Any], *, first: int = 0
) -> str | None:
    """Return in one line what is wrong with these tasks under these meta-parameters, and what to do about it.

    Args:
        inputs: what else `MAML.meta_gradient` takes, by name; of these `order` and `keys` count.
        first: the number of the batch's first task.
    """
    for name, tree in batch.parts.items():
        for tensor in filter(Tensor.is_floating_point, pytree.tree_leaves(tree)):
            bad = ~tensor.isfinite().flatten(1).all(1)
            if bad.any():
                part = name.replace("_x", " inputs").replace("_y", " targets")
                return (
                    f"the {part} of task {first + int(bad.nonzero()[0])} are not all finite: clean the data"
                )
    # Reptile's minibatches are of support and query together
    order = None if maml.choices.meta_gradient == "reptile" else inputs.get("order")
    norm = maml.choices.query_norm
    outputs = maml.predictions(parameters, batch, maml.steps, (norm,), order=order, keys=inputs.get("keys"))
    losses = loss_per_step(maml, outputs[norm], batch)  # [tasks, steps + 1]
    grown = find_diverged(losses).any(1)
    if grown.any() and losses[:, 0].isfinite().all():
        if large := _find_large(batch):
            return large
        task = int(losses.nan_to_num(nan=torch.inf).amax(1).argmax())
        return (
            f"the inner loop diverges in {int(grown.sum())} of {len(losses)} tasks (query loss of task "
            f"{first + task}: from {losses[task, 0]:.3g} to {losses[task, -1]:.3g}): try a smaller "
            "--inner-lr, --inner-clip, or fewer steps (-s)"
        )
    return None


def _find_large(batch: TaskBatch) -> str | None:
    """Return in one line which inputs or targets are too large for usual learning rates."""
    for tree, name in ((batch.support_x, "inputs"), (batch.support_y, "targets")):
        sizes = [t.abs().max().item() for t in pytree.tree_leaves(tree) if t.is_floating_point()]
        if sizes and max(sizes) > LARGE:
            way = "scale them (a table: leave --no-standardise out), or try a far smaller --inner-lr"
            return f"the inner loop diverges, and {name} reach {max(sizes):.2g}: {way}"
    return None

"""A function of one task as a function of many: by `vmap`, or by a loop over tasks.

Learners that `vmap` cannot take (a `.item()`, a decision that depends on data, an operator without a rule)
have exact derivatives in the loop too; it costs their number in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

OverTasks = Callable[..., Callable[..., Any]]


def one_by_one(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """Return what `torch.func.vmap` would, by a loop; arguments with `in_dims` None are shared by tasks."""

    def loop(*arguments: Any) -> Any:
        axes = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        per_task = [argument for argument, axis in zip(arguments, axes, strict=True) if axis is not None]
        tasks = len(pytree.tree_leaves(per_task)[0])

        def select(argument: Any, axis: int | None, task: int) -> Any:
            return argument if axis is None else pytree.tree_map(lambda tensor: tensor[task], argument)

        results = [
            function(*(select(argument, axis, task) for argument, axis in zip(arguments, axes, strict=True)))
            for task in range(tasks)
        ]
        return pytree.tree_map(lambda *parts: torch.stack(parts), *results)

    return loop


def over_tasks(vectorised: bool) -> OverTasks:
    """Return `vmap`, or the loop over tasks in its form."""
    return vmap if vectorised else one_by_one

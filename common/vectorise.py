"""A function of one task as a function of many: by `vmap`, or one after another where that cannot be.

What no `vmap` can take (a `.item()`, a decision that depends on data, an operator without a rule) still has
exact derivatives when tasks go one by one; it costs their number in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

OverTasks = Callable[..., Callable[..., Any]]


def one_by_one(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """As `torch.func.vmap`, by a loop: arguments whose `in_dims` is 0 have tasks as their first axis."""

    def loop(*arguments: Any) -> Any:
        axes = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        per_task = [a for a, axis in zip(arguments, axes, strict=True) if axis is not None]
        tasks = len(pytree.tree_leaves(per_task)[0])

        def of_task(argument: Any, axis: int | None, task: int) -> Any:
            return argument if axis is None else pytree.tree_map(lambda t: t[task], argument)

        results = [
            function(*(of_task(a, axis, task) for a, axis in zip(arguments, axes, strict=True)))
            for task in range(tasks)
        ]
        return pytree.tree_map(lambda *parts: torch.stack(parts), *results)

    return loop


def over_tasks(vectorised: bool) -> OverTasks:
    """How functions of one task become functions of many."""
    return vmap if vectorised else one_by_one

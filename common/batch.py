"""The only currency between datasets and algorithms: a batch of tasks as four tensors.

Where a learner has several inputs or outputs, a nested tuple or dictionary of tensors stands in the place
of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # a tensor, or tensors in nested tuples and dictionaries


class TaskBatch(NamedTuple):
    """A meta-batch: every tensor has tasks as its first axis and examples as its second."""

    support_x: Tree  # [tasks, support examples, ...]
    support_y: Tree  # [tasks, support examples, ...]
    query_x: Tree  # [tasks, query examples, ...]
    query_y: Tree  # [tasks, query examples, ...]


class TaskDistribution(Protocol):
    """Anything that samples tasks."""

    classification: bool  # labels are classes, and accuracy means something
    # `sample` computes tasks from numbers alone, so that it can be compiled with the step, and takes the seed
    # and the tasks' numbers as int64 tensors, too
    computed: bool
    on_host: bool  # `sample` works on the host, ahead of its call: it asks for the iteration as a number

    @property
    def examples(self) -> int:
        """Support and query examples of one task."""
        ...

    @property
    def split_names(self) -> dict[str, list[str]]:
        """The classes, or tasks, of each split, where they come from files of the user's; else empty."""
        ...

    def resized(self, shots: int) -> TaskDistribution:
        """The same tasks with another number of support examples (per class in classification)."""
        ...

    def sample(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> TaskBatch:
        """The tasks with these numbers of an iteration, of the "train", "validation" or "test" split.

        The iteration may be an int64 scalar on the distribution's device; the tasks are the same.
        """
        ...


def tree_map(function: Callable[..., Any], *trees: Tree) -> Tree:
    """The function of each tensor, or of the tensors in the same places of several trees."""
    if all(isinstance(tree, Tensor) for tree in trees):
        return function(*trees)
    return pytree.tree_map(function, *trees)


def arguments_of(x: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as a module is called with them: several are a tuple, or a dictionary by name."""
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def first_tensor(tree: Tree) -> Tensor:
    """The first tensor of a tree: of several inputs or outputs, the main one."""
    return tree if isinstance(tree, Tensor) else pytree.tree_leaves(tree)[0]


def joined(trees: list[Tree], axis: int = 0) -> Tree:
    """The tensors of equal trees, concatenated."""
    return trees[0] if len(trees) == 1 else tree_map(lambda *parts: torch.cat(parts, axis), *trees)


def stacked_trees(trees: list[Tree]) -> Tree:
    """The tensors of equal trees, stacked along a new first axis."""
    return tree_map(lambda *parts: torch.stack(parts), *trees)


def in_type(tree: Tree, dtype: torch.dtype) -> Tree:
    """The floating-point tensors of a tree in another type."""
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

"""The only currency between datasets and algorithms: a batch of tasks as named tensors.

Datasets give batches (`TaskDistribution.sample`), learning and evaluation take them. A learner with several
inputs or outputs has a nested tuple or dictionary of tensors where others have one tensor: a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.sizes import Size, find_largest

Tree = Any  # a tensor, or tensors in nested tuples and dictionaries


def register_tree(cls: type) -> type:
    """Make a dataclass of tensors a tree for PyTorch's transforms; its fields that are None vanish."""
    pytree.register_dataclass(cls)
    return cls


@register_tree
@dataclass(frozen=True)
class TaskBatch:
    """A meta-batch: every tensor has tasks as its first axis, and parts and masks examples as their second.

    Tasks of different sizes are padded with finite numbers, which masks leave out. Iterating gives the four
    parts of tasks of one size; ValueError where masks would be lost.
    """

    support_x: Tree  # [tasks, support examples, ...]
    support_y: Tree  # [tasks, support examples, ...]
    query_x: Tree  # [tasks, query examples, ...]
    query_y: Tree  # [tasks, query examples, ...]
    support_mask: Tensor | None = None  # bool [tasks, support examples], False for padding; None: none is
    query_mask: Tensor | None = None  # bool [tasks, query examples]
    ways: Tensor | None = None  # int64 [tasks], number of classes; None: as many as scores

    @property
    def parts(self) -> dict[str, Tree]:
        """Return inputs and targets of support and query, by name."""
        return {name: getattr(self, name) for name in ("support_x", "support_y", "query_x", "query_y")}

    def __iter__(self) -> Iterator[Tree]:
        if not (self.support_mask is self.query_mask is self.ways is None):
            raise ValueError("tasks of different sizes are more than four parts: name those that you need")
        return iter(self.parts.values())


TABLE = "table"  # a fingerprint's key


@dataclass(frozen=True)
class DataRecord:
    """A checkpoint's record of its data, by which they are recognised; parts that do not apply are empty."""

    splits: dict[str, list[str]] = field(default_factory=dict)  # the user's classes or tasks, by split
    inputs: list[str] = field(default_factory=list)  # columns of a table
    image_range: list[str] = field(default_factory=list)  # kind of the files, black, white; or plain
    fingerprint: dict[str, list[str]] = field(default_factory=dict)  # of a sampler, by sizes; of a `TABLE`


class TaskDistribution(Protocol):
    """Anything that samples tasks. Callers know a distribution by these members alone, never by its class.

    Attributes:
        kind: "curves" and "images" can be drawn (see `sample_to_draw`); "other" cannot.
        ways: classes of a task, labelled from 0; None in regression.
        scales: means and deviations `[2, columns]` by which "input" and "target" are standardised.
        computed: `sample` is made of operations on tensors alone. It can be compiled with the step, and takes
            the seed and the numbers of the tasks as int64 tensors too.
        tensors: what such a `sample` reads, by name: the inputs of a compiled step.
        on_host: `sample` works on the host, a batch ahead, and requires a plain number as the iteration.
        parts: the data sets of a mixture by name, each of which is measured by itself; empty for others.
    """

    kind: Literal["curves", "images", "other"] = "other"
    ways: Size | None = None
    scales: Mapping[str, Tensor] = MappingProxyType({})
    computed: bool = False
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    on_host: bool = False
    parts: Mapping[str, TaskDistribution] = MappingProxyType({})

    @property
    def classification(self) -> bool:
        """Labels are classes, and accuracy is defined."""
        return self.ways is not None

    @property
    def most_ways(self) -> int | None:
        """The most classes that a task may have."""
        return None if self.ways is None else find_largest(self.ways)

    @property
    def record(self) -> DataRecord:
        """The record of the data that a checkpoint keeps, which is empty for built-in data."""
        return DataRecord()

    @property
    def summary(self) -> list[str]:
        """Say in short lines what was read, split, left out or changed."""
        return []

    def with_scales(self, scales: Mapping[str, Tensor]) -> TaskDistribution:
        """Return these tasks standardised by other statistics: a checkpoint's."""
        return self

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TaskDistribution:
        """Return these tasks with `tensors` instead of their own of the same names; others are ignored."""
        return self

    def resized(self, shots: Size) -> TaskDistribution:
        """Return these tasks with other numbers of support examples (per class in classification)."""
        ...

    def sample(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> TaskBatch:
        """Return the tasks of these numbers: a pure function of split, seed, iteration and number.

        Args:
            split: "train", "validation" or "test".
            iteration: a number, or an int64 scalar on the distribution's device; the tasks are the same.
            tasks: a range of task numbers.
        """
        ...

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        """Return the first tasks of iteration 0 for a picture.

        The query of a curve is its true function, without noise, on a dense and sorted grid of inputs (the
        first input feature). Other kinds give what `sample` gives.
        """
        return self.sample(split, seed, 0, range(tasks))


def tree_map(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Apply a function to each tensor, or to the tensors in the same places of several trees."""
    if all(isinstance(tree, Tensor) for tree in trees):
        return function(*trees)
    return pytree.tree_map(function, *trees)


def make_arguments(x: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as a module is called with them: several are a tuple, or a dictionary by name."""
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def first_tensor(tree: Tree) -> Tensor:
    """Return the first tensor of a tree: of several inputs or outputs, the main one."""
    return tree if isinstance(tree, Tensor) else pytree.tree_leaves(tree)[0]


def index_tree(tree: Tree, place: Any) -> Tree:
    """Index every tensor of a tree: `index_tree(batch, 0)` is the first task."""
    return tree_map(lambda t: t[place], tree)


def append_axes(t: Tensor, axes: int) -> Tensor:
    """Append axes of length 1 until there are `axes`, so that a tensor broadcasts from the left."""
    return t.view(*t.shape, *(1,) * (axes - t.dim()))


def concatenate_trees(trees: list[Tree]) -> Tree:
    """Concatenate the tensors of equal trees along the first axis."""
    return trees[0] if len(trees) == 1 else tree_map(lambda *parts: torch.cat(parts), *trees)


def stack_trees(trees: list[Tree], axis: int = 0) -> Tree:
    """Stack the tensors of equal trees along a new axis."""
    return tree_map(lambda *parts: torch.stack(parts, axis), *trees)


def cast_tree(tree: Tree, dtype: torch.dtype) -> Tree:
    """Convert the floating-point tensors of a tree to another type."""
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

"""What flows through inner and outer loop, by name: tasks, what they share, and their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import TaskBatch, Tree, first_tensor, index_tree, register_tree, stack_trees, tree_map
from common.optimizers import Weights
from common.random import Stream


@register_tree
@dataclass(frozen=True)
class Extras:
    """Inputs of a pass besides weights and examples, of one task or with tasks as the first axis."""

    keys: Tensor | None = None  # [2] int64, of its random numbers; None: the learner draws none
    buffers: Weights = field(default_factory=dict)  # that the learner changes, by name
    mask: Tensor | None = None  # [examples] bool, False for those that pad; None: none does
    ways: Tensor | None = None  # int64, number of classes; None: as many as the learner scores

    def for_pass(self, purpose: str, step: int = 0, mask: Tensor | None = None) -> Extras:
        """Return extras whose keys are those of one pass alone, on examples with this mask."""
        keys = None if self.keys is None else Stream.from_keys(self.keys).at(purpose).at(step).keys
        return replace(self, keys=keys, mask=mask)


@register_tree
@dataclass(frozen=True)
class Task:
    """One task `[examples, ...]`, or a batch of them with tasks as the first axis."""

    support_x: Tree
    support_y: Tree
    query_x: Tree = None
    query_y: Tree = None
    order: Tensor | None = None  # [steps, batch] int64, support examples of each inner step; None: all
    extras: Extras = field(default_factory=Extras)
    support_mask: Tensor | None = None  # [support examples] bool; see TaskBatch
    query_mask: Tensor | None = None  # [query examples] bool

    @classmethod
    def of(cls, batch: TaskBatch, extras: Extras, order: Tensor | None = None) -> Task:
        """Return a batch's tasks with the extras of their passes."""
        extras = replace(extras, ways=batch.ways)
        sizes = {"support_mask": batch.support_mask, "query_mask": batch.query_mask}
        return cls(**batch.parts, **sizes, order=order, extras=extras)

    def split(self, size: int) -> list[Task]:
        """Return a batch in parts of at most `size` tasks."""
        count = len(first_tensor(self.support_x))
        if size >= count:
            return [self]
        return [index_tree(self, slice(first, first + size)) for first in range(0, count, size)]

    def at_step(self, step: int) -> tuple[Tree, Tree, Extras]:
        """Return what one task's inner step learns from: inputs, targets, and extras of its pass."""
        x, y, mask = self.support_x, self.support_y, self.support_mask
        if self.order is not None:
            chosen = self.order[step]
            x, y = index_tree((x, y), chosen)
            mask = None if mask is None else mask[chosen]
        return x, y, self.extras.for_pass("support", step, mask)

    def for_query(self, steps: int) -> Task:
        """Return the task with the extras of the query's pass after so many inner steps."""
        return replace(self, order=None, extras=self.extras.for_pass("query", steps, self.query_mask))

    def with_inputs(self, support_x: Tree, query_x: Tree) -> Task:
        return replace(self, support_x=support_x, query_x=query_x)

    def with_buffers(self, buffers: Weights) -> Task:
        return replace(self, extras=replace(self.extras, buffers=buffers)) if buffers else self

    def pooled(self, axis: int = 0) -> Task:
        """Return the task with support and query together as its support; `axis` is that of the examples."""
        pairs = ((self.support_x, self.query_x), (self.support_y, self.query_y))
        x, y = (tree_map(lambda *two: torch.cat(two, axis), *pair) for pair in pairs)
        return replace(self, support_x=x, support_y=y, support_mask=self.pooled_mask(axis))

    def pooled_mask(self, axis: int = 0) -> Tensor | None:
        """Return the mask of support and query together."""
        if self.support_mask is None and self.query_mask is None:
            return None
        sets = (self.support_x, self.support_mask), (self.query_x, self.query_mask)
        return torch.cat([complete_mask(x, mask, axis) for x, mask in sets], axis)


def complete_mask(x: Tree, mask: Tensor | None, axis: int) -> Tensor:
    """Return the mask of examples, or one that leaves out nothing; `axis` is theirs."""
    first = first_tensor(x)
    return first.new_ones(first.shape[: axis + 1], dtype=torch.bool) if mask is None else mask


class Shared(NamedTuple):
    """Weights, rates and anchor shared by all tasks in one inner step."""

    weights: Weights  # those that are not adapted
    rates: Weights  # learned inner rates; empty: the optimizer's own
    anchor: Weights  # what the proximal term pulls towards; empty without one


class Adapted(NamedTuple):
    """A task after some inner steps, ready for its query."""

    fast: Weights  # the adapted weights
    shared: Shared  # of the last step
    task: Task  # with the buffers that those steps leave, and the random keys of the query's pass
    statistics: Weights  # [2, channels] by layer: mean and variance in the last step, if recorded

    @property
    def weights(self) -> Weights:
        return self.fast | self.shared.weights


class Outcome(NamedTuple):
    """A task's result after the last inner step."""

    loss: Tensor  # query loss
    outputs: Tree  # [query examples, ...], the learner's outputs
    statistics: Weights  # [steps, 2, channels] by layer: means and variances, if recorded


class MetaGradient(NamedTuple):
    """The result of a meta-batch: means over tasks. (A `Way` returns sums over its chunk of tasks.)"""

    gradients: Weights  # of the outer loss, by meta-parameter
    losses: Tensor  # [tasks], query loss after the last inner step
    outputs: Tree  # [tasks, query examples, ...], the learner's outputs after that step
    statistics: Weights  # [steps, 2, channels] by layer: mean and variance that per-step batch norm saw


@dataclass(frozen=True)
class UserTask:
    """A task of the user's: examples with targets, and examples without."""

    name: str  # "" if it is the only one
    support_x: Tensor  # [support examples, ...]
    support_y: Tensor  # int64 [support examples] of labels, or [support examples, targets]
    query_x: Tensor  # [query examples, ...]
    classes: list[str]  # names of the labels; empty for regression
    query_names: list[str]  # file names, or numbers of the table's rows from 1


def mean_statistics(support: Weights, query: Weights) -> Weights:
    """Return the mean of what batch norm saw in a step's support and query, if the query passed."""
    return {name: (support[name] + query[name]) / 2 for name in support} if query else support


def stack_steps(steps: list[Weights]) -> Weights:
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}


def sum_over_tasks(weights: Weights) -> Weights:
    return {name: w.sum(0) for name, w in weights.items()}


def loop_over_tasks(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """Do what `vmap` does by a loop over tasks: as exact and slower, for any learner."""

    def loop(*arguments: Any) -> Any:
        axes = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(arguments)
        pairs = list(zip(arguments, axes, strict=True))
        tasks = len(pytree.tree_leaves([argument for argument, axis in pairs if axis is not None])[0])

        def call(task: int) -> Any:
            parts = (x if axis is None else index_tree(x, task) for x, axis in pairs)
            return function(*parts)

        return stack_trees([call(task) for task in range(tasks)])

    return loop

"""The only currency between datasets and algorithms: a batch of tasks as four tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class TaskBatch(NamedTuple):
    """A meta-batch: every tensor has tasks as its first axis and examples as its second."""

    support_x: Tensor  # [tasks, support examples, ...]
    support_y: Tensor  # [tasks, support examples, ...]
    query_x: Tensor  # [tasks, query examples, ...]
    query_y: Tensor  # [tasks, query examples, ...]

    def chunks(self, size: int | None) -> Iterator[TaskBatch]:
        """The batch in parts of at most `size` tasks (whole, where it is None)."""
        for part in zip(*(tensor.split(size or len(tensor)) for tensor in self), strict=True):
            yield TaskBatch(*part)

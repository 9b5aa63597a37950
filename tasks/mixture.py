"""Draw each task from one of several data sets of one kind: `--dataset A B ...`, `--mix`.

names, odds -> Mixture(parts) -> TaskBatch, in which every task is one that its own data set gives
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from common.batch import DataRecord, TaskBatch, TaskDistribution, append_axes, tree_map
from common.random import task_stream
from common.sizes import Size


@dataclass(eq=False)
class Mixture(TaskDistribution):
    """Tasks of several distributions with examples of one shape, drawn from each in proportion to its weight.

    Which one is a random draw of the task's own; the task is then the one that this distribution gives for
    the same split, seed, iteration and number. All draw, and one is kept: what is drawn for nothing takes
    little beside the learning, and the whole is made of operations on tensors.
    """

    parts: Mapping[str, TaskDistribution] = field()
    weights: Sequence[float] = field()
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        parts = list(self.parts.values())
        self.kind, self.ways = parts[0].kind, parts[0].ways
        self.computed = all(part.computed for part in parts)
        self.on_host = any(part.on_host for part in parts)
        self.tensors = {
            f"{name}: {key}": tensor
            for name, part in self.parts.items()
            for key, tensor in part.tensors.items()
        }

    @property
    def shares(self) -> list[float]:
        """Return the probability of each part."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def record(self) -> DataRecord:
        """The parts' records in one, in which names begin with that of their data set."""
        records = {name: part.record for name, part in self.parts.items()}
        splits: dict[str, list[str]] = {}
        for name, record in records.items():
            for split, classes in record.splits.items():
                splits.setdefault(split, []).extend(f"{name}: {one}" for one in classes)
        ranges = {name: record.image_range for name, record in records.items()}
        one, *others = ranges.values()
        if any(other != one for other in others):
            one = [f"{name}: {word}" for name, words in ranges.items() for word in words]
        return DataRecord(splits=splits, image_range=one)

    @property
    def summary(self) -> list[str]:
        odds = [f"{share:.3g} {name}" for share, name in zip(self.shares, self.parts, strict=True)]
        lines = [f"{name}: {line}" for name, part in self.parts.items() for line in part.summary]
        return [f"probabilities of a task's data set: {', '.join(odds)}", *lines]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Mixture:
        parts = {
            name: part.with_tensors({key: tensors[f"{name}: {key}"] for key in part.tensors})
            for name, part in self.parts.items()
        }
        return replace(self, parts=parts)

    def resized(self, shots: Size) -> Mixture:
        return replace(self, parts={name: part.resized(shots) for name, part in self.parts.items()})

    def sample(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> TaskBatch:
        batches = [part.sample(split, seed, iteration, tasks) for part in self.parts.values()]
        return tree_map(partial(_select, self.choose(split, seed, iteration, tasks)), *batches)

    def choose(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> Tensor:
        """Return the position of each task's part, int64 `[tasks]`."""
        words = task_stream(split, seed, iteration, tasks, self.device).at("data set").words(1)  # below 2^32
        ends = [round(end * 2**32) for end in accumulate(self.shares[:-1])]
        return torch.stack([words[:, 0] >= end for end in ends]).sum(0)

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        """Return the first tasks of the parts in turn."""
        batches = [part.sample_to_draw(split, seed, tasks) for part in self.parts.values()]
        turns = torch.arange(tasks, device=self.device) % len(batches)
        return tree_map(partial(_select, turns), *batches)


def _select(number: Tensor, *parts: Tensor) -> Tensor:
    """Return the tasks `[tasks, ...]` of the parts of these positions, `[tasks]`."""
    selected = parts[0]
    for position, part in enumerate(parts[1:], 1):
        selected = torch.where(append_axes(number == position, part.dim()), part, selected)
    return selected

"""Decide which classes, or tasks of a table, are for training, for validation and for test.

Every data set with classes or named tasks gets its splits from here, and they never meet: `check_disjoint`
sees to it. A split is a pure function of the names and the shares: no seed of the user's changes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UsageError
from common.random import SPLITS, Stream

PUBLISHED = Path(__file__).parent / "splits"


def shuffle(names: Iterable[str], purpose: str) -> list[str]:
    """Return the names in a random order that depends on the set of names and on the purpose alone."""
    ordered = sorted(names)
    stream = Stream.from_seed(0).at(purpose).at(torch.zeros(1, dtype=torch.int64))
    return [ordered[position] for position in stream.distinct(len(ordered), len(ordered))[0].tolist()]


def split_at_random(names: Sequence[str], shares: Mapping[str, int]) -> dict[str, list[str]]:
    """Split the names at random in proportion to the shares, `{"train": 64, ...}`; each part is sorted."""
    shuffled = iter(shuffle(names, "class split"))
    sizes = _apportion(len(names), list(shares.values()))
    return {
        split: sorted(next(shuffled) for _ in range(size)) for split, size in zip(shares, sizes, strict=True)
    }


def _apportion(total: int, shares: list[int]) -> list[int]:
    """Return whole numbers in proportion, by largest remainder; 0 only for a share of 0, if possible."""
    exact = [total * share / sum(shares) for share in shares]
    sizes = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - exact[i])
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    for i, share in enumerate(shares if total >= len(shares) else ()):
        if share and not sizes[i]:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    return sizes


def published_splits(name: str) -> dict[str, list[str]]:
    """Return the class names of each split of a benchmark, as its paper has them."""
    content = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    return {split: content[split] for split in SPLITS}


def check_disjoint(splits: Mapping[str, Iterable[str]], source: str) -> None:
    """Raise UsageError, which names the source, where a name is in two splits."""
    split_of: dict[str, str] = {}
    for split, members in splits.items():
        for name in members:
            if name in split_of:
                raise UsageError(
                    f"{source}: {name} is in the {split_of[name]} and in the {split} split: leave it in one"
                )
            split_of[name] = split


def as_positions(splits: Mapping[str, Iterable[str]], names: Sequence[str], source: str) -> dict[str, Tensor]:
    """Return the positions of each split's members in `names`, int64; a missing split is empty."""
    check_disjoint(splits, source)
    position = {name: number for number, name in enumerate(names)}
    members = {split: [position[name] for name in splits.get(split, ())] for split in SPLITS}
    return {split: torch.tensor(part, dtype=torch.int64) for split, part in members.items()}


def all_for_test(count: int) -> dict[str, Tensor]:
    """Return splits in which each of `count` classes is for test: of data that no training sees."""
    none = torch.zeros(0, dtype=torch.int64)
    return {"train": none, "validation": none, "test": torch.arange(count)}

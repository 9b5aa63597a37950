"""Counter-based random numbers: each is a pure function of where it is used, not of what came before.

A `Stream` is a pair of 32-bit keys. `stream.at(value)` returns the stream of a sub-purpose (a name, an
iteration, a vector of task numbers); `uniform`, `normal` and `words` read numbers from it by position. The
tasks of iteration i are the same in any order, chunk, process or resumed run: its number is all the state.

The mixer is a 32-bit xorshift-multiply hash (constants of github.com/skeeto/hash-prospector). Words live in
int64, and the second multiplier is written as the negative number that it equals modulo 2^32. No product then
leaves the range of int64, and the bits do not depend on how a device or a compiler treats overflow.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")
HELD_OUT = SPLITS[1:]
_MASK = 0xFFFFFFFF
_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0xD35A2D97 - 2**32


def mix(word: Any) -> Any:
    """Map 32-bit words, a Python integer or an int64 tensor, one to one and without a pattern."""
    word = ((word ^ (word >> 16)) * _MULTIPLIER_1) & _MASK
    word = ((word ^ (word >> 15)) * _MULTIPLIER_2) & _MASK
    return word ^ (word >> 15)


class Stream(NamedTuple):
    """Two independent 32-bit keys: Python integers, or int64 tensors `[tasks]` (0-dimensional for one)."""

    key_1: int | Tensor
    key_2: int | Tensor

    @classmethod
    def from_seed(cls, seed: int | Tensor) -> Stream:
        """Return the root stream of a seed in [0, 2^63), a number or an int64 tensor."""
        low, high = seed & _MASK, seed >> 32
        return cls(mix(mix(low ^ 0x9E3779B9) ^ high), mix(mix(high ^ 0x85EBCA6B) ^ low))

    @classmethod
    def from_keys(cls, keys: Tensor) -> Stream:
        """Return the stream of keys, int64 `[..., 2]`."""
        return cls(*keys.unbind(-1))

    @property
    def keys(self) -> Tensor:
        """Both keys in one tensor, int64 `[..., 2]`."""
        assert isinstance(self.key_1, Tensor) and isinstance(self.key_2, Tensor)
        return torch.stack([self.key_1, self.key_2], -1)

    def at(self, value: int | str | Tensor) -> Stream:
        """Return the sub-stream for a number, a name, or each element of an int64 tensor `[tasks]`."""
        if isinstance(value, str):
            value = zlib.crc32(value.encode())
        return Stream(mix(self.key_1 ^ value), mix(self.key_2 ^ value))

    def words(self, count: int) -> Tensor:
        """Return 32-bit words, int64 `[tasks, count]`, all different within a task."""
        assert isinstance(self.key_1, Tensor) and isinstance(self.key_2, Tensor), "keyed by no task numbers"
        positions = torch.arange(count, device=self.key_1.device)
        return mix(mix(positions ^ self.key_2[..., None]) ^ self.key_1[..., None])

    def uniform(self, count: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
        """Return numbers in [low, high), `[tasks, count]`; 24 random bits, the same in every precision."""
        return low + (high - low) * ((self.words(count) >> 8).to(dtype) * 2.0**-24)

    def normal(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return standard normal numbers, `[tasks, count]` (Box and Muller's transform)."""
        radius_word, angle_word = (self.words(2 * count) >> 8).to(dtype).mul(2.0**-24).chunk(2, -1)
        radius = torch.sqrt(-2.0 * torch.log1p(-radius_word))
        return radius * torch.cos(2.0 * math.pi * angle_word)

    def distinct(self, count: int, total: int) -> Tensor:
        """Return `count` different numbers below `total` in random order, `[tasks, count]`."""
        return self.words(total).topk(count, dim=1).indices


def task_stream(
    split: str, seed: int | Tensor, iteration: int | Tensor, tasks: range | Tensor, device: torch.device
) -> Stream:
    """Return an independent stream for each task, by its number; ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: one of {', '.join(SPLITS)}")
    numbers = torch.arange(tasks.start, tasks.stop, device=device) if isinstance(tasks, range) else tasks
    return Stream.from_seed(seed).at(split).at(iteration).at(numbers)


def derive_keys(stream: Stream) -> Tensor:
    """Return the keys of the numbers that a learner draws in each task (`Elementary`), `[tasks, 2]`."""
    return stream.at("learner").keys


def minibatch_order(
    stream: Stream, examples: int, batch: int | None, steps: int, mask: Tensor | None = None
) -> Tensor | None:
    """Return the examples of each inner step, int64 `[tasks, steps, batch]`; None: each step takes all.

    As in Nichol et al. (2018): passes over the examples, each in a new random order, cut into batches. Only
    those of `mask`, bool `[tasks, examples]`, take part; a task that has no more than a batch takes all of
    them in each step, and padding with them.
    """
    if batch is None or batch >= examples or not steps:
        return None
    if mask is None:
        passes = -(-steps * batch // examples)
        orders = [stream.at(number).distinct(examples, examples) for number in range(passes)]
        return torch.cat(orders, 1)[:, : steps * batch].unflatten(1, (steps, batch))
    count, place = mask.sum(1, keepdim=True), torch.arange(steps * batch, device=mask.device)
    words = torch.stack([stream.at(number).words(examples) for number in range(steps)], 1)
    ordered = words.where(mask[:, None], -1).topk(examples).indices.flatten(1)  # padding at the end of each
    passed = (place // count).clamp(max=steps - 1)
    drawn = ordered.gather(1, passed * examples + place % count).unflatten(1, (steps, batch))
    full_set = mask.long().topk(batch).indices[:, None]
    return drawn.where((count > batch)[..., None], full_set)

"""Share what tasks of images, tables and the user's own code need: draws, prefetching, errors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from common.errors import fold_message

LFS_POINTER = b"version https://git-lfs"


def draw_distinct(words: Tensor, totals: Tensor, count: int) -> Tensor:
    """Return `count` different numbers below each of the totals `[...]`, in random order: `[..., count]`.

    The words are random and different: `[..., at least the largest total]`.
    """
    positions = torch.arange(words.shape[-1], device=words.device)
    ranked = words.masked_fill(positions >= totals[..., None], 1 << 32)  # above every word
    return ranked.topk(count, largest=False).indices  # sorted, so the order is that of the words


def say_too_few(sizes: Tensor, needed: int, what: str, flags: str) -> str:
    """Return what the smallest of some groups has, what flags require, and how many groups have less."""
    few = int((sizes < needed).sum())
    return f"{sizes.min()} {what}, and {flags} is {needed} ({few:,} of {len(sizes):,} have too few)"


def explain(path: Any, error: Exception) -> str:
    """Return in a line why a file, or an image in one, cannot be read."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "Git LFS has left a pointer in its place, fetch it with git lfs pull"
    return fold_message(error)[:300]


class Prefetch:
    """Call a pure function of (split, seed, iteration, tasks) one training iteration ahead, in one thread."""

    def __init__(self, fetch: Callable[[str, int, int, range], Any]) -> None:
        self.fetch = fetch
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.pending: dict[tuple[Any, ...], Future[Any]] = {}  # by arguments

    def __call__(self, split: str, seed: int, iteration: int, tasks: range) -> Any:
        wanted, following = (split, seed, iteration, tasks), (split, seed, iteration + 1, tasks)
        future = self.pending.pop(wanted, None) or self.thread.submit(self.fetch, *wanted)
        if split == "train" and following not in self.pending:
            self.pending[following] = self.thread.submit(self.fetch, *following)
        return future.result()

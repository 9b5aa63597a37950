"""Share what tasks of images, tables and the user's own code need: prefetching, and texts of errors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from torch import Tensor

from common.errors import fold_message

LFS_POINTER = b"version https://git-lfs"


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

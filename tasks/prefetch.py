"""Fetch the tasks of the next iteration in a thread while the present one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

Fetch = Callable[[str, int, int, range], Any]  # arguments: split, seed, iteration, numbers of the tasks


class Prefetch:
    """Call a fetching function one training iteration ahead, in a thread.

    The function is pure, so it does not matter who asks when; its calls never overlap. An error in the thread
    is raised by the call that asks for that result.
    """

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.lock = Lock()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.pending: dict[int, tuple[tuple[Any, ...], Future[Any]]] = {}  # seed -> arguments and result

    def __call__(self, split: str, seed: int, iteration: int, tasks: range) -> Any:
        wanted, following = (split, seed, iteration, tasks), (split, seed, iteration + 1, tasks)
        arguments, future = self.pending.get(seed, (None, None))
        result = future.result() if future is not None and arguments == wanted else self._call(*wanted)
        if split == "train" and arguments != following:
            self.pending[seed] = following, self.thread.submit(self._call, *following)
        return result

    def _call(self, *arguments: Any) -> Any:
        with self.lock:
            return self.fetch(*arguments)

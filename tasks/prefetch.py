"""Fetching the next iteration's tasks while the present one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

Fetch = Callable[[str, int, int, range], Any]  # of split, seed, iteration and numbers of tasks


class Ahead:
    """A fetching function, called as it is, that is a training iteration ahead in a thread.

    What it gives is a pure function of its arguments, so that it does not matter who asks when; calls never
    overlap. What fails in the thread fails in the call that wants it.
    """

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.lock = Lock()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="tasks-ahead")
        self.coming: dict[int, tuple[tuple[Any, ...], Future[Any]]] = {}  # by seed

    def __call__(self, split: str, seed: int, iteration: int, tasks: range) -> Any:
        wanted = (split, seed, iteration, tasks)
        what, coming = self.coming.get(seed, (None, None))
        found = coming.result() if coming is not None and what == wanted else self._fetched(*wanted)
        following = (split, seed, iteration + 1, tasks)
        if split == "train" and what != following:
            self.coming[seed] = following, self.thread.submit(self._fetched, *following)
        return found

    def _fetched(self, *wanted: Any) -> Any:
        with self.lock:
            return self.fetch(*wanted)

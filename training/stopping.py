"""Stopping a run before its end: Ctrl-C or SIGTERM, to this process or to another of the job.

The trainer asks after each iteration; all processes stop after the same one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from torch import Tensor

from common.processes import World

ASKED_EVERY = 10  # iterations on a GPU, where reading a number waits for the kernels before it


class StopRequest:
    """A signal that ends the training loop after the present iteration; `signal` is its number."""

    def __init__(self, world: World, *, show: bool) -> None:
        self.world, self.show = world, show
        self.signal: int | None = None
        self._agreed = self._raises = False

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one acts as it did before."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            restore()
            if self.show:  # not print(): the signal may have come in the middle of one
                with suppress(OSError):  # nobody reads it
                    os.write(2, b"\nStopping after this iteration; a second signal stops at once.\n")
            if self._raises:
                raise InterruptedError

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            restore()

    @contextmanager
    def cut_short(self) -> Iterator[None]:
        """Let a signal raise InterruptedError: what is under way changes nothing, and may take minutes."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def is_local(self) -> bool:
        """Return whether a signal has come to a process on its own, which need not ask others."""
        return self.world.size == 1 and self.signal is not None

    @property
    def now(self) -> bool:
        """Return whether all processes stop now."""
        return self.is_local() or self._agreed

    def ask_others(self, requests: Tensor | None, iteration: int) -> None:
        """Learn after an iteration whether any process has a signal: `requests` is above 0 then."""
        if requests is None or (requests.is_cuda and iteration % ASKED_EVERY):
            return
        if requests > 0:
            self.signal = max(self.world.gather(self.signal or 0)) or signal.SIGTERM
            self._agreed = True

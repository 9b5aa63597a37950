"""Progress bars: redrawn in a terminal; where it is a file or a pipe that grows, a line now and then."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0


def of(*arguments: Any, **options: Any) -> tqdm:
    """tqdm's, with its arguments. TQDM_MININTERVAL, its own variable, asks for redrawing everywhere."""
    if getattr(sys.stderr, "isatty", bool)() or "TQDM_MININTERVAL" in os.environ:
        return tqdm(*arguments, **options)
    lines: Any = Lines(sys.stderr)
    seldom = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    return _Unwatched(*arguments, **options, **seldom, file=lines)


class _Unwatched(tqdm):
    line_at = 0.0

    def display(self, *arguments: Any, **options: Any) -> bool:
        self.line_at = time.monotonic()
        return super().display(*arguments, **options)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Is shown in the next line; at once where none has come for long, as while code is compiled."""
        super().set_postfix_str(s, refresh=time.monotonic() - self.line_at >= LINE_SECONDS)


class Lines:
    """A stream for tqdm: what would be drawn over what is there becomes the next line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()

"""Standard output and standard error that a run outlives: whoever reads them may go away.

The standard library alone (see config.py).
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class Outlived:
    """A stream whose writing never fails: what cannot be written any more (`| head`, a full disk) goes
    nowhere, which is said on the other stream, if that was not the reader's wish."""

    def __init__(self, stream: TextIO, other: TextIO | None) -> None:
        self._stream = stream
        self._other = other

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is in its buffer goes there, too
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError) and self._other is not None:
            with suppress(OSError, ValueError):
                print(
                    f"main.py: {self._stream.name}: {error.strerror}: it goes on without",
                    file=self._other,
                    flush=True,
                )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Makes this process's streams such ones; a closed one is opened to nowhere, so that no file takes its
    number, and a character that the terminal's encoding has not is shown by its code."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace"))
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Outlived(out, err), Outlived(err, None)  # type: ignore[assignment]

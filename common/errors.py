"""Errors that a user sees as one line, and the texts of those lines; every layer raises them.

`main.py` prints a `UsageError` without a traceback and ends with exit code 2. The standard library alone:
mistakes in the flags are answered before PyTorch is imported.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from typing import Any

NOT_DETERMINISTIC = " does not have a deterministic implementation"  # after the operator
# PyTorch's RuntimeErrors on CPU, CUDA and MPS, and those of cuBLAS, cuDNN and C++. Compiled functions of
# PyTorch 2.11 ("run_func_") fail at nothing else, and say no more.
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory|ALLOC_FAILED|bad_alloc|run_func_")

OF_LATER_VERSIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class UsageError(Exception):
    """A mistake that the user can mend: one line on what was given, what was expected, and what to do."""


class AgreedError(UsageError):
    """A UsageError that all processes of the job raise: the first prints it."""


class LostError(Exception):
    """Another process of the job has ended, or has not answered in time."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that no memory is left, on the host or on the device."""
    in_pytorch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    return in_pytorch or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def describe_os_error(error: OSError) -> str:
    """Return in a few words why a file could not be read or written."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def explain(error: BaseException) -> str | None:
    """Return one printable line on what to do about an error; None for a mistake in this tool."""
    operator, found, _ = str(error).partition(NOT_DETERMINISTIC)
    if found:
        name = operator.rpartition(" ")[2]
        way_round = "use another, or leave --deterministic out"
        return f"--deterministic: the operator {name} has no deterministic form here: {way_round}"
    if is_out_of_memory(error):
        return "out of memory: lower --tasks-at-once, or take smaller tasks or a smaller --learner"
    if isinstance(error, OSError) and error.filename:
        full = "; free some space, or write to another disk" if error.errno == errno.ENOSPC else ""
        return escape_text(f"{error.filename}: {describe_os_error(error)}{full}")
    return escape_text(fold_message(error)) if isinstance(error, OSError | UsageError) else None


def show_warnings(*, silent: bool) -> None:
    """Let each warning be a line on stderr, once; those of later versions are for programmers (python -W).

    `silent`: show none, whoever raises it, as in all processes but the first.
    """
    shown = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
    ) -> None:
        text = f"main.py: warning: {escape_text(' '.join(str(message).split()))} ({filename}, line {lineno})"
        if text not in shown and not silent and not issubclass(category, OF_LATER_VERSIONS):
            shown.add(text)
            print(text, file=sys.stderr)

    if silent or not sys.warnoptions:
        warnings.showwarning = show
    if silent:  # nor what PyTorch writes by other ways
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.disable(logging.WARNING)


def fold_message(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def escape_text(text: str) -> str:
    """Escape what a terminal would obey in a text from elsewhere, such as a file's name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

"""Running out of memory: told from other errors, and how many tasks at once do fit, found by trying."""

from __future__ import annotations

import errno
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.errors import UsageError

if TYPE_CHECKING:
    import torch

ERRORS = (MemoryError, RuntimeError, OSError)  # among which they are; NumPy's is a MemoryError
SIGNS = (  # in RuntimeErrors of PyTorch: CPU, CUDA (torch.OutOfMemoryError) and MPS, cuBLAS and cuDNN, C++
    "out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED", "bad_alloc",
    "Storage size calculation overflowed",
    "run_func_(",  # of compiled functions, in PyTorch 2.11: they fail at nothing else, and say no more
)  # fmt: skip
SPARE = 128 * 2**20  # bytes
AT_THE_DATA = "take a smaller --image-size or fewer --channels, or --images-on host"
AT_THE_START = "take a smaller --learner, smaller tasks (-q, -k, --image-size), or another --device"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def free(error: BaseException) -> None:
    """Gives back what the computation that has failed still holds: the variables of its functions first."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()  # nothing, where CUDA is not in use


def fitting(attempt: Callable[[int], object], at_once: int, device: torch.device) -> int | None:
    """Of half as many tasks, a quarter, ... and one, the first number that an attempt has memory for on the
    device, and some to spare: no two processes lay theirs out alike."""
    while at_once > 1:
        at_once //= 2
        try:
            _with_spare(attempt, at_once, device)
        except Exception as error:  # without memory anything may fail in any way
            free(error)
        else:
            return at_once
    return None


def _with_spare(attempt: Callable[[int], object], at_once: int, device: torch.device) -> None:
    import torch  # not before there is need: mistakes in the flags answer at once

    spare = torch.empty(SPARE, dtype=torch.uint8, device=device)
    attempt(at_once)
    del spare


def line(where: str, at_once: int, fits: int | None) -> str:
    """What is said where so many tasks at once did not fit, and what does."""
    if fits is None:
        return (
            f"out of memory {where}, even with one task at a time: begin with smaller tasks (-q, -k, "
            "--image-size), a smaller --learner or --engine adjoint, or take another --device"
        )
    return f"out of memory {where} with {at_once} tasks at once: --tasks-at-once {fits} fits"


@contextmanager
def said(where: str, advice: str) -> Iterator[None]:
    """Raises UsageError with the advice where memory runs out within it."""
    try:
        yield
    except ERRORS as error:
        if not ran_out(error):
            raise
        free(error)
        raise UsageError(f"out of memory {where}: {advice}") from None

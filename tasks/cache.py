"""Keep decoded images in a file: each data set is decoded once, and memory-mapped afterwards.

The cache lies in the data's folder or, where that cannot be written, in the user's cache folder. Its name
holds a fingerprint of the sources and settings: changed sources never meet an old cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UsageError, one_line, printable
from common.files import one_at_a_time, user_cache, write_whole

CACHE_VERSION = 2
TITLE_BYTES = 100  # of the folder's name in the cache's: file systems allow 255 in all


def cached_pixels(
    folder: Path,
    sources: Sequence[Path],
    settings: object,
    shape: tuple[int, ...],
    decode: Callable[[], Iterable[np.ndarray]],
) -> Tensor:
    """Return a data set's images, uint8 `shape`, memory-mapped; decode them first if they are not cached.

    Args:
        folder: the data's folder.
        sources: the files that are decoded.
        settings: what else decides the pixels; its `repr` enters the fingerprint.
        shape: `[images, channels, height, width]`.
        decode: yields the images in order, uint8 `[channels, height, width]`.

    Raises UsageError where a source cannot be read or changes meanwhile, or no cache can be written.
    """
    title = os.fsdecode(os.fsencode(folder.resolve().name)[:TITLE_BYTES])
    fingerprint = _fingerprint(folder, sources, settings)
    places = [place for place in (folder, user_cache()) if place is not None]
    paths = [place / f".{title}-{fingerprint}.npy" for place in places]

    def decode_unchanged() -> Iterator[np.ndarray]:
        yield from tqdm(decode(), f"Preparing {printable(title)} (once)", shape[0], unit=" images")
        if _fingerprint(folder, sources, settings) != fingerprint:
            raise UsageError(f"{folder} has changed while its images were read: start again when it is whole")

    for path in paths:
        if (pixels := _map(path, shape)) is not None:
            return pixels
    reasons = []
    for path in paths:
        try:
            return _build(path, shape, decode_unchanged)
        except OSError as error:
            reasons.append(f"{path.parent} ({error.strerror or one_line(error)})")
    raise UsageError(
        f"the prepared images, {math.prod(shape) / 1e6:,.0f} MB, cannot be written to "
        f"{' or '.join(reasons)}: free room there, or set XDG_CACHE_HOME to another folder"
    )


def _fingerprint(folder: Path, sources: Iterable[Path], settings: object) -> str:
    """Hash the settings and the sources' names, sizes and times."""
    digest = hashlib.sha256(repr((CACHE_VERSION, settings)).encode())
    for file in sources:
        try:
            status = file.stat()
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}): remove it") from error
        source = [os.path.relpath(file, folder), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(source).encode())
    return digest.hexdigest()[:16]


def _map(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Return the cache's images, or None where there is no whole one."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if array.shape != shape or array.dtype != np.uint8:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
        return torch.from_numpy(array)


def _build(path: Path, shape: tuple[int, ...], decode: Callable[[], Iterator[np.ndarray]]) -> Tensor:
    """Write and map the cache, in one process at a time; raise OSError where it cannot be written."""

    # A full disk is an error in a write, and a crash in a writable memory map.
    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image in decode():
            file.write(image.tobytes())

    waiting = f"Waiting for another process, which prepares {printable(path.name)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path.with_suffix(".lock"), on_wait=lambda: print(waiting, file=sys.stderr)):
        if _map(path, shape) is None:  # else another process has built it meanwhile
            write_whole(path, write)
    pixels = _map(path, shape)
    assert pixels is not None
    return pixels

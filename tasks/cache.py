"""Keep decoded images in a file: each data set is decoded once, and memory-mapped afterwards.

The cache lies in the data's folder or, where that cannot be written, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import escape_text
from common.files import find_user_cache, is_writable, lock_file, write_whole

CACHE_VERSION = 4
Decoder = Callable[[], Iterable[np.ndarray]]  # yields images, uint8 `[channels, height, width]`


def cache_pixels(
    folder: Path, sources: Iterable[Path], settings: object, shape: tuple[int, ...], decode: Decoder
) -> Tensor:
    """Return a data set's images, uint8 of that shape, memory-mapped; decode them if they are not cached."""

    def write(file: IO[bytes]) -> None:  # a full disk is an error here, and a crash in a memory map
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image in tqdm(decode(), f"Preparing {_name_cache(folder)} (once)", shape[0], unit=" images"):
            file.write(image.tobytes())

    path = _write_once(folder, sources, settings, write)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def cache_array(
    folder: Path, sources: Iterable[Path], settings: object, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Return a small array about a data set; make it if it is not cached."""
    return np.load(_write_once(folder, sources, settings, lambda file: np.save(file, make())))


def _name_cache(folder: Path) -> str:
    return escape_text(folder.resolve().name)[:50].replace("\\", "-")  # names have at most 255 bytes


def _relative(file: Path, folder: Path) -> str:
    try:
        return os.path.relpath(file, folder)
    except ValueError:  # on another drive of Windows
        return str(file)


def _write_once(
    folder: Path, sources: Iterable[Path], settings: object, write: Callable[[IO[bytes]], object]
) -> Path:
    """Return the file that `write` writes, unless it is there.

    Its name holds a fingerprint of the settings and of the sources' names, sizes and times.
    """
    status = {_relative(file, folder): file.stat() for file in sources}
    facts = [(name, file.st_size, file.st_mtime_ns) for name, file in status.items()]
    fingerprint = hashlib.sha256(repr((CACHE_VERSION, settings, facts)).encode()).hexdigest()[:16]
    name = f".{_name_cache(folder)}-{fingerprint}.npy"
    paths = [place / name for place in (folder, find_user_cache())]
    path = next((path for path in paths if path.is_file()), paths[not is_writable(folder)])
    waiting = f"Waiting for another process, which prepares {name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path.with_suffix(".lock"), on_wait=lambda: print(waiting, file=sys.stderr)):
        if not path.is_file():
            write_whole(path, write)
    return path

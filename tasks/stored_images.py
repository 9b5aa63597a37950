"""Open images that lie in a Parquet file or in an archive as if each was a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np


@dataclass(eq=False)
class ImageColumn:
    """Many images of a file, which is read when the first one is opened."""

    path: Path
    name: str  # of the images, before their number
    load: Callable[[], Callable[[int], bytes]] = field(repr=False)  # gives what returns an image's file
    read: Callable[[int], bytes] | None = None
    lock: Lock = field(default_factory=Lock, repr=False)

    def content(self, row: int) -> bytes:
        """Return the content of the image file in a row, from 0."""
        with self.lock:
            read = self.read = self.read or self.load()
        return read(row)

    def forget(self) -> None:
        self.read = None


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image of a column, opened as a file is."""

    column: ImageColumn
    row: int

    def open(self, mode: str = "rb") -> IO[bytes]:
        return io.BytesIO(self.column.content(self.row))

    def __str__(self) -> str:
        return f"{self.column.path}, {self.column.name} {self.row + 1}"


def as_file(image: Any) -> bytes:
    """Return the content of an image file: PNG or JPEG as it is, an array of uint8 as PPM or PGM."""
    data = np.frombuffer(image, np.uint8) if isinstance(image, bytes) else np.asarray(image)
    if data.size == max(data.shape):
        return data.tobytes()
    data = data.squeeze(-1) if data.shape[-1] == 1 else data
    return f"P{data.ndim + 3} {data.shape[1]} {data.shape[0]} 255\n".encode() + data.tobytes()

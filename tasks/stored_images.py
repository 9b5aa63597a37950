"""Open images that lie in a Parquet file as if each was a file."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any


@dataclass(eq=False)
class ImageColumn:
    """A column of a Parquet file: bytes, or {bytes, path}; read when the first image is opened."""

    path: Path
    name: str
    values: Any = None  # pyarrow.ChunkedArray
    lock: Lock = field(default_factory=Lock, repr=False)

    def read(self, row: int) -> bytes:
        """Return the bytes of a row, from 0; those of a path are in a file beside the Parquet file."""
        from pyarrow import parquet  # slow to import, and for such files alone

        with self.lock:
            if self.values is None:
                table = parquet.read_table(self.path, columns=[self.name], partitioning=None)
                self.values = table.column(self.name)
        value = self.values[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return (self.path.parent / value["path"]).read_bytes()
        if content is None:
            raise ValueError("it has no bytes")
        return content

    def forget(self) -> None:
        self.values = None


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image of a column, opened as a file is."""

    column: ImageColumn
    row: int

    def open(self, mode: str = "rb") -> IO[bytes]:
        return io.BytesIO(self.column.read(self.row))

    def __str__(self) -> str:
        return f"{self.column.path}, column {self.column.name!r}, data row {self.row + 1}"

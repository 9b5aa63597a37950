"""Sizes of tasks: a number for all of them, or a range "1-10" from which each task draws its own.

The standard library alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Size = int | str  # a number, or a range of numbers, lowest and highest


class Span(NamedTuple):
    least: int
    most: int

    @classmethod
    def of(cls, size: Size) -> Span:
        """Return a size's ends; ValueError for text that is no range."""
        if isinstance(size, int):
            return cls(size, size)
        if not re.fullmatch(r"\d+-\d+", size):
            raise ValueError(f"no range: {size!r}")
        return cls(*map(int, size.split("-")))

    @property
    def varies(self) -> bool:
        return self.least < self.most

    @property
    def size(self) -> Size:
        return f"{self.least}-{self.most}" if self.varies else self.most


def find_largest(size: Size) -> int:
    return Span.of(size).most


def as_file_part(size: Size) -> str:
    """Return a size as a part of a file's name: `1to10`."""
    return str(size).replace("-", "to")

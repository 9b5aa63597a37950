"""Files that are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from locks import writing_to

Writer = Callable[[IO[bytes]], Any]


def write_whole(path: Path, write: Writer) -> None:
    """Has a file written by `write`, atomically: until it is whole and on the disk, the old one stays.

    Raises OSError where it cannot be; then nothing has changed. Processes that write the same do it one after
    another.
    """
    with writing_to(_temporary(path)):
        write_all_whole([(path, write)])


def write_all_whole(writers: Sequence[tuple[Path, Writer]]) -> None:
    """The same of several files: all are on the disk before the first takes its name, so that they belong
    together unless the process is killed just between two names. No other process may write the same."""
    temporaries = [_temporary(path) for path, _ in writers]
    try:
        for temporary, (_, write) in zip(temporaries, writers, strict=True):
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for temporary, (path, _) in zip(temporaries, writers, strict=True):
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries:
            with suppress(OSError):  # the folder is read-only now, or gone
                temporary.unlink(missing_ok=True)
        raise
    for folder in dict.fromkeys(path.parent for path, _ in writers):
        sync_folder(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, too."""
    with suppress(OSError):  # Windows opens no folders, and some file systems sync none
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

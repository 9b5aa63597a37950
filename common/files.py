"""Files that are whole or absent, and locks between processes; every wing writes through this module.

A file is written next to its final place, brought to the disk, and renamed: whatever cuts the process
short, the previous file stays.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from filelock import FileLock, Timeout

from common.errors import UsageError

Writer = Callable[[IO[bytes]], Any]


def write_whole(path: Path, write: Writer) -> None:
    """Write a file atomically by calling `write` with it; on OSError the previous one is unchanged."""
    write_all_whole({path: write})


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file of this content atomically."""
    write_whole(path, lambda file: file.write(content))


def write_all_whole(writers: Mapping[Path, Writer]) -> None:
    """Write several files atomically: all are on the disk before the first is renamed."""
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            with temporaries[path].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            _replace(temporary, path)
    except BaseException as error:
        for path, temporary in temporaries.items():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename = str(path)  # which the user knows
        raise
    for folder in {path.parent for path in writers}:
        with suppress(OSError):  # Windows opens no folders, and some file systems sync none
            sync(folder)


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file; where another program reads the old one, Windows refuses that for a moment."""
    for wait in (0.05, 0.2, 0.8):
        with suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(wait)
    temporary.replace(path)


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder; `os.access` does not know on Windows."""
    with suppress(OSError), TemporaryFile(dir=folder):
        return True
    return False


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR  # Windows writes through the latter
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise UsageError if it is missing or damaged."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): restore it, or move it away") from error


def find_user_cache() -> Path:
    """Return this tool's folder in the user's cache, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~").expanduser() / ".cache") / "maml"


@contextmanager
def lock_file(
    path: Path, *, interrupted: Callable[[], bool] = lambda: False, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock file `path`: of processes that make the same thing, one works and the others wait.

    Waiting begins with a call of `on_wait`, and ends with a RuntimeError once `interrupted` returns True.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
    while not lock.is_locked:
        with suppress(Timeout):
            lock.acquire(timeout=0.1)
        if interrupted() and not lock.is_locked:
            raise RuntimeError("interrupted")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; two that meet here do the same work twice
            path.unlink(missing_ok=True)
        lock.release()

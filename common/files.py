"""Files that are written whole or not at all, whatever happens meanwhile; and read without surprises."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from common.errors import UsageError
from common.locks import writing_in

Writer = Callable[[IO[bytes]], Any]

MOST_JSON = 2**26  # bytes of what is read back
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def why_no_file(path: Path) -> str | None:
    """In brackets, why there is no file to be read, if there is more to say than that; None: there is one."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f" ({error.strerror})"
    return None if kind == stat.S_IFREG else f" (it is {KINDS.get(kind, 'no file')})"


def opened_or_refused(path: Path, what: str) -> IO[bytes]:
    """A file, to be read. Raises UsageError for anything else, like a pipe or a device: it may never end."""
    why = why_no_file(path)
    if why is not None:
        raise UsageError(f"{path}: there is no such {what}{why}")
    try:
        return opened(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """What one of this tool's own files says. Raises ValueError where it is damaged, UsageError where there
    is none."""
    with opened_or_refused(path, "file") as file:
        text = file.read(MOST_JSON + 1)
    if len(text) > MOST_JSON:
        raise ValueError(f"{path} is longer than any of this tool's")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested deeper than any of this tool's") from error


def write_whole(path: Path, write: Writer) -> None:
    """Has a file written by `write`, atomically: until it is whole and on the disk, the old one stays.

    Raises OSError where it cannot be; then nothing has changed. Processes that write the same do it one after
    another.
    """
    with writing_in(path.parent):
        write_all_whole([(path, write)])


def write_all_whole(writers: Sequence[tuple[Path, Writer]]) -> None:
    """The same of several files: all are on the disk before the first takes its name, so that they belong
    together unless the process is killed just between two names. No other process may write the same."""
    temporaries = [_temporary(path) for path, _ in writers]
    try:
        for temporary, (_, write) in zip(temporaries, writers, strict=True):
            temporary.unlink(missing_ok=True)  # a killed process's, or anything that it may be a link to
            with temporary.open("xb") as file:
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
        with suppress(OSError):  # Windows opens no folders, and some file systems sync none
            sync(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def sync(path: Path) -> None:
    """Brings what was written to a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def opened(path: Path, limit: int | None = None) -> IO[bytes]:
    """An ordinary file, to be read: what others have put there neither blocks nor goes on for ever.

    Raises OSError for a pipe or a device, which may do both, and for more than `limit` bytes.
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(path.stat().st_mode):  # some devices act upon being opened
        raise OSError(errno.EINVAL, "it is no ordinary file")
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file")
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, and may have {limit:,}")
    except BaseException:
        file.close()
        raise
    return file


def user_cache() -> Path | None:
    """The user's cache folder for this tool, which may not be there yet; None where he has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maml"
    except RuntimeError:
        return None

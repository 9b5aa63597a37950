"""Files that are written whole or not at all, whatever happens meanwhile; and read without surprises."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

Writer = Callable[[IO[bytes]], Any]


def write_whole(path: Path, write: Writer) -> None:
    """Has a file written by `write`, atomically: until it is whole and on the disk, the old one stays.

    Raises OSError where it cannot be; then nothing has changed.
    """
    write_all_whole([(path, write)])


def write_all_whole(writers: Sequence[tuple[Path, Writer]]) -> None:
    """The same of several files: all are on the disk before the first takes its name, so that they belong
    together unless the process is killed just between two names."""
    temporaries = [path.with_name(f".{path.name}.tmp") for path, _ in writers]
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


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, too."""
    with suppress(OSError):  # Windows opens no folders, and some file systems sync none
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def opened(path: Path, limit: int) -> IO[bytes]:
    """An ordinary file, to be read: what others have put there neither blocks nor goes on for ever.

    Raises OSError for a pipe or a device, which may do both, and for more than `limit` bytes.
    """
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    )
    if not S_ISREG(path.stat().st_mode):  # some devices act upon being opened
        raise OSError(errno.EINVAL, "it is no ordinary file")
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        found = os.fstat(file.fileno())
        if not S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no ordinary file")
        if found.st_size > limit:
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


@contextmanager
def one_at_a_time(
    path: Path, *, interrupted: Callable[[], bool] = lambda: False, on_wait: Callable[[], None] = lambda: None
) -> Iterator[bool]:
    """Of the processes that want to make something, one does; the others wait, and find it.

    The lock is the file `path`, which goes when it is released; it ends with its process. Gives False where
    none is to be had: then nobody waits. Raises RuntimeError where `interrupted` says so while waiting.
    """
    file = _locked(path, interrupted, on_wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()
            _unlock(file)


def _locked(path: Path, interrupted: Callable[[], bool], on_wait: Callable[[], None]) -> int | None:
    """The descriptor of the file at that path, locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    waited = False
    while True:
        try:
            # never emptied, nor anything behind a link: others may write to the folder, too
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:  # no folder, or a read-only one
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:  # whoever had it has removed it meanwhile: it locks nothing any more
            pass
        except BlockingIOError:
            if not waited:
                on_wait()
            waited = True
            time.sleep(0.1)
        except OSError:  # some network file systems lock nothing
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if interrupted():
            raise RuntimeError("interrupted")


def _unlock(file: int) -> None:
    import fcntl

    with suppress(OSError):  # closing it would not do where a child process still has it open
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)

"""Files and folders that one process at a time works with: locks of the kernel's, which end with the process.

Where there are none to be had (Windows, some network file systems, a folder that cannot be written to), work
goes on without.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in a folder that is being trained in: by whom
PATIENCE = 2.0  # seconds in which a killed process is gone, and one that only looks has looked
WRITING = 30.0  # seconds in which another process has written its file
OTHER_NAME = "choose another --run-name"
_held: set[int] = set()  # descriptors of this process's locks
_kept: dict[Path, tuple[int, os.stat_result]] = {}  # folders that it trains in: the lock, and which folder


@contextmanager
def training_in(folder: Path, inside: Sequence[str] = (), *, otherwise: str = OTHER_NAME) -> Iterator[None]:
    """Within it no other process trains in the folder, which is made if need be; nor in the folder of many
    runs that it is in, nor in these folders `inside` of it.

    Each locks its own first, and looks at the others' then: of two that begin at once, one sees the other.
    Raises UsageError where another process trains there, and says what to do `otherwise`.
    """
    lock = _lock_of(folder, otherwise)
    name = folder.absolute()
    if lock is not None:
        _kept[name] = lock, folder.stat()
    try:
        for other in (folder.resolve().parent, *(folder / name for name in inside)):
            _check_free(other, otherwise)
        yield
    finally:
        if lock is not None:
            _remove(folder / LOCK, _kept.pop(name)[0])


def keep(folder: Path) -> None:
    """Makes sure that a folder that this process trains in, or that is in one, is still the one that it has
    locked; makes it again where it is gone.

    Raises OSError where there is another one in its place: it is somebody else's.
    """
    for name in (folder.absolute(), folder.absolute().parent):
        if name in _kept:
            lock, there = _kept[name]
            if not name.exists():
                name.mkdir(parents=True)
                again = _own(name / LOCK, os.O_RDWR | os.O_CREAT, patience=PATIENCE)
                if again is not None:
                    _release(lock)
                    _kept[name] = again, name.stat()
            elif not os.path.samestat(there, name.stat()):
                raise OSError(f"another folder has come in the place of {name}")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Within it no other process that asks for it writes in the folder; who has waited long enough does. The
    lock is on the folder itself: it leaves nothing behind."""
    lock = None
    with suppress(OSError):  # no folder, or no patience left
        lock = _own(folder.resolve(), os.O_RDONLY, patience=WRITING)
    try:
        yield
    finally:
        if lock is not None:
            _release(lock)


@contextmanager
def one_at_a_time(
    path: Path,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Of the processes that want to make something, one does; the others wait, and find it.

    The lock is the file `path`, which goes when it is released. Gives False where none is to be had: then
    nobody waits. Raises RuntimeError where `interrupted` says so while waiting, which begins with `on_wait`.
    """
    begun: list[None] = []

    def waiting() -> None:
        if not begun:
            begun.append(None)
            on_wait()
        if interrupted():
            raise RuntimeError("interrupted")

    lock = None
    with suppress(OSError):  # no folder, or a read-only one
        lock = _own(path, os.O_RDWR | os.O_CREAT, patience=None, waiting=waiting)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            _remove(path, lock)


def _lock_of(folder: Path, otherwise: str) -> int | None:
    """The folder's lock, with our name on it; None where it cannot have one."""
    for _ in range(100):  # who is refused removes the folder that was made for it
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _own(folder / LOCK, os.O_RDWR | os.O_CREAT, patience=PATIENCE)
        except (FileNotFoundError, FileExistsError):  # just then, or it is none
            continue
        except BlockingIOError:
            raise _refusal(folder, otherwise) from None
        except OSError:  # who writes there will say it
            return None
        if lock is not None:
            with suppress(OSError):  # the disk is full
                since = time.strftime("%Y-%m-%d %H:%M")
                text = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
                os.ftruncate(lock, 0)
                os.pwrite(lock, text.encode(), 0)
        return lock
    return None


def _check_free(folder: Path, otherwise: str) -> None:
    try:
        lock = _own(folder / LOCK, os.O_RDWR, patience=PATIENCE)
    except BlockingIOError:
        raise _refusal(folder, otherwise) from None
    except OSError:  # it has none
        return
    if lock is not None and _holder(folder / LOCK):  # who had it was killed
        _remove(folder / LOCK, lock)
    elif lock is not None:  # another program's
        _release(lock)


def _own(
    path: Path, flags: int, *, patience: float | None, waiting: Callable[[], None] = lambda: None
) -> int | None:
    """A descriptor of the file, or folder, of that name, opened with these flags and locked; None where there
    are no locks. (Network file systems lock only what is opened to write.)

    Raises BlockingIOError where another process still has it after so many seconds; None: waits for it, and
    calls `waiting` meanwhile.
    """
    limit = None if patience is None else time.monotonic() + patience
    while fcntl is not None:
        lock = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # nothing behind a link
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                _held.add(lock)
                return lock
        except FileNotFoundError:  # removed, or renamed, while we waited: there may be another
            pass
        except BlockingIOError:
            if limit is not None and time.monotonic() > limit:
                os.close(lock)
                raise
            time.sleep(0.05)
        except OSError:  # this file system has none
            os.close(lock)
            return None
        os.close(lock)
        waiting()
    return None


def _remove(path: Path, lock: int) -> None:
    """Removes the locked file, then releases it: who waits for it sees that it is gone."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(lock), path.stat()):  # else it is another's
            path.unlink()
    _release(lock)


def _release(lock: int) -> None:
    _held.discard(lock)
    with suppress(OSError):
        # closing would not do where a child that is being started has it, too
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _let_go() -> None:
    """In a forked child, which would keep the locks beyond its parent's death."""
    for lock in _held:
        os.close(lock)
    _held.clear()
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _refusal(folder: Path, otherwise: str) -> UsageError:
    holder = _holder(folder / LOCK) or "another process"
    return UsageError(f"{folder} is being trained in by {holder}: wait, end it, or {otherwise}")


def _holder(path: Path) -> str | None:
    """Who has, or had, the lock, as its file says."""
    with suppress(OSError, ValueError):
        text = path.read_text()
        if text.startswith("process ") and len(text) < 300:
            return " ".join(text.split())
    return None

"""Caches of prepared images: found, or built once by one process, whole or not at all.

A cache lies beside its data, or in the user's cache folder where nothing can be written there. It is named
after a fingerprint of its sources and settings, so that one of another source is never met. A file in its
place is doubted: what is not as it should be is built again.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from common.errors import one_line, printable
from common.files import one_at_a_time, user_cache

T = TypeVar("T")
TITLE_BYTES = 100  # of a folder's name in that of its cache


def title_of(folder: Path) -> str:
    """The folder's name, cut to what leaves room for more in a file's name."""
    return os.fsdecode(os.fsencode(folder.resolve().name)[:TITLE_BYTES])


def from_cache(
    beside: Path,
    name: str,
    size: int,
    read: Callable[[Path], T | None],
    write: Callable[[IO[bytes]], None],
) -> tuple[T | None, list[str]]:
    """What `read` finds in a cache, which `write` makes if need be; or None, and why it fits nowhere.

    Arguments:
        beside: the data's folder.
        name: `TITLE-FINGERPRINT.EXTENSION`.
        size: in bytes, about.
        read: None where there is no such file, or it is not whole.
    """
    paths = [folder / name for folder in (beside, user_cache()) if folder is not None]
    for path in paths:
        found = read(path)
        if found is not None:
            return found, []
    reasons = []
    for path in paths:
        try:
            return _built(path, size, read, write), []
        except OSError as error:
            reasons.append(f"{path.parent} ({error.strerror or one_line(error)})")
    return None, reasons


def _built(path: Path, size: int, read: Callable[[Path], T | None], write: Callable[[IO[bytes]], None]) -> T:
    """Raises OSError where it cannot be written; whatever goes wrong, nothing stays behind."""
    folder = path.parent
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    found = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.stat().st_mode & 0o222:  # root may write there, but was told not to
            raise PermissionError("read-only")
        if shutil.disk_usage(folder).free < size:  # before hours of work, not after
            raise OSError("too little room")
        title = path.name.lstrip(".").rpartition("-")[0]
        with one_at_a_time(folder / f".{title}.lock", on_wait=lambda: _say_waiting(title)):
            found = read(path)  # another process may have built it meanwhile
            if found is None:
                _remove_leftovers(folder, title)
                _write(path, write)
                found = read(path)
        if found is None:
            raise OSError("what was written cannot be read")
        return found
    finally:
        if found is None:
            for place in made:
                with suppress(OSError):
                    place.rmdir()


def _write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    # a name of its own: two processes may write where files cannot be locked
    temporary = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _remove_leftovers(folder: Path, title: str) -> None:
    """What processes that were killed have left of this title; nobody else is writing one now."""
    leftover = re.compile(rf"\.{re.escape(title)}-[0-9a-f]+\.np[yz]\.[0-9a-f]+\.tmp")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def _say_waiting(title: str) -> None:
    print(f"Waiting for another process, which prepares {printable(title)}", file=sys.stderr, flush=True)


def summed_up(reasons: Sequence[str]) -> str:
    return f"neither {' nor '.join(reasons)}" if len(reasons) > 1 else f"not {reasons[0]}"

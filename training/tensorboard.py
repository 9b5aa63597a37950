"""TensorBoard's event files: what a run writes there is whole after a crash, and survives a full disk.

A point waits in memory until it is in the file. Where it cannot be written, what was is cut back to its last
whole record, and the rest waits for better times; PyTorch's own writer ends with its thread there, or hangs.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common.files import opened, sync, write_whole

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

FLUSH_SECONDS = 5.0
MOST_BYTES = 2**32  # of a file that is taken for one of a run's
FRAME = 16  # bytes around a record


class EventFile:
    """A new event file in a run's folder.

    `begin_at` is the first iteration that this process writes: points from there on that a killed
    predecessor left behind are dropped.
    """

    def __init__(self, folder: Path, *, begin_at: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        drop_events(folder, begin_at)
        _wait_for_a_later_second(folder)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.path = folder / name
        self.written = 0  # bytes of whole records
        self.header = Event(wall_time=time.time(), file_version="brain.Event:2")
        self.waiting: list[Event] = []
        if begin_at:  # for readers who have seen the dropped points
            start = SessionLog(status=SessionLog.START)
            self.waiting.append(Event(wall_time=time.time(), step=begin_at, session_log=start))
        self.flush()
        self.flushed = time.monotonic()

    def add(self, summary: Summary, iteration: int) -> None:
        """A point, which is in the file some seconds later, or with the next `flush`."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.waiting.append(Event(wall_time=time.time(), step=iteration, summary=summary))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flushed = time.monotonic()
            with suppress(OSError):  # who saves says so
                self._append()

    def flush(self) -> None:
        """Brings all points to the disk; raises OSError where that cannot be, and keeps them."""
        self._append()
        sync(self.path)

    def _append(self) -> None:
        if not self.path.exists():  # new, or taken away
            self.written = 0
        events = [self.header] * (not self.written) + self.waiting
        if not events:
            return
        content = _framed(event.SerializeToString() for event in events)
        try:
            with self.path.open("r+b" if self.written else "wb", buffering=0) as file:
                file.truncate(self.written)
                file.seek(self.written)
                _write(file, content)
        except OSError as error:
            with suppress(OSError):
                if self.written:
                    os.truncate(self.path, self.written)
                else:
                    self.path.unlink()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.written += len(content)
        self.waiting.clear()


def _write(file: IO[bytes], content: bytes) -> None:
    """All of it: a write may be cut short without an error."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _framed(records: Iterable[bytes]) -> bytes:
    """Records as a file has them, with lengths and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    found = io.BytesIO()
    writer = RecordWriter(found)
    for record in records:
        writer.write(record)
    return found.getvalue()


def _whole_records(file: IO[bytes]) -> Iterator[bytes]:
    """The records of a file, up to the first that is none, or is not whole."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    end = os.fstat(file.fileno()).st_size
    while len(head := file.read(12)) == 12:
        length, check = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != check or length > end - file.tell():
            return
        record, foot = file.read(length), file.read(4)
        if len(foot) < 4 or struct.unpack("<I", foot)[0] != masked_crc32c(record):
            return
        yield record


def drop_events(folder: Path, begin_at: int) -> None:
    """Removes what lies at or after an iteration from the folder's event files, and halves of records.

    TensorBoard's own way, `purge_step`, is unknown to the server that `tensorboard` starts by default.
    A file that is none of TensorBoard's stays as it is.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for path in filter(Path.is_file, folder.glob("events.out.tfevents.*")):
        try:
            with opened(path, MOST_BYTES) as file:
                records = [(record, Event.FromString(record)) for record in _whole_records(file)]
        except (DecodeError, OSError):
            continue
        if not records or not records[0][1].HasField("file_version"):  # somebody's own
            continue
        kept = [r for r, event in records if event.step < begin_at or event.HasField("file_version")]
        if sum(FRAME + len(record) for record in kept) != path.stat().st_size:
            write_whole(path, partial(_write, content=_framed(kept)))


def _wait_for_a_later_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second of their birth.

    A run that goes on within the second in which its predecessor began would be read before it.
    """
    stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    births = [int(stamp) for stamp in stamps if stamp.isdecimal()]
    while births and 0 <= max(births) - int(time.time()) <= 1:
        time.sleep(0.05)

"""TensorBoard's view of a run: its curves, pictures and settings, in event files in the run's folder.

`Run` hands over numbers and figures; they are framed by TensorBoard's `RecordWriter` and written by the
training process itself. A checkpoint is saved after its points are on the disk. When a run is resumed,
points that a killed process wrote after the checkpoint are dropped: no gaps, no duplicates.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from common.files import write_whole

# TensorBoard sorts groups of tags by name: these, and view/, come after train and validation.
SPEED, META_LR, WEIGHTS = "watch/iterations_per_second", "watch/meta_lr", "weights/"
# Result columns of the hyper-parameter view.
TEST = "verdict/test_"
PARTS = (TEST, "validation/best_", "validation/")
# It shows the first five settings by name: these are renamed to be the first, the others, "with/", come last.
SHOWN = {name: name for name in ("dataset", "inner_lr", "method", "seed", "shots", "ways")}
SHOWN["steps"] = "inner_steps"
METRICS = [f"{part}query_{measure}" for part in PARTS for measure in ("loss", "accuracy")]
# Curves that belong together: patterns of tags by group and chart. TensorBoard joins the layouts of all runs,
# and shows twice what differs.
CHARTS = {
    "learning": {
        "query accuracy": "^(train|validation)/query_accuracy$",
        "query loss": "^(train|validation)/query_loss$",
        "query metric": "^validation/query_(?!accuracy$|loss$|mse$|coverage_)",
        "calibration": r"^validation/query_coverage_\d+$",
    },
    "validation by data set": {
        "accuracy by data set": "^validation_by_dataset/query_accuracy/",
        "loss by data set": "^validation_by_dataset/query_loss/",
    },
    "validation after 0, 1, ... inner steps": {
        "query accuracy": r"^validation_by_step/query_accuracy/\d+$",
        "query loss": r"^validation_by_step/query_loss/\d+$",
    },
    "learned inner rates": {"inner rates": "^weights/inner_lr/"},
    "learned ridge head": {"ridge head": "^weights/ridge/"},
}

# What a log shows: a number of a curve, a text in Markdown, a PNG, or a table's rows, with the same columns.
Value = float | str | bytes | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Description:
    """A run's settings, and how TensorBoard shows it beside others."""

    settings: Mapping[str, Any]
    columns: Mapping[str, Any] = field(default_factory=dict)  # with an example value: the first run's count
    empty: Collection[str] = ()  # charts to leave out
    measure: str = ""  # what chooses the best checkpoint, by its tag's last part


class EventFile:
    """A run's log as an event file in its folder; see `RunLog`."""

    def __init__(self, folder: Path, description: Description | None, *, begin_at: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if begin_at is not None:
            drop_events(folder, begin_at)
        # TensorBoard reads the files in the order of their names
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("wb")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if begin_at == 0 and description:
            self._describe(description)

    def _write(self, event: Event) -> None:
        try:
            _write_records([event.SerializeToString()], self.file)
            self.file.flush()
        except OSError as error:  # a full disk
            error.filename = self.file.name
            raise

    def _add(self, point: Summary, iteration: int) -> None:
        self._write(Event(wall_time=time.time(), step=iteration, summary=point))

    def add(self, values: Mapping[str, Value], iteration: int) -> None:
        # one event for all: an event per curve takes a tenth of a fast run's time
        self._add(Summary(value=[_encode(tag, value) for tag, value in values.items()]), iteration)

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self, *, ended_at: int | None) -> None:
        if ended_at is not None:  # the run's row in the hyper-parameter view is a success
            self._add(summary.hparams({}, {})[2], ended_at)
            self.sync()
        self.file.close()

    def _describe(self, run: Description) -> None:
        """Show the settings as a text and as a row of the hyper-parameter view, and lay out the charts."""
        settings = {name: value for name, value in run.settings.items() if value is not None}
        plain = {n: " ".join(v) if isinstance(v, list | tuple) else v for n, v in settings.items()}
        shown = {name: value for name, value in plain.items() if value != ""}
        self.add({"settings": [{"setting": n.replace("_", " "), "value": v} for n, v in shown.items()]}, 0)
        custom_tags = [tag for part in PARTS if (tag := f"{part}{run.measure}") not in METRICS]
        columns, values = (
            {SHOWN.get(name, f"with/{name}"): value for name, value in part.items()}
            for part in (run.columns, plain)
        )
        experiment, _, _ = summary.hparams(columns, dict.fromkeys([*METRICS, *custom_tags]))
        _, row, _ = summary.hparams(values, {})
        layout: dict[str, dict[str, Any]] = {}
        for group, charts in CHARTS.items():
            shown = {name: ["Multiline", [tags]] for name, tags in charts.items() if name not in run.empty}
            layout |= {group: shown} if shown else {}
        for part in (experiment, row, summary.custom_scalars(layout)):
            self._add(part, 0)


def _encode(tag: str, value: Value) -> Summary.Value:
    if isinstance(value, float | int):
        return Summary.Value(tag=tag, simple_value=value)
    if isinstance(value, bytes):
        width, height = struct.unpack(">II", value[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=value)
        return Summary.Value(tag=tag, image=image)
    if not isinstance(value, str):
        lines = [[*value[0]], ["-"] * len(value[0]), *(map(str, row.values()) for row in value)]
        value = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return summary.text(tag, value).value[0]


def has_log(folder: Path) -> bool:
    return any(folder.glob("events.out.tfevents.*"))


def read_speed(folder: Path) -> float | None:
    """Return the last speed in a run's event files, in iterations per second; None if there is none."""
    speed = None
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            for value in Event.FromString(record).summary.value:
                speed = value.simple_value if value.tag == SPEED else speed
    return speed


def drop_events(folder: Path, begin_at: int) -> None:
    """Remove the points at or after an iteration from a folder's event files.

    TensorBoard's own `purge_step` is unknown to the data server that `tensorboard` starts by default.
    """
    for path in folder.glob("events.out.tfevents.*"):
        records = list(RawEventFileLoader(str(path)).Load())  # ends before a record that is not whole
        events = [(record, Event.FromString(record)) for record in records]
        remaining = [r for r, event in events if event.step < begin_at or event.HasField("file_version")]
        if len(remaining) < len(records):
            write_whole(path, partial(_write_records, remaining))


def _write_records(records: Iterable[bytes], file: IO[bytes]) -> None:
    writer = RecordWriter(file)
    for record in records:
        writer.write(record)

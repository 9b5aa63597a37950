"""TensorBoard's view of a run: its curves, pictures and settings, in event files in the run's folder.

`Run` hands over numbers and figures; they are framed by TensorBoard's `RecordWriter` and written by the
training process itself. A checkpoint is saved after its points are on the disk. When a run is resumed,
points that a killed process wrote after the checkpoint are dropped: no gaps, no duplicates.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from common.files import write_whole
from evaluation.style import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Result columns of the hyper-parameter view.
METRICS = [f"validation/{best}query_{measure}" for best in ("best_", "") for measure in ("accuracy", "loss")]
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
    "learned inner rates": {"inner rates": "^inner_lr/"},
    "learned ridge head": {"ridge head": "^ridge/"},
}


class RunLog:
    """Writes a run's event file.

    Args:
        folder: the run's folder; None writes nothing, as in all processes but the first.
        begin_at: the first iteration that this process writes; later points of a predecessor are dropped.
    """

    def __init__(self, folder: Path | None, *, begin_at: int = 0) -> None:
        self.file: IO[bytes] | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        drop_events(folder, begin_at)
        # TensorBoard reads the files in the order of their names
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("wb")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _write(self, event: Event) -> None:
        if self.file is None:
            return
        try:
            _write_records([event.SerializeToString()], self.file)
            self.file.flush()
        except OSError as error:  # a full disk
            error.filename = self.file.name
            raise

    def add(self, point: Summary, iteration: int) -> None:
        """Add a point of any kind."""
        self._write(Event(wall_time=time.time(), step=iteration, summary=point))

    def sync(self) -> None:
        """Bring all points to the disk; raises OSError where that fails."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Add a point to several curves, by tag."""
        # one event for all: an event per curve takes a tenth of a fast run's time
        self.add(Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in values.items()]), iteration)

    def text(self, tag: str, text: str, iteration: int) -> None:
        """Add a text in Markdown."""
        self.add(summary.text(tag, text), iteration)

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None:
        """Show a figure, and write the same PNG to a file: drawing it is the slow part."""
        png = render(figure)
        width, height = map(int, figure.bbox.size)
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), iteration)
        write_whole(file, lambda opened: opened.write(png))

    def begin(
        self, settings: Mapping[str, Any], columns: Mapping[str, Any], empty: Collection[str], measure: str
    ) -> None:
        """Describe a new run: settings as a text and as a row of the hyper-parameter view, and its charts.

        Args:
            columns: an example value of each column; TensorBoard takes them from the first run for all.
            empty: charts to leave out.
            measure: what chooses the best checkpoint, by its tag's last part.
        """
        own = [tag for best in ("best_", "") if (tag := f"validation/{best}{measure}") not in METRICS]
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self.text("settings", f"| setting | value |\n|-|-|\n{rows}", 0)
        plain = {n: " ".join(v) if isinstance(v, list | tuple) else v for n, v in settings.items()}
        experiment, _, _ = summary.hparams(dict(columns), dict.fromkeys([*METRICS, *own]))
        _, row, _ = summary.hparams(plain, {})
        layout: dict[str, dict[str, Any]] = {}
        for group, charts in CHARTS.items():
            shown = {name: ["Multiline", [tags]] for name, tags in charts.items() if name not in empty}
            layout |= {group: shown} if shown else {}
        for part in (experiment, row, summary.custom_scalars(layout)):
            self.add(part, 0)

    def end(self, iteration: int) -> None:
        """Mark the run's row in the hyper-parameter view as a success."""
        self.add(summary.hparams({}, {})[2], iteration)


def drop_events(folder: Path, begin_at: int) -> None:
    """Remove the points at or after an iteration from a folder's event files.

    TensorBoard's own `purge_step` is unknown to the data server that `tensorboard` starts by default.
    """
    for path in folder.glob("events.out.tfevents.*"):
        records = list(RawEventFileLoader(str(path)).Load())  # ends before a record that is not whole
        events = [(record, Event.FromString(record)) for record in records]
        kept = [r for r, event in events if event.step < begin_at or event.HasField("file_version")]
        if len(kept) < len(records):
            write_whole(path, partial(_write_records, kept))


def _write_records(records: Iterable[bytes], file: IO[bytes]) -> None:
    writer = RecordWriter(file)
    for record in records:
        writer.write(record)

"""TensorBoard's view of a run: its curves, pictures and settings, in event files in the run's folder.

`Run` hands over numbers and figures; they are framed by TensorBoard's `RecordWriter` and written by the
training process itself. A checkpoint is saved after its points are on the disk. When a run is resumed,
points that a killed process wrote after the checkpoint are dropped: the curves have neither gaps nor doubles.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.files import sync, write_whole
from common.options import Flag
from evaluation.style import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.summary_pb2 import Summary

FLUSH_SECONDS = 5.0
EVENT_FILES = "events.out.tfevents.*"

# Result columns of the hyper-parameter view.
METRICS = (
    "validation/best_query_accuracy",
    "validation/best_query_loss",
    "validation/query_accuracy",
    "validation/query_loss",
)
# Settings that the view shows at first.
CHANGED_MOST = ["dataset", "algorithm", "learner", "ways", "shots", "steps"]
CHANGED_MOST += ["inner_lr", "meta_lr", "meta_batch_size", "seed"]
# Curves that belong together: patterns of tags by group and chart. They are the same for every run:
# TensorBoard joins the layouts of all runs, and shows twice what differs.
CHARTS = {
    "learning": {
        "query accuracy": "^(train|validation)/query_accuracy$",
        "query loss": "^(train|validation)/query_loss$",
    },
    "validation after 0, 1, ... inner steps": {
        "query accuracy": r"^validation_by_step/query_accuracy/\d+$",
        "query loss": r"^validation_by_step/query_loss/\d+$",
    },
    "trouble": {
        "diverged validation tasks": "^validation/diverged_tasks$",
        "norm of the meta-gradient": "^train/meta_gradient_norm$",
        "skipped iterations": "^train/skipped$",
    },
    "outer loop": {
        "iterations a second": "^speed/iterations_per_second$",
        "meta-learning rate": "^optimizer/meta_lr$",
    },
    "learned inner rates": {"of weights and steps": "^inner_lr/"},
}


class RunLog:
    """Writes a run's event file.

    Args:
        folder: the run's folder; None writes nothing, as in all processes but the first.
        begin_at: the first iteration that this process writes; later points of a predecessor are dropped.
    """

    def __init__(self, folder: Path | None, *, begin_at: int = 0) -> None:
        self.path: Path | None = None
        if folder is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        drop_events(folder, begin_at)
        self.path = _new_file(folder)
        self.waiting = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        self._append(self.path)

    def add(self, summary: Summary, iteration: int) -> None:
        """Note a point, which reaches the file within seconds, or with the next `flush`."""
        if self.path is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event

        self.waiting.append(Event(wall_time=time.time(), step=iteration, summary=summary))
        if time.monotonic() - self.appended_at > FLUSH_SECONDS:
            self._append(self.path)

    def flush(self) -> None:
        """Bring all points to the disk; raises OSError where that fails."""
        if self.path is not None:
            self._append(self.path)
            sync(self.path)

    def _append(self, path: Path) -> None:
        with path.open("ab") as file:
            _write_records([event.SerializeToString() for event in self.waiting], file)
        self.waiting.clear()
        self.appended_at = time.monotonic()

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Add a point to several curves, by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        # one event for all: an event per curve takes a tenth of a fast run's time
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        self.add(summary, iteration)

    def text(self, tag: str, text: str, iteration: int) -> None:
        """Add a text in Markdown."""
        from torch.utils.tensorboard import summary

        self.add(summary.text(tag, text), iteration)

    def begin(self, settings: Mapping[str, Any], tags: Sequence[str], flags: Mapping[str, Flag]) -> None:
        """Describe a new run for the views of hyper-parameters and of custom scalars.

        Args:
            settings: the run's settings by name.
            tags: of the curves that the run is going to write.
            flags: the declarations of all settings that may decide a result.
        """
        for summary in (experiment_summary(flags), session_summary(settings), layout_summary(tags)):
            self.add(summary, 0)

    def end(self, iteration: int, *, failed: bool) -> None:
        """Say in the view of hyper-parameters how the run ended."""
        self.add(end_summary(failed=failed), iteration)

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None:
        """Show a figure, and write the same PNG to a file: drawing it is the slow part."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        png = render(figure)
        width, height = map(int, figure.bbox.size)
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), iteration)
        write_whole(file, lambda opened: opened.write(png))


# ---- event files ----------------------------------------------------------------------------------


def _new_file(folder: Path) -> Path:
    """Return the path of a new event file.

    TensorBoard reads the files in the order of their names, which begin with a second: a run that is
    resumed within the second of its last start needs a later one.
    """
    stamps = [path.name.split(".")[3] for path in folder.glob(EVENT_FILES)]
    latest = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
    stamp = max(int(time.time()), latest + 1)
    return folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"


def drop_events(folder: Path, begin_at: int) -> None:
    """Remove the points at or after an iteration from a folder's event files.

    TensorBoard's own `purge_step` is unknown to the data server that `tensorboard` starts by default.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for path in folder.glob(EVENT_FILES):
        records = list(RawEventFileLoader(str(path)).Load())  # ends before a record that is not whole
        try:
            events = [Event.FromString(record) for record in records]
        except DecodeError:  # another program's
            continue
        kept = [
            record
            for record, event in zip(records, events, strict=True)
            if event.step < begin_at or event.HasField("file_version")
        ]
        if len(kept) < len(records):
            write_whole(path, partial(_write_records, kept))


def _write_records(records: Sequence[bytes], file: IO[bytes]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(file)
    for record in records:
        writer.write(record)


# ---- what the views show --------------------------------------------------------------------------


def _hparams_summary(tag: str, **content: Any) -> Summary:
    """Wrap a message to the hyper-parameter plugin, which reads the metadata of a summary without a value."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])


def experiment_summary(flags: Mapping[str, Flag]) -> Summary:
    """Declare the columns of the hyper-parameter view.

    They are the same for every run, since TensorBoard takes those of the first run for all.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata

    number, truth = api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_BOOL
    kinds: dict[type, Any] = {int: number, float: number, bool: truth}
    columns = [
        api_pb2.HParamInfo(
            name=name,
            description=flag.help,
            type=kinds.get(flag.kind, api_pb2.DATA_TYPE_STRING),
            differs=name in CHANGED_MOST,
        )
        for name, flag in flags.items()
    ]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS]
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
    return _hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment)


def session_summary(settings: Mapping[str, Any]) -> Summary:
    """Declare a row of the hyper-parameter view: a run's settings. None is an empty cell."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo()
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        elif value is not None:
            start.hparams[name].string_value = value if isinstance(value, str) else " ".join(value)
    return _hparams_summary(metadata.SESSION_START_INFO_TAG, session_start_info=start)


def end_summary(*, failed: bool) -> Summary:
    """Declare a run's row of the hyper-parameter view as ended."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status)
    return _hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def layout_summary(tags: Sequence[str]) -> Summary:
    """Declare the view of custom scalars: the charts of `CHARTS` for which the run has a curve."""
    from torch.utils.tensorboard import summary

    charts = {
        group: {
            name: ["Multiline", [pattern]]
            for name, pattern in named.items()
            if any(re.match(pattern, tag) for tag in tags)
        }
        for group, named in CHARTS.items()
    }
    return summary.custom_scalars({group: named for group, named in charts.items() if named})


def settings_as_markdown(settings: Mapping[str, Any]) -> str:
    """Return a table of settings."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"| setting | value |\n|-|-|\n{rows}"

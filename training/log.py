"""A run's log: its curves, pictures, settings and results, for TensorBoard and other trackers (--report-to).

    Run -> RunLog -> EventFile (tensorboard.py), Tracker (trackers.py)

`Run` hands over points: numbers, texts, pictures and tables by tag. A checkpoint is saved after `sync`, which
brings its points to where they belong: the log of a resumed run has no gaps and no duplicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from common.files import write_whole
from evaluation.style import render
from training.tensorboard import Description, EventFile, Value
from training.trackers import Tracker


class RunLog:
    """Writes a run's log to its trackers.

    Args:
        folder: the run's folder; None writes nothing, as in all processes but the first.
        report_to: names of trackers, with commas between.
        description: of the run, which a new one shows.
        begin_at: the first iteration that this process writes; later points of a predecessor are dropped.
            None: the process only adds to a log.
    """

    def __init__(
        self,
        folder: Path | None,
        report_to: str = "tensorboard",
        description: Description | None = None,
        *,
        begin_at: int | None = 0,
    ) -> None:
        self.sinks: list[EventFile | Tracker] = [
            EventFile(folder, description, begin_at=begin_at)
            if name == "tensorboard"
            else Tracker(name, folder, description.settings if description else {}, begin_at=begin_at)
            for name in dict.fromkeys(report_to.split(","))
            if folder is not None
        ]

    def add(self, values: Mapping[str, Value], iteration: int) -> None:
        """Add a point, by tag."""
        for sink in self.sinks:
            sink.add(values, iteration)

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None:
        """Show a figure, and write the same PNG to a file: drawing it is the slow part."""
        png = render(figure)
        self.add({tag: png}, iteration)
        write_whole(file, lambda opened: opened.write(png))

    def sync(self) -> None:
        """Bring all points to where they belong; raises OSError where that fails."""
        for sink in self.sinks:
            sink.sync()

    def close(self, *, ended_at: int | None = None) -> None:
        """End the log, as that of a finished run if it has `ended_at` an iteration."""
        sinks, self.sinks = self.sinks, []
        for sink in sinks:
            sink.close(ended_at=ended_at)

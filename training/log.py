"""A run's log: its curves, pictures, settings and results, for TensorBoard and other trackers (--report-to).

    Run -> RunLog -> EventFile (tensorboard.py), or Tracker: Weights & Biases and Trackio

`Run` hands over points: numbers, texts, pictures and tables by tag. A checkpoint is saved after `sync`, which
brings its points to where they belong: the log of a resumed run has no gaps and no duplicates.
"""

from __future__ import annotations

import io
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from common.errors import UsageError, fold_message
from common.files import read_json, write_bytes
from evaluation.style import render
from evaluation.tables import plain_values, write_json
from training.folders import LIST
from training.tensorboard import Description, EventFile, Value

# a tracker's library, its run, and what sends values by tag at an iteration
Opened = tuple[Any, Any, Callable[[dict[str, Any], int], None]]


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
        write_bytes(file, png)

    def sync(self) -> None:
        """Bring all points to where they belong; raises OSError where that fails."""
        for sink in self.sinks:
            sink.sync()

    def close(self, *, ended_at: int | None = None) -> None:
        """End the log, as that of a finished run if it has `ended_at` an iteration."""
        sinks, self.sinks = self.sinks, []
        for sink in sinks:
            sink.close(ended_at=ended_at)


class Tracker:
    """A run in Weights & Biases or Trackio, whose interfaces are alike; see `RunLog`.

    The run's folder has its name there, so that a resumed run continues the same one.

    Points are held back until a checkpoint has them, and the last one that was sent is noted: a resumed run
    repeats what a killed one did after its last checkpoint, and sends nothing twice. A tracker that fails
    while the run trains does not end it: what is missing there waits for the next checkpoint.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], *, begin_at: int | None) -> None:
        self.name, self.file = name, folder / f"{name}.json"
        record = read_json(self.file) if begin_at != 0 and self.file.is_file() else {}
        self.state = {"id": uuid.uuid4().hex[:8], "iteration": -1} | record
        self.sent = -1 if begin_at is None else self.state["iteration"]  # when this process begins
        self.queue: list[tuple[Mapping[str, Value], int]] = []
        self.reached = self.state["iteration"]  # by the curves, sent or queued
        self.has_warned = False
        folder.mkdir(parents=True, exist_ok=True)
        try:
            opened = OPEN[name](folder, self.state["id"], plain_values(settings))
        except ImportError as error:
            raise UsageError(f"--report-to {name} needs a package: pip install {name}") from error
        except Exception as error:  # it may fail in any way: no account, no network, no disk
            raise UsageError(f"--report-to {name}: {fold_message(error):.300}") from error
        self.library, self.run, self.send = opened
        write_json(self.file, self.state)

    def add(self, values: Mapping[str, Value], iteration: int) -> None:
        self.queue.append((values, iteration))
        if any(isinstance(value, float | int) for value in values.values()):
            self.reached = max(self.reached, iteration)

    def _convert(self, value: Value) -> Any:
        if isinstance(value, float | int | str):
            return value
        if isinstance(value, bytes):
            return self.library.Image(Image.open(io.BytesIO(value)))
        return self.library.Table(columns=[*value[0]], data=[[*row.values()] for row in value])

    def sync(self) -> None:
        points, self.queue = self.queue, []
        for point in points:
            values, iteration = point
            try:
                if iteration > self.sent:
                    self.send({tag: self._convert(value) for tag, value in values.items()}, iteration)
            except Exception as error:  # it may fail in any way, also for a while
                self.queue.append(point)
                self._warn_once(error)
        if not self.queue:
            self.state["iteration"] = self.reached
        write_json(self.file, self.state)

    def close(self, *, ended_at: int | None) -> None:
        try:
            self.run.finish()
        except Exception as error:
            self._warn_once(error)

    def _warn_once(self, error: Exception) -> None:
        """Say that the tracker fails, and that the run does not end for it."""
        if not self.has_warned:
            self.has_warned = True
            reason = f"{type(error).__name__}: {fold_message(error):.300}"
            what_happens = "the run continues, and sends what is missing there with the next checkpoint"
            warnings.warn(f"--report-to {self.name} fails ({reason}): {what_happens}", stacklevel=3)


def _open_wandb(folder: Path, identity: str, settings: Mapping[str, Any]) -> Opened:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "maml"),
        id=identity,
        name=folder.name,
        group=_name_group(folder),
        dir=folder,
        config=dict(settings),
        resume="allow",
        reinit="create_new",  # of several runs at once, each has its own
        settings=wandb.Settings(console="off"),
    )
    # its own steps only rise, also where a resumed run goes back
    run.define_metric("iteration", hidden=True)
    run.define_metric("*", step_metric="iteration")
    return wandb, run, lambda values, iteration: run.log({**values, "iteration": iteration})


def _open_trackio(folder: Path, identity: str, settings: Mapping[str, Any]) -> Opened:
    import trackio

    start = partial(
        trackio.init,
        project="maml",
        name=f"{folder.name}-{identity}",  # by which it is found again
        group=_name_group(folder),
        config=dict(settings),
        resume="allow",
        embed=False,
    )
    run = Context().run(start)  # in one context, a run ends the one before
    return trackio, run, lambda values, iteration: run.log(values, step=iteration)


OPEN = {"wandb": _open_wandb, "trackio": _open_trackio}


def _name_group(folder: Path) -> str | None:
    """Return the name of the sweep that the run belongs to, if any."""
    return folder.parent.name if (folder.parent / LIST).is_file() else None

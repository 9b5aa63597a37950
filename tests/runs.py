"""Helpers of the tests that train: run a command line in this process, read its files, compare two runs."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from commands.config import Config
from commands.parser import parse
from commands.resolve import resolve
from training.checkpoint import load_checkpoint
from training.folders import BEST, LAST
from training.trainer import Trainer


def command(*arguments: object) -> int:
    """Run one command line; return its exit code."""
    return main.main([str(argument) for argument in arguments])


def train(run: Path, *flags: object) -> Path:
    """Train into that folder, and return it."""
    assert command(*flags, "--checkpoint-path", run.parent, "--run-name", run.name) == 0
    return run


def settings_of(line: str) -> Config:
    """Return the settings of a new run."""
    return resolve(parse(line.split()))


def adapt(run: Path, task: Path, *flags: object) -> list[list[str]]:
    """Adapt a run or a checkpoint to a task; return its predictions, the heading first."""
    assert command("--adapt", task, "--load", run, *flags) == 0
    file = run / BEST if run.is_dir() else run
    return read_csv(file.with_name(f"{file.stem}-adapted-{task.stem}.csv"))


def read_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def read_record(folder: Path, pattern: str = "*.json") -> dict[str, Any]:
    """Return the content of a folder's one JSON file whose name fits the pattern."""
    (file,) = folder.glob(pattern)
    return json.loads(file.read_text())


def curves(folder: Path) -> dict[str, list[int]]:
    """Return the iterations of each scalar curve, read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    """Compare nested dictionaries of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Compare two runs' checkpoints to the bit, and the points of their curves."""
    for name in (LAST, BEST):
        assert_same_bits(vars(load_checkpoint(a / name)), vars(load_checkpoint(b / name)), name)
    assert curves(a) == curves(b)


def stop_at(iteration: int, patch: pytest.MonkeyPatch) -> None:
    """Interrupt every run in that iteration, counted from 1, as Ctrl-C does."""
    step = Trainer.step

    def interrupted(self: Trainer) -> None:
        if self.iteration + 1 == iteration:
            self.stop.signal = signal.SIGINT
        step(self)

    patch.setattr(Trainer, "step", interrupted)

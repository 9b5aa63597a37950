"""Helpers of the tests that train: a command line in this process, its curves, and two runs compared."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import main
from training.checkpoint import load_checkpoint
from training.folders import BEST, LAST
from training.trainer import Trainer


def command(*arguments: object) -> int:
    """Run one command line; return its exit code."""
    return main.main([str(argument) for argument in arguments])


def start(*arguments: object) -> subprocess.Popen:
    """Start one command line as a process of its own."""
    line = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until a process has made a file."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)


def curves(folder: Path) -> dict[str, list[int]]:
    """Return the iterations of each scalar curve, as TensorBoard's own reader sees them."""
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
    """Compare everything in two runs' checkpoints, and the points of their curves."""
    for name in (LAST, BEST):
        assert_same_bits(vars(load_checkpoint(a / name)), vars(load_checkpoint(b / name)), name)
    assert curves(a) == curves(b)


def stop_at(iteration: int, patch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in that iteration, from 1, of every run."""
    step = Trainer.step

    def interrupted(self: Trainer) -> None:
        if self.iteration + 1 == iteration:
            self.stop.signal = signal.SIGINT
        step(self)

    patch.setattr(Trainer, "step", interrupted)

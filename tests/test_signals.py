"""Signals: a network over time has exact derivatives, and tables and arrays give it the same channels."""

import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from plain_loop import EXAMPLES, TASKS, assert_matches_plain_loop, normal
from runs import command

from common.batch import TaskBatch
from learner import build_learner
from tasks.tables import Columns, load_table


@pytest.mark.parametrize("convolution", ["grouped", "im2col"])
def test_the_network_over_time_matches_a_plain_loop(convolution):
    network = build_learner("conv1d", 2, inputs=(2, 9), arguments={"channels": 3}, seed=1).double()
    parts = [normal(TASKS, EXAMPLES, *shape, seed=seed) for seed, shape in enumerate([(2, 9), (2,)] * 2)]
    assert_matches_plain_loop(network, TaskBatch(*parts), convolution=convolution, tolerance=1e-8)


def test_a_row_of_several_signals_is_their_channels():
    rows = build_learner("conv1d", 5, inputs=(24,), arguments={"signals": 3}, seed=1)
    channels = build_learner("conv1d", 5, inputs=(3, 8), seed=1)
    x = torch.randn(4, 3, 8)
    assert torch.equal(rows(x.flatten(1)), channels(x))


def test_what_is_no_signal_is_refused_in_one_line(refuse, tmp_path):
    learner = ["--learner", "conv1d", "--checkpoint-path", tmp_path]
    assert "a row of 1 is not 1 signals of one length, above 1" in refuse(*learner)
    rows = [f"{task},1,2,{number},4" for task in range(9) for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["task,a,b,c,y", *rows]))
    data = ["--dataset", f"table:{tmp_path / 't.csv'}", "-k", 2, "-q", 2, "--learner-args", "signals=2"]
    assert "say how many with --learner-args signals=N" in refuse(*learner, *data)
    assert "does not fit --dataset omniglot" in refuse(*learner, "--dataset", "omniglot")


def write_signals(folder, signals: np.ndarray) -> None:
    """Write cases `[cases, channels, length]` of ten classes in the form of the UCR and UEA archives."""
    folder.mkdir()
    lines = ["# a comment", "@problemName Tiny", "@data"]
    for number, case in enumerate(signals):
        channels = [",".join(map(str, channel)) for channel in case]
        lines.append(":".join([*channels, f"class {number % 10}"]))
    (folder / "Tiny_TRAIN.ts").write_text("\n".join(lines))


def test_the_example_writes_a_table_that_the_tool_learns_from(tmp_path, monkeypatch, capsys):
    signals = np.random.default_rng(0).normal(size=(40, 2, 5)).astype(np.float32)
    write_signals(tmp_path / "set", signals)
    monkeypatch.setattr(sys, "argv", ["signals.py", str(tmp_path / "set"), str(tmp_path / "set.parquet")])
    runpy.run_path(str(ROOT / "examples" / "signals.py"), run_name="__main__")
    assert "40 cases of 10 classes, 2 channels x 5" in capsys.readouterr().out
    columns, shares = Columns.parse(["class=label"]), {"train": 6, "validation": 2, "test": 2}
    file = tmp_path / "set.parquet"
    table = load_table(file, columns, torch.float64, classification=True, shares=shares)
    assert np.array_equal(table.x.numpy().reshape(signals.shape), signals)
    flags = ["--dataset", f"table:{file}", "--columns", "class=label", "-n", 2, "-k", 1, "-q", 2, "-s", 1]
    flags += ["--learner", "conv1d", "--learner-args", "signals=2", "--iterations", 1, "--eval-tasks", 2]
    assert command(*flags, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    assert command("--eval", "--load", tmp_path / "run") == 0

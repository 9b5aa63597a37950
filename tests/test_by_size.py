"""Evaluation by the size of tasks: the same tasks, divided by what they have."""

import json
from dataclasses import replace

import pytest
import torch
from runs import command

from evaluation.meta_test import Evaluation
from evaluation.tables import Caption, StepResults, sizes_record, sizes_table

CAPTION = Caption("title", "MSE", trained_steps=1, test_steps=1)


def test_each_size_has_the_mean_of_its_tasks():
    losses = torch.tensor([[3.0, 1.0], [3.0, 2.0], [3.0, 6.0], [3.0, 4.0]]).double()
    whole = Evaluation({"loss": {"transductive": losses}}, sizes={"shots": torch.tensor([1, 1, 2, 2])})
    record = sizes_record([whole])["shots"]
    assert [record[size]["tasks"] for size in ("1", "2")] == [2, 2]
    assert [record[size]["transductive"][1]["mean"] for size in ("1", "2")] == [1.5, 5.0]
    assert "1.5000" in sizes_table([whole], CAPTION) and "5.0000" in sizes_table([whole], CAPTION)


def test_a_size_of_one_task_has_no_interval_and_several_runs_have_their_spread():
    runs = [
        Evaluation({"loss": {"transductive": torch.tensor(losses)[:, None].double()}}, sizes=sizes)
        for sizes in [{"shots": torch.tensor([1, 2, 2])}]
        for losses in ([1.0, 2.0, 4.0], [2.0, 5.0, 9.0])
    ]
    _, one, two = sizes_table(runs, replace(CAPTION, test_steps=0)).splitlines()
    assert one.split() == ["1", "1", "1.5000", "(1.0000", "to", "2.0000)"]
    assert two.split()[:3] == ["2", "2", "5.0000"] and "(3.0000 to 7.0000)" in two


def test_many_sizes_are_put_together_and_none_is_left_out():
    values = torch.arange(1, 21).repeat(3)
    whole = Evaluation({"loss": {"transductive": torch.rand(60, 2).double()}}, sizes={"shots": values})
    record = sizes_record([whole])["shots"]
    assert [*record][:2] == ["1-3", "4-6"] and len(record) == 8
    assert sum(part["tasks"] for part in record.values()) == 60


def test_a_task_that_has_diverged_among_all_has_diverged_among_those_of_its_size():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-6])[:, None]
    losses = torch.cat([before, torch.tensor([1.0, 1.0, 1.0, 50.0, 1.0])[:, None]], 1).double()
    sizes = {"shots": torch.tensor([1, 1, 1, 2, 2])}
    whole = Evaluation({"loss": {"transductive": losses}}, sizes=sizes)
    part = StepResults.over([whole], "transductive", sizes["shots"] == 2)
    assert part.diverged == whole.find_diverged("transductive")[3:].sum(0).tolist()
    assert whole.find_diverged("transductive")[:, 1].tolist() == [False, False, False, True, False]


def test_an_evaluation_on_ranges_is_reported_by_size(tmp_path, capsys):
    line = ["--iterations", 2, "--val-tasks", 2, "--threads", 1, "--checkpoint-path", tmp_path]
    assert command("-k", "1-3", *line, "--run-name", "r") == 0
    capsys.readouterr()
    assert command("--eval", "--load", tmp_path / "r", "--eval-tasks", 40, "--eval-steps", 1) == 0
    assert "By size, after 1 step:" in capsys.readouterr().out
    (file,) = (tmp_path / "r").glob("*-1to3shot-*.json")
    result = json.loads(file.read_text())
    losses = torch.tensor(result["per_task"]["loss"]["transductive"])[:, 1]
    shots = torch.tensor(result["sizes"]["shots"])
    for size in (1, 2, 3):
        mean = result["by_size"]["shots"][str(size)]["transductive"][1]["mean"]
        assert mean == pytest.approx(losses[shots == size].mean().item(), rel=1e-5)

"""Checkpoints of all older versions are read, measured and gone on with as those versions did it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import main
from training.checkpoint import VERSION, load_checkpoint

OLD = ROOT / "tests" / "checkpoints"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def mean_losses(file: Path, out: Path) -> list[float]:
    """On 8 test tasks, after 0 to 3 inner steps."""
    line = ["--eval", "--load", file, "--eval-tasks", 8, "--eval-steps", 3, "--out", out]
    assert main.main([str(a) for a in line]) == 0
    (result,) = out.glob("*.json")
    tasks = json.loads(result.read_text())["per_task"]["loss"]["transductive"]
    return [sum(losses) / len(tasks) for losses in zip(*tasks, strict=True)]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_checkpoint_of_an_older_version_is_measured_and_goes_on_as_it_did_then(name, tmp_path):
    last = tmp_path / "run" / "last.pt"
    last.parent.mkdir()
    shutil.copy(OLD / f"{name}.pt", last)
    then = EXPECTED[name]
    assert mean_losses(last, tmp_path / "20") == pytest.approx(then["after 20 iterations"], rel=1e-5)
    if then["after 25 iterations"] is None:
        return
    assert main.main(["--load", str(last), "--iterations", "25"]) == 0
    assert load_checkpoint(last).iteration == 25
    assert mean_losses(last, tmp_path / "25") == pytest.approx(then["after 25 iterations"], rel=1e-5)
    assert torch.load(last, weights_only=True)["version"] == VERSION  # saved again, it is of today


def test_there_is_a_checkpoint_of_each_format_version():
    files = {path.stem for path in OLD.glob("*.pt")}
    versions = {torch.load(OLD / f"{name}.pt", weights_only=True)["version"] for name in files}
    assert files == EXPECTED.keys()
    assert versions == set(range(1, VERSION + 1))

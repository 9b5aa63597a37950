"""The benchmark of growth: its rehearsal, and that `torch.func` computes the same meta-gradient."""

import json
import subprocess
import sys
from types import SimpleNamespace

import peers
import pytest
import torch
from conftest import ROOT
from tool import TaskBatch, make_learner, make_maml


@pytest.mark.parametrize("name, shape", [("mlp", (1,)), ("conv", (1, 28, 28))])
def test_plain_torch_func_computes_the_same_meta_gradient(name, shape):
    learner = make_learner(name, 1, shape).double()
    x, y = torch.randn(3, 10, *shape).double(), torch.randn(3, 10, 1).double()
    batch = TaskBatch(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
    maml = make_maml(learner, steps=2, inner_lr=0.01, adapt_norm=True)
    expected = maml.meta_gradient(maml.initial_parameters(), batch).gradients
    regression = SimpleNamespace(classification=False)
    gradient = peers.func_vmap(peers.Work("", [], learner, regression, 3, 2, 0.01, 1)).gradient(batch)
    assert expected.keys() == gradient.keys()
    for weight, slope in expected.items():
        assert torch.from_numpy(gradient[weight]).allclose(slope, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_rehearsal_measures_every_kind_of_curve(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/growth.py", "--quick", "--rounds", "1", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads((tmp_path / "growth.json").read_text())
    assert (tmp_path / "growth.png").stat().st_size and {"machine", "load", "date"} <= record[
        "machine"
    ].keys()
    for curves in record["panels"].values():
        for curve in curves.values():
            assert len(curve["values"]) == 2 and min(curve["seconds"] + curve["peak"]) > 0
    engines = record["panels"]["inner steps, 10 M weights"]
    assert engines["unrolled, exact"]["seconds"] and "adjoint, first-order" in engines

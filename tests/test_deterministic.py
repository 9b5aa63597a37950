"""--deterministic: the same bits for the same command, and a refusal where they cannot be had."""

import pytest
import torch
from runs import assert_same_bits, command, train

from training import trainer
from training.checkpoint import load_checkpoint
from training.folders import LAST

SMALL = ["--iterations", 8, "--val-every", 8, "--meta-batch-size", 4, "--deterministic"]
LEARNER = """
import torch

class Net(torch.nn.Linear):
    def forward(self, x):
        zeros = torch.zeros(4).put(torch.tensor([0, 1]), torch.ones(2))
        return super().forward(x) + zeros.sum()

def net(outputs):
    return Net(1, outputs)
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(trainer, "UNCOMPILED", {False: 1, True: 1})
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "way",
    [["--compile", "off", "--threads", 2], pytest.param(["--compile", "on"], marks=pytest.mark.slow)],
    ids=["uncompiled", "compiled"],
)
def test_the_same_command_gives_the_same_bits_and_resuming_without_it_is_said(way, tmp_path, capsys):
    a, b = (load_checkpoint(train(tmp_path / name, *SMALL, *way) / LAST) for name in ("a", "b"))
    assert a.settings["compile"] == way[1] and a.computed_by["deterministic"] == "yes"
    assert_same_bits(a.parameters | a.progress, b.parameters | b.progress)
    if way[1] == "off":
        assert command("--load", tmp_path / "a" / LAST, "--iterations", 9) == 0
        assert "deterministic yes, now no" in capsys.readouterr().out


def test_an_operator_without_a_deterministic_form_is_refused_in_one_line(tmp_path, refuse):
    (tmp_path / "own.py").write_text(LEARNER)
    flags = ["--learner", f"{tmp_path / 'own.py'}:net", "--compile", "off"]
    flags += ["--checkpoint-path", tmp_path / "runs"]
    assert "--deterministic: the operator put_ has no deterministic form" in refuse(*SMALL, *flags)
    assert not (tmp_path / "runs").exists()
    assert command(*SMALL[:-1], *flags) == 0  # without the flag it trains

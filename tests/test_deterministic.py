"""--deterministic: the same bits for the same command, a refusal where that cannot be had."""

import pytest
import torch

import main
from training.checkpoint import load_checkpoint
from training.compiler import Compiler

SMALL = ["--iterations", "8", "--val-every", "8", "--meta-batch-size", "4", "--deterministic"]
LEARNER = """
import torch

class Net(torch.nn.Linear):
    def forward(self, x):
        said = torch.zeros(4).put(torch.tensor([0, 1]), torch.ones(2))
        return super().forward(x) + said.sum()

def net(outputs):
    return Net(1, outputs)
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr("training.trainer.VALIDATION_TASKS", 4)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "way",
    [["--compile", "off", "--threads", "2"], ["--compile", "on", "--compile-after", "2"]],
    ids=["uncompiled", "compiled"],
)
def test_the_same_command_gives_the_same_bits(way, tmp_path):
    runs = []
    for name in ("a", "b"):
        assert main.main([*SMALL, *way, "--checkpoint-path", str(tmp_path), "--run-name", name]) == 0
        runs.append(load_checkpoint(tmp_path / name / "last.pt"))
    assert runs[0].config.compile == way[1]
    assert runs[0].computed_by["deterministic"] == "yes"
    for name, tensor in runs[0].parameters.items():
        assert torch.equal(tensor.view(torch.int32), runs[1].parameters[name].view(torch.int32))
    assert runs[0].progress == runs[1].progress


def test_an_operator_without_a_deterministic_form_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "own.py").write_text(LEARNER)
    line = [
        "--learner",
        f"{tmp_path / 'own.py'}:net",
        "--compile",
        "off",
        "--checkpoint-path",
        str(tmp_path / "runs"),
    ]
    assert main.main([*SMALL, *line]) == 2
    said = capsys.readouterr().err
    assert said.startswith("main.py: error: --deterministic: the operator put_ has no deterministic form")
    assert said.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert main.main([*SMALL[:-1], *line]) == 0  # without the flag it learns


def test_a_run_that_goes_on_without_it_says_so(tmp_path, capsys):
    line = ["--compile", "off", "--checkpoint-path", str(tmp_path), "--run-name", "a"]
    assert main.main([*SMALL, *line]) == 0
    assert main.main(["--load", str(tmp_path / "a" / "last.pt"), "--iterations", "9"]) == 0
    assert "to rounding, not to the bit: it had deterministic yes, now no" in capsys.readouterr().out


def test_compiled_code_of_one_kind_is_not_taken_for_the_other():
    graph = torch.fx.symbolic_trace(lambda x: x.sin())
    compiler = Compiler(torch.device("cpu"))
    keys = []
    for chosen in (True, False):
        torch.use_deterministic_algorithms(chosen)
        keys.append(compiler._key(graph, [], {}))
    assert keys[0] != keys[1]

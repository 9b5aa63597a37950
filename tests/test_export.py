"""Weights for other programs: the page's code in plain PyTorch predicts what --adapt does."""

import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_classes
from runs import assert_same_bits, command, read_csv
from test_readme import blocks, command_lines

from training.checkpoint import load_checkpoint

safetensors = pytest.importorskip("safetensors.torch")
PAGE = Path("docs/weights.md")
LOAD = f"--load {ROOT}/checkpoints/pretrained"
SHORT = ["--iterations", 3, "--val-every", 3, "--meta-batch-size", 2]


@pytest.fixture(autouse=True)
def _in_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def columns_of(file: str, first: int) -> torch.Tensor:
    """Return the predictions in a file, from a column on."""
    return torch.tensor([[float(cell) for cell in row[first:]] for row in read_csv(Path(file))[1:]])


def test_the_pages_code_predicts_what_adapt_does(request):
    Path("mine.csv").write_text("x,y\n0,1\n1,\n2,5\n3,\n4,9\n")
    write_classes(Path("data"), 15)
    pixels = np.random.default_rng(0).random((9, 1, 28, 28))
    task = {"support_x": pixels[:5], "support_y": np.arange(5), "query_x": pixels[5:]}
    np.savez("task.npz", **task)
    images = ["--dataset", "images:data", "--image-size", 28, "--channels", 1, "--learner", "conv", "-k", 1]
    images += ["--split-shares", "1,1,1", "--inner-lr", 2, "--test-steps", 3, "--eval-steps", 3, "-q", 1]
    images += ["--precision", "float64"]  # float32's rounding may turn a ReLU over, and move p by 0.002
    curves = ["--inner-lr", 0.01, "--test-steps", 3]
    assert command(*SHORT, *curves, "--run-name", "sinusoid") == 0
    assert command(*SHORT, "--algorithm", "maml++", "--inner-lr-max", 0.05, "--run-name", "rates") == 0
    assert command(*SHORT, *images, "--run-name", "omniglot") == 0
    for line in command_lines(PAGE, r"python main\.py"):
        assert command(*shlex.split(line, comments=True)) == 0
    for name in ("rates", "omniglot"):
        assert command("--load", f"checkpoints/{name}", "--save-weights", f"{name}.safetensors") == 0
    assert command("--adapt", "mine.csv", "--load", "checkpoints/rates") == 0
    norm = ["--batch-norm", "transductive"]
    assert command("--adapt", "task.npz", "--load", "checkpoints/omniglot", *norm) == 0

    scope = {name: torch.as_tensor(array) for name, array in task.items()}
    scope |= {name: scope[name].float().double() for name in ("support_x", "query_x")}
    plain, start, rates, convolutional = (compile(code, str(PAGE), "exec") for code in blocks(PAGE, "python"))
    expected = columns_of("checkpoints/sinusoid/best-adapted-mine.csv", 1)
    exec(plain, scope)
    torch.testing.assert_close(scope["predictions"], expected, rtol=1e-5, atol=1e-5)
    exec(start, scope)
    torch.testing.assert_close(scope["adapted"], expected, rtol=1e-5, atol=1e-5)
    exec(rates, scope)
    expected = columns_of("checkpoints/rates/best-adapted-mine.csv", 1)
    torch.testing.assert_close(scope["adapted"], expected, rtol=1e-5, atol=1e-5)
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    torch.set_default_dtype(torch.float64)
    exec(convolutional, scope)
    expected = columns_of("checkpoints/omniglot/best-adapted-task.csv", 2)
    torch.testing.assert_close(scope["logits"].softmax(1), expected, rtol=1e-6, atol=1e-6)


def test_both_kinds_of_file_have_the_same_tensors_and_one_has_the_settings(tmp_path):
    assert command(*SHORT, "--algorithm", "meta-sgd", "--run-name", "run") == 0
    for file in ("a.safetensors", "a.pt"):
        assert command("--load", "checkpoints/run", "--save-weights", tmp_path / "new" / file) == 0
    tensors = safetensors.load_file("new/a.safetensors")
    assert_same_bits(torch.load("new/a.pt", weights_only=True), tensors)
    assert tensors.keys() == load_checkpoint(Path("checkpoints/run/best.pt")).parameters.keys()
    with safetensors.safe_open("new/a.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["algorithm"], metadata["inner-rates"], metadata["s"]) == ("meta-sgd", "element", "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            f"{LOAD}/sinusoid-maml --save-weights x.pt2",
            "x.pt2: a program is of an adapted network: add --adapt",
        ),
        (f"{LOAD}/sinusoid-cavia --save-weights x.pt", "x.pt: a context is no part of the learner's class"),
        (f"{LOAD}/sinusoid-maml --save-weights copy.pt", "copy.pt is a checkpoint, which would be lost"),
        ("--load many --save-weights x.pt", "many has many runs: name one of them"),
        ("--load x --save-weights x.pt --seed 1", "--seed has no meaning with --save-weights"),
        ("--save-weights x.pt", "--save-weights needs --load"),
        (
            "--load x --save-weights x.safetensors",
            "FILE.safetensors needs a package: pip install safetensors",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(flags, message, refuse, monkeypatch):
    Path("copy.pt").write_bytes((ROOT / "checkpoints/pretrained/sinusoid-maml/best.pt").read_bytes())
    Path("many").mkdir()
    Path("many/runs.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert message in refuse(*flags.split())

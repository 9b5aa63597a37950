"""The tutorial is true: its Python runs unchanged and shows what the text says."""

import contextlib
import io
import re
import subprocess
from typing import Any

import pytest
import torch
from conftest import ROOT

from common.batch import TaskBatch
from common.choices import Choices
from evaluation.meta_test import evaluate
from maml import MAML
from training.meta_gradients import make_meta_gradient

TEXT = (ROOT / "docs/tutorial.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
Scope = dict[str, Any]


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Scope:
    """Run the snippets; return their variables, the `folder` they wrote to, and what they `printed`."""
    scope: Scope = {"folder": tmp_path_factory.mktemp("tutorial")}
    printed = io.StringIO()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setenv("MPLBACKEND", "Agg")
        patched.chdir(scope["folder"])
        for snippet in SNIPPETS:
            exec(snippet, scope)
    scope["plt"].close("all")
    return scope | {"printed": printed.getvalue()}


def test_its_command_runs_what_is_tested_here():
    (command,) = re.findall(r"^(sed .*?)\| python -$", TEXT.split("## 1.")[0], re.MULTILINE)
    code = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert code == "".join(SNIPPETS)
    assert len(re.findall(r"^iterations = 300\b", code, re.MULTILINE)) == 1


def test_its_maml_falls_below_training_from_scratch(tutorial: Scope):
    first, *_, last = tutorial["windows"](tutorial["losses"]).tolist()
    assert len(tutorial["losses"]) == 10 * len(tutorial["scratch_losses"]) == 3000
    assert last < 0.8 * first and last < 0.75 * tutorial["scratch_level"]


def test_its_meta_gradient_is_the_tools_in_float64(tutorial: Scope):
    """Compare with an engine and a number of steps that the text does not use."""
    theta, tasks, steps = tutorial["theta64"], tutorial["tasks"], 3
    tool = MAML(tutorial["net"], tutorial["F"].mse_loss, Choices(inner_lr=0.01, steps=steps))
    meta_gradient = make_meta_gradient(tool, engine="adjoint")
    gradients = meta_gradient(theta, TaskBatch(*tutorial["stacked"])).gradients
    exact, first = (tutorial["meta_gradient"](theta, tasks, steps, order) for order in (False, True))
    assert exact.keys() == gradients.keys() == theta.keys()
    for name in exact:
        torch.testing.assert_close(gradients[name], exact[name], rtol=0, atol=1e-10)
    assert max((exact[name] - first[name]).abs().max() for name in exact) > 0.01


def test_its_numbers_of_first_order_are_true(tutorial: Scope):
    """Find the numbers that need no training in the text, to the digit."""
    slopes = re.search(r"definition (\S+), .* gradient (\S+), .* order (\S+)", tutorial["printed"])
    off = re.findall(r"off by (\S+)% .* cosine (\S+)", tutorial["printed"])[:2]
    assert slopes is not None
    for name, slope in zip(("by definition", "exact"), slopes.groups(), strict=False):
        assert f"| {name} | {slope} |" in TEXT
    cells = " | ".join(f"off by {error} %, cosine {cosine}" for error, cosine in off)
    assert f"| first order, at the start | {slopes[3]} | {cells} |" in TEXT


def test_its_test_losses_are_those_of_eval(tutorial: Scope):
    how = {"tasks": 600, "steps": 10, "normalisations": ("transductive",)}
    result = evaluate(tutorial["tool"], tutorial["theta"], tutorial["Sinusoid"](10, 10), "test", **how)
    torch.testing.assert_close(tutorial["errors"].double(), result.losses["transductive"])


def test_it_draws_the_pictures_that_it_shows(tutorial: Scope):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    assert shown == ["tutorial-loss.png", "tutorial-fit.png"]
    for folder in (tutorial["folder"], ROOT / "docs"):
        for name in shown:
            picture = (folder / name).read_bytes()
            assert picture.startswith(b"\x89PNG") and len(picture) < 100_000

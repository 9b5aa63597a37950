"""The check of a meta-gradient before training: right ones pass, and every wrong one is seen and located."""

import random
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import write_noise
from runs import command
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from commands.build import print_once
from commands.resolve import resolve
from common.batch import TaskBatch
from common.choices import META_GRADIENTS, Choices
from learners.diagnosis import find_wrong_layer
from maml import MAML
from training import compiler, gradient_check, trainer
from training.checkpoint import load_checkpoint
from training.gradient_check import check_meta_gradient
from training.meta_gradients import make_meta_gradient

KEYS = torch.tensor([[1, 2], [3, 4]])


class Cube(torch.autograd.Function):
    """The third power, whose derivative in forward mode is `factor` times the right one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient, None

    @staticmethod
    def jvp(ctx, tangent, _):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent * ctx.factor


class Frozen(torch.autograd.Function):
    """The square, whose slope counts as a constant: it has no second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**2, 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        return ctx.saved_tensors[0] * gradient


class FrozenSlope(nn.Module):
    def forward(self, x):
        return Frozen.apply(x)[0]


class Cubed(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return Cube.apply(x, self.factor)


class HalfStopped(nn.Module):
    """Half of the derivative is not there, in no order of differentiation."""

    def forward(self, x):
        return x**2 + (x**2).detach()


class Float32Alone(nn.Module):
    def forward(self, x):
        return torch.tanh(x) @ torch.eye(x.shape[-1], dtype=torch.float32)


class Narrow(nn.Module):
    """Lose digits inside: single-precision complex numbers, or bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        y = torch.tanh(x.to(self.dtype)) * x.to(self.dtype)
        return y.real.to(x.dtype) if self.dtype.is_complex else y.to(x.dtype)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


def network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2))


def batch(*shape: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, *shape), (2, 5, 2)) * 2
    return TaskBatch(*(torch.randn(*size, generator=generator) for size in shapes))


def check(learner: nn.Module, meta_gradient: str = "exact", shape=(3,), **choices):
    if meta_gradient == "implicit":
        choices["proximal"] = 1.0
    choices = {"inner_lr": 0.05, "steps": 3, "adapt_norm": True, "meta_gradient": meta_gradient} | choices
    maml = MAML(learner, F.mse_loss, Choices(**choices))
    engines = ("adjoint", "unrolled") if meta_gradient in ("exact", "first-order") else ("unrolled",)
    return check_meta_gradient(maml, maml.initial_parameters(), batch(*shape), KEYS, engines)


RIGHT = {
    "kinks": lambda: nn.Sequential(nn.ReLU(), nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 8)),
    "dropout and batch norm": lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(8), nn.LeakyReLU()),
}


@pytest.mark.parametrize("meta_gradient", META_GRADIENTS)
@pytest.mark.parametrize("layer", RIGHT)
def test_a_right_meta_gradient_passes(layer, meta_gradient):
    result = check(network(RIGHT[layer]()), meta_gradient)
    assert result.engine is not None and result.error < 0.1 and result.dtype == torch.float64


@pytest.mark.parametrize(
    "choices",
    [
        dict(inner_rates="layer-step", objective="multi-step", batch_norm="per-step", norm_per_step=True),
        {"inner_rates": "element", "inner_optimizer": "adam"},
        {"fast_weights": "head", "head_init": "zero", "inner_clip": 0.1},
        {"head_init": "ridge"},
        {"head_init": "ridge", "steps": 0},
    ],
)
def test_right_meta_gradients_of_other_choices_pass(choices):
    assert check(network(nn.Sequential(nn.BatchNorm1d(8), nn.Tanh())), **choices).error < 0.1


def test_batch_norm_of_equal_examples_is_no_false_alarm():
    """The variance is 0, so that the loss is too rough for differences."""
    learner = network(
        nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)))
    )
    maml = MAML(learner, F.mse_loss, Choices(inner_lr=0.4, steps=3, adapt_norm=True))
    equal = replace(batch(3), support_x=torch.ones(2, 5, 3), query_x=torch.ones(2, 5, 3))
    assert check_meta_gradient(maml, maml.initial_parameters(), equal, KEYS, ["adjoint"]).engine == "adjoint"


def test_images_with_pooling_pass():
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8)]
    layers += [nn.Conv2d(8, 8, 3), nn.ReLU()]
    assert check(nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 2)), shape=(1, 12, 12)).error < 1


@pytest.mark.parametrize("meta_gradient", META_GRADIENTS)
def test_a_meta_gradient_that_is_one_percent_off_is_seen(meta_gradient, monkeypatch):
    def make_wrong(maml, **options):
        right = make_meta_gradient(maml, **options)

        def wrong(*arguments, **inputs):
            result = right(*arguments, **inputs)
            factor = 1.01 if maml.over_tasks is vmap else 1.0  # the loop is right
            return result._replace(gradients={n: factor * g for n, g in result.gradients.items()})

        return wrong

    monkeypatch.setattr(gradient_check, "make_meta_gradient", make_wrong)
    assert check(network(nn.Tanh()), meta_gradient).engine is None


@pytest.mark.parametrize(
    ("make_layer", "engine", "dtype", "by_loop_alone"),
    [
        (Cubed, "adjoint", torch.float64, ""),
        (lambda: Cubed(1.05), "unrolled", torch.float64, ""),  # the other one is wrong
        (HalfStopped, "adjoint", torch.float64, "stops gradients on purpose"),
        (spectral, "adjoint", torch.float64, "stops gradients on purpose"),
        (Float32Alone, "adjoint", torch.float32, ""),
        (lambda: Narrow(torch.cfloat), "adjoint", torch.float32, ""),  # by what it resolves
        (lambda: Narrow(torch.bfloat16), "adjoint", torch.float32, "bfloat16 inside"),
    ],
)
def test_a_layer_is_checked_as_far_as_it_allows(make_layer, engine, dtype, by_loop_alone):
    result = check(network(make_layer()))
    assert (result.engine, result.dtype) == (engine, dtype)
    assert by_loop_alone in result.by_loop_alone and bool(by_loop_alone) == bool(result.by_loop_alone)


def test_a_learner_that_is_wrong_everywhere_is_located():
    class Wrong(HalfStopped):
        def forward(self, x):
            return x**2 + x.new_tensor((x**2).tolist())  # no function that stops gradients is called

    learner = network(nn.Sequential(nn.Tanh(), Wrong())).double()
    finding = find_wrong_layer(learner, dict(learner.named_parameters()), (batch(3).support_x[0].double(),))
    assert finding is not None and finding.layer == "1.1" and finding.kind == "Wrong"


def test_a_function_without_its_second_derivative_is_no_stop_on_purpose():
    maml = MAML(network(FrozenSlope()), F.mse_loss, Choices(inner_lr=0.05, steps=2), vectorise=False)
    result = check_meta_gradient(maml, maml.initial_parameters(), batch(3), KEYS, ["unrolled"])
    assert result.engine is None and not result.by_loop_alone


# ---- runs with the learners and losses of this file ------------------------------------------


def between(make):
    """Return a factory of a learner with this layer."""
    return lambda outputs: nn.Sequential(nn.Linear(1, 8), make(), nn.Linear(8, outputs))


right, stops, fixed, frozen = map(between, (Cubed, HalfStopped, Float32Alone, FrozenSlope))
wrong = between(lambda: Cubed(1.05))
narrow = between(lambda: nn.Sequential(Float32Alone(), nn.Linear(8, 8), Cubed(2.0)))


class Left(nn.Linear):
    """Leave a number where no pass is undone."""

    calls, last = 0, 0.0

    def __init__(self, outputs):
        super().__init__(1, outputs)
        self.zeros = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        Left.last = super().forward(x).square().mean()
        return super().forward(x)


class Counts(Left):
    def forward(self, x):
        Left.calls += 1
        return super().forward(x) * (1 + 0.1 * Left.calls)


class Schedules(Left):
    last = kept = 0.0  # the second is not read

    def forward(self, x):
        self.calls, self.kept = self.calls + 1, x
        self.last = super().forward(x) / self.calls + 0.5 * self.last
        return self.last - self.last.mean(0)


class Flips(Left):
    def forward(self, x):
        return super().forward(x) * (1 if random.random() < 0.5 else 2)


class Root(Left):
    def forward(self, x):
        return super().forward(x) + self.zeros.square().sum().sqrt()


class Vectors(Left):
    """Use eigenvectors, whose derivative in forward mode is NaN."""

    def forward(self, x):
        matrix = super().forward(x)[:, :, None] + torch.diag(torch.arange(3)).to(x)
        return torch.linalg.eigh(matrix)[1][:, 0, :1].square()


class Saves(Left):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Masks(Left):
    def __init__(self, outputs):
        super().__init__(outputs)
        self.weight.register_hook(lambda gradient: 0.1 * gradient)


def reads(outputs, targets):
    return (outputs - targets).square().mean() + Left.last


@pytest.fixture
def train_own(tmp_path, monkeypatch, capsys):
    """Return a function that trains a learner of this file; it checks the exit code, and returns stderr."""
    print_once.cache_clear()  # another test of this process may have said it
    here = str(Path(__file__).parent)
    imports = f"import sys\nsys.path.insert(1, {here!r})\nfrom test_gradient_check import *\n"
    (tmp_path / "own.py").write_text(imports)
    monkeypatch.chdir(tmp_path)

    def train(name: str, *flags: str, code: int = 0) -> str:
        line = ["--learner", f"own.py:{name}", "--iterations", 2, "--eval-tasks", 2]
        line += ["--checkpoint-path", tmp_path / "runs", "--run-name", "a"]
        assert command(*line, *flags) == code
        return capsys.readouterr().err

    return train


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("right", "--engine adjoint", "Checked: the meta-gradient agrees with central differences (float64"),
        ("stops", "", "Checked: the meta-gradient agrees with a plain loop (the learner or the loss stops"),
        ("wrong", "", "Checked: the meta-gradient agrees with central differences"),  # auto is unrolled here
        ("wrong", "--engine adjoint", "layer 1 (Cubed) being 5.0% off in forward mode: use --engine"),
        ("fixed", "", "agrees with central differences (float32 to 5%"),
        ("frozen", "", "its layer 1 (FrozenSlope) being 32.0% off in reverse mode: write that from other"),
        ("narrow", "--engine adjoint", "its layer 1.2 (Cubed) being 100.0% off in forward mode"),
        ("wrong", "--algorithm imaml", "layer 1 (Cubed) being 5.0% off in forward mode: write that from"),
        ("wrong", "--engine adjoint --no-check-gradients", ""),
        (
            "right",
            "--algorithm reptile --inner-lr 0.0001",
            "agrees with the moves of a plain loop's weights (float64",
        ),
    ],
)
def test_a_run_says_whether_its_gradient_is_right(name, flags, words, train_own):
    refused = "being" in words
    said = train_own(name, *flags.split(), code=2 if refused else 0)
    assert words in said and ("Checked" in said) == bool(words and not refused)
    assert "depend on the other query examples" not in said


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("Counts", "", "gives other outputs when called again with the same inputs"),
        ("Flips", "", "gives other outputs when called again with the same inputs"),
        ("Left", "--loss own.py:reads", "gives another value for the same outputs"),
        ("Root", "", "the gradient by zeros is not finite at the initial weights"),
        ("Saves", "", "torch.utils.checkpoint does not work here: call the layer itself"),
        ("frozen", "--algorithm imaml", "its layer 1 (FrozenSlope) has no derivative in forward mode"),
        ("Masks", "", "the network (Masks) has a hook on the gradient of weight"),
    ],
)
def test_a_pass_that_is_no_function_of_weights_and_inputs_is_refused(name, flags, words, train_own):
    said = train_own(name, *flags.split(), code=2)
    assert words in said and "--first-order" not in said


def test_what_a_pass_leaves_or_mixes_is_said(train_own):
    said = train_own("Schedules")
    assert "Each pass starts with the learner's calls, last as built" in said
    assert "Outputs for an example depend on the other query examples" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong", "--engine unrolled is right, and taken"),
        ("Vectors", "is not finite with --engine adjoint, where --engine unrolled gives numbers"),
        ("frozen", "layer 1 (FrozenSlope) has no derivative in forward mode"),
    ],
)
def test_auto_leaves_an_engine_that_is_wrong_or_fails(name, words, train_own, monkeypatch, tmp_path):
    adjoint = {"engine": "adjoint"}
    monkeypatch.setattr("commands.train.resolve", lambda flags: resolve(flags).replace_settings(**adjoint))
    said = train_own(name, "--check-gradients", code=2 if name == "frozen" else 0)
    assert words in said
    if name == "frozen":  # the other one is wrong, too
        assert "its layer 1 (FrozenSlope) being 32.0% off in reverse mode" in said
    else:
        settings = load_checkpoint(tmp_path / "runs" / "a" / "last.pt").settings
        assert settings["engine"] == "unrolled" and "Checked: " in said


def test_seeds_share_a_check_and_what_decides_it_has_its_own(train_own):
    assert train_own("right", "--seeds", "0-1", "--sweep", "vectorise=yes,no").count("Checked: ") == 2


@pytest.mark.parametrize(("factor", "times"), [(1.5, 3), (float("nan"), 3), (1.5, 2)])
def test_a_run_stays_uncompiled_if_three_compiled_iterations_are_wrong(
    factor, times, tmp_path, capsys, monkeypatch
):
    calls = count()

    def make_wrong(self, function, tensors, structure, options):
        def run(tensors):
            self._tracing = True  # what the function calls is part of it
            outputs = function(*compiler._unflatten(tensors, structure))
            self._tracing = False
            wrong = factor if next(calls) < times else 1
            return pytree.tree_map(lambda t: wrong * t if t.is_floating_point() else t, outputs)

        return run

    monkeypatch.setattr(compiler.Compiler, "_library", make_wrong)
    monkeypatch.setattr(trainer, "UNCOMPILED", {False: 2, True: 2})
    line = ["--iterations", 8, "--compile", "on", "--checkpoint-path", tmp_path, "--run-name", "a"]
    assert command(*line, "--eval-tasks", 2, "--val-tasks", 2) == 0
    said = "The run stays uncompiled: compiled, an iteration is" in capsys.readouterr().err
    assert said == (times == 3)


def test_images_that_cannot_be_compiled_are_trained_with_grouped_convolutions(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise compiler.CompilationError("no")

    monkeypatch.setattr(compiler.Compiler, "_library", fail)
    write_noise(tmp_path / "images", 8, *"abcdefghijkl")
    line = f"--dataset images:{tmp_path}/images --image-size 8 --channels 1 -n 2 -q 1 --learner conv".split()
    line += f"--val-tasks 2 --val-every 4 --compile on --conv im2col --checkpoint-path {tmp_path}".split()
    for name, iterations in (("a", 4), ("a", 6), ("whole", 6)):
        assert command(*line, "--run-name", name, "--iterations", iterations, "--resume") == 0
    assert capsys.readouterr().err.count("The run stays uncompiled: no") == 2
    resumed, whole = (load_checkpoint(tmp_path / name / "last.pt") for name in ("a", "whole"))
    assert (whole.settings["compile"], whole.settings["convolution"]) == ("off", "grouped")
    assert all(torch.equal(resumed.parameters[n], w) for n, w in whole.parameters.items())

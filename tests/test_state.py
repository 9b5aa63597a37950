"""State that a pass updates: carried through a task, dropped after it, and never lost from the module."""

import copy

import pytest
import torch
from plain_loop import (
    ENGINES,
    EXAMPLES,
    KEYS,
    STEPS,
    TASKS,
    algorithm,
    assert_close,
    assert_matches_plain_loop,
    convolutions,
    distance,
    filled,
    images,
    layers,
    meta_gradient,
    normal,
    plain_loop,
    plain_predictions,
    vectors,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from common.batch import TaskBatch
from learners.diagnosis import find_followers
from learners.functional import FunctionalLearner
from learners.modules import in_evaluation_mode

# ---- buffers and frozen parameters ----


class InPlaceNorm(nn.BatchNorm1d):
    """Update the statistics in place, without gradient, and normalise with them."""

    @torch.no_grad()
    def update(self, x):
        self.num_batches_tracked += 1
        self.running_mean.mul_(0.6).add_(0.4 * x.mean(0))
        self.running_var.mul_(0.6).add_(0.4 * x.var(0))

    def forward(self, x):
        if self.training:
            self.update(x)
        scale = self.weight * torch.rsqrt(self.running_var + self.eps) / (1 + self.num_batches_tracked)
        return (x - self.running_mean) * scale + self.bias


class AttachedNorm(nn.BatchNorm1d):
    """Differentiate the part of the mean that comes from this pass."""

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.6)
            self.running_mean += 0.4 * x.mean(0)
        return (x - self.running_mean) * self.weight + self.bias


class SuperNorm(nn.BatchNorm1d):
    """Extend PyTorch's forward: its running statistics move in training, and serve in evaluation."""

    def forward(self, x):
        return super().forward(x).sin()


class Assigning(nn.Module):
    """Assign another tensor to a buffer, which is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.linspace(-0.5, 0.5, 4), persistent=False)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        if self.training:
            self.memory = 0.5 * self.memory + 0.5 * x.mean(0).detach()
        return x + self.gain * self.memory**2


BUFFERED = {
    "in place": lambda: layers(InPlaceNorm(4)),
    "attached": lambda: layers(AttachedNorm(4)),
    "super": lambda: layers(SuperNorm(4)),
    "assigned": lambda: layers(Assigning()),
}


@pytest.mark.parametrize(
    ("kind", "with_example"), [*((kind, True) for kind in BUFFERED), ("in place", False)]
)
def test_each_task_carries_its_buffers_through_its_inner_steps(kind, with_example):
    module, batch = filled(BUFFERED[kind]()), vectors(3)
    options = {"example": batch.support_x[0]} if with_example else {}
    assert_matches_plain_loop(module, batch, steps=3, **options)
    carried, fresh = (
        plain_loop(module, F.mse_loss, batch, steps=3, carry=carry)[0] for carry in (True, False)
    )
    assert kind == "super" or distance(fresh, carried) > 1e-3  # the others' buffers matter in training
    maml = algorithm(module, **options)
    outputs = maml.predictions(maml.initial_parameters(), batch, STEPS)["transductive"]
    torch.testing.assert_close(outputs, plain_predictions(module, F.mse_loss, batch))


def tensors_of(*modules: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for module in modules for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.InstanceNorm1d, nn.SyncBatchNorm])
def test_a_norm_layer_in_evaluation_mode_keeps_its_running_statistics(layer):
    module = filled(layers(layer(4, track_running_stats=True, affine=True)))
    norm = module[1].eval()
    norm.running_mean += torch.linspace(-1, 1, 4)
    norm.running_var += torch.linspace(0.5, 2, 4)
    batch = vectors(3)
    if layer is nn.InstanceNorm1d:
        module[0] = filled(nn.Conv1d(2, 4, 3))
        module[3] = filled(nn.Linear(1, 2))
        batch = TaskBatch(*(normal(TASKS, EXAMPLES, *s, seed=i) for i, s in enumerate(2 * ((2, 3), (4, 2)))))
    before = tensors_of(module)
    assert_matches_plain_loop(module, batch)
    assert all(map(torch.equal, before, tensors_of(module)))
    maml = algorithm(module)
    outputs = maml.predictions(maml.initial_parameters(), batch, STEPS, ("transductive", "inductive"))
    expected = plain_predictions(module, F.mse_loss, batch)
    torch.testing.assert_close(outputs["transductive"], expected)
    torch.testing.assert_close(outputs["inductive"], expected)
    assert maml.learner.training and not maml.learner[1].training  # predicting restores the modes


class FrozenState(nn.Module):
    """Keep an average in a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.average = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.average.lerp_(x.mean(0), 0.3)
        return x - self.average


@pytest.mark.parametrize("vectorise", [True, False])
def test_frozen_state_is_carried_through_a_task_and_then_dropped(vectorise):
    batch, module, reference = vectors(3), filled(layers(FrozenState())), filled(layers(FrozenState()))
    average = reference[1].average.detach()
    del reference[1].average
    reference[1].register_buffer("average", average)  # in the plain loop
    example = batch.support_x[0]
    assert_matches_plain_loop(module, batch, reference=reference, example=example, vectorise=vectorise)


STAYING = {
    "batch norm": lambda: convolutions(nn.BatchNorm2d(4)),
    "instance norm": lambda: convolutions(nn.InstanceNorm2d(4, track_running_stats=True)),
    "frozen": lambda: layers(nn.BatchNorm1d(4)).requires_grad_(False).append(nn.Linear(2, 2)),
    **{kind: BUFFERED[kind] for kind in ("in place", "super")},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", STAYING)
def test_modules_stay_as_they_are_and_nothing_passes_between_tasks(kind, engine):
    module = filled(STAYING[kind]())
    batch = images() if isinstance(module[0], nn.Conv2d) else vectors(3)
    maml = algorithm(module)
    before = tensors_of(module, maml.learner)
    first, second = (meta_gradient(maml, batch, engine) for _ in range(2))
    maml.predictions(maml.initial_parameters(), batch, steps=1)
    assert all(map(torch.equal, before, tensors_of(module, maml.learner)))
    assert all(torch.equal(g, second.gradients[n]) for n, g in first.gradients.items())
    alone = [
        meta_gradient(maml, TaskBatch(*(t[i : i + 1] for t in batch)), engine).gradients for i in range(TASKS)
    ]
    assert distance(alone[0], alone[1]) > 1e-2
    assert_close(first.gradients, {n: (g + alone[1][n]) / 2 for n, g in alone[0].items()}, 1e-11)


# ---- spectral norms ----


def spectral(norm) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 2)))


SPECTRAL = {"parametrisation": parametrizations.spectral_norm, "hook": torch.nn.utils.spectral_norm}


def iterating(module: nn.Module) -> nn.Module:
    """Let PyTorch's spectral norms follow any weight: a thousand iterations a pass."""
    for layer in module.modules():
        for part in (layer, *layer._forward_pre_hooks.values()):
            if hasattr(part, "n_power_iterations"):
                part.n_power_iterations = 1_000
    return module


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_norms_have_the_singular_value_of_the_weight_at_hand(kind):
    module, batch = filled(spectral(SPECTRAL[kind])), vectors(3)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(50.0)  # far from where the vectors were initialised
    reference = iterating(copy.deepcopy(module))
    for vectorise in (True, False):
        options = {"vectorise": vectorise, "example": batch.support_x[0]}
        assert_matches_plain_loop(
            module, batch, reference=reference, orders=("exact",), tolerance=1e-7, **options
        )
        maml = algorithm(module, **options)
        losses = meta_gradient(maml, batch, "unrolled").losses
        outputs = maml.predictions(maml.initial_parameters(), batch, STEPS)["transductive"]
        losses_after = torch.stack([F.mse_loss(o[2], y) for o, y in zip(outputs, batch.query_y, strict=True)])
        torch.testing.assert_close(losses_after, losses)  # in evaluation as in training


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("kind", SPECTRAL)
def test_the_effective_weight_has_norm_1_whatever_the_weight_and_the_mode(kind, shape):
    x = torch.eye(shape[1])
    call = FunctionalLearner(SPECTRAL[kind](nn.Linear(shape[1], shape[0], bias=False)), example=x)
    for factor in (1.0, 1e-3, 1e3):
        weights = {name: factor * torch.randn_like(w) for name, w in call.parameters.items()}
        with in_evaluation_mode(call.module):
            in_evaluation = call(weights, x)
        assert torch.equal(call(weights, x), in_evaluation)
        assert abs(torch.linalg.matrix_norm(in_evaluation, 2).item() - 1) < 1e-4


class OwnSpectralNorm(nn.Linear):
    """Take one power iteration in each training pass, as in code for GANs."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("u", torch.ones(sizes[1]))

    def forward(self, x):
        with torch.no_grad():
            v = F.normalize(self.weight.mT @ self.u, dim=0)
            if self.training:
                self.u = F.normalize(self.weight @ v, dim=0)
        return F.linear(x, self.weight / (self.u @ self.weight @ v), self.bias)


@pytest.mark.parametrize(
    ("kind", "followers"),
    [
        (OwnSpectralNorm, ["0.u"]),
        (lambda *_: SuperNorm(3), []),
        (lambda *sizes: parametrizations.spectral_norm(nn.Linear(*sizes)), []),
    ],
)
def test_buffers_that_follow_the_weights_alone_are_found(kind, followers):
    module, x = nn.Sequential(kind(3, 4), nn.Tanh()), torch.randn(5, 3)
    assert find_followers(FunctionalLearner(module, example=x), x, KEYS[0]) == followers

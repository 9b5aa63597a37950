"""Small algorithms and tasks for tests of the mathematics."""

from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional as F

from common.batch import TaskBatch
from common.choices import Choices
from learner import build_learner
from learners.heads import add_context
from maml import MAML, MetaGradient
from training.meta_gradients import make_meta_gradient

WAYS, SHOTS, TASKS, STEPS = 2, 2, 3, 3
WAYS_TO_COMPUTE = [
    {"engine": engine, "convolution": convolution}
    for engine in ("unrolled", "adjoint")
    for convolution in ("grouped", "im2col")
]


class Algorithm(MAML):
    """A `MAML` whose options are given by name, and whose meta-gradient is computed by an engine."""

    def __init__(self, learner: nn.Module, loss, *, engine: str = "unrolled", **options):
        names = {choice.name for choice in fields(Choices)}
        choices = {n: v for n, v in options.items() if n in names}
        super().__init__(
            learner, loss, Choices(**choices), **{n: v for n, v in options.items() if n not in names}
        )
        self.engine = engine

    def meta_gradient(self, parameters, batch, *, way=None, **others) -> MetaGradient:
        if way is None:
            return make_meta_gradient(self, engine=self.engine)(parameters, batch, **others)
        return super().meta_gradient(parameters, batch, way=way, **others)

    def outputs(self, weights, x):
        """Return the learner's outputs on one task's inputs."""
        return self.call(weights, x)


def make_tasks(learner: str, *, tasks: int = TASKS) -> TaskBatch:
    shots = 1 if learner == "convnet" else SHOTS  # it costs twenty times as much as `conv`
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if learner == "mlp":
        return TaskBatch(*(4 * random(tasks, 5, 1) - 2 for _ in range(4)))
    labels = torch.arange(WAYS).repeat_interleave(shots).expand(tasks, -1)
    images = [random(tasks, WAYS * shots, 1, 28, 28) for _ in range(2)]
    return TaskBatch(images[0], labels, images[1], labels)


def make_maml(learner: str, **options) -> Algorithm:
    """A built-in learner in float64."""
    outputs = 1 if learner == "mlp" else WAYS
    inputs = (1,) if learner == "mlp" else (1, 28, 28)
    network = build_learner(learner, outputs, inputs=inputs, init="torch", seed=1).double()
    loss = F.mse_loss if learner == "mlp" else F.cross_entropy
    return Algorithm(network, loss, **{"inner_lr": 0.1} | options)


def smooth_network(inputs: int = 1) -> nn.Module:
    """A network without kinks: finite differences agree to many digits."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
    ).double()


def smooth_maml(**options) -> Algorithm:
    network = smooth_network()
    if options.get("fast_weights") == "context":
        network = add_context(network, 4, seed=3).double()
    return Algorithm(network, F.mse_loss, **{"inner_lr": 0.1, "steps": STEPS} | options)


def vary(parameters: dict) -> dict:
    """Make steps, layers and elements differ, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: w * (1 + 0.3 * torch.rand(w.shape, generator=generator, dtype=w.dtype))
        for name, w in parameters.items()
    }

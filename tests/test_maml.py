"""The mathematics: meta-gradients against finite differences and against a plain loop over tasks."""

import pytest
import torch
from algorithms import TASKS, Algorithm, loop_over_tasks, make_maml, make_tasks
from plain_loop import ENGINES, ORDERS, assert_close
from torch import nn
from torch.nn import functional as F

from common.batch import TaskBatch
from common.task import Task
from learner import FACTORIES, build_learner

FAST = ("mlp", "conv", "fc")
SLOW = pytest.mark.slow
EVERY_LEARNER = [pytest.param(name, marks=[SLOW] * (name not in FAST)) for name in FACTORIES]
CASES = [  # learner, inner steps and batch norm
    *((name, steps, "transductive") for name in FAST for steps in (1, 5)),
    *(pytest.param(name, 5, "transductive", marks=SLOW) for name in FACTORIES if name not in FAST),
    *((name, 2, "inductive") for name in ("conv", "fc")),
]


@pytest.mark.parametrize("meta_gradient", ORDERS)
@pytest.mark.parametrize(("learner", "steps", "batch_norm"), CASES)
def test_meta_gradient_matches_a_plain_loop_over_tasks(learner, steps, batch_norm, meta_gradient):
    is_large = learner == "convnet"
    options = {"steps": steps, "meta_gradient": meta_gradient, "batch_norm": batch_norm}
    options["adapt_norm"] = is_large
    batch = make_tasks(learner, tasks=2 if is_large else TASKS)
    maml = make_maml(learner, **options)
    parameters = maml.initial_parameters()
    expected, loss = loop_over_tasks(maml, parameters, batch)
    convolves = any(name.endswith("weight") and w.dim() > 2 for name, w in parameters.items())
    convolutions = ("grouped", "im2col") if convolves else ("grouped",)
    ways = [{"engine": engine, "convolution": c} for engine in ENGINES for c in convolutions]
    for way in ways[:1] if is_large else ways:
        result = make_maml(learner, **options, **way).meta_gradient(parameters, batch)
        assert_close(result.gradients, expected)
        assert torch.allclose(result.losses.mean(), loss, rtol=1e-12)


@pytest.mark.parametrize("meta_gradient", ORDERS)
@pytest.mark.parametrize("learner", EVERY_LEARNER)
def test_meta_gradient_agrees_with_finite_differences(learner, meta_gradient, steps=5):
    """First order by its own definition: the slope of the query loss when the *adapted* weights move."""
    first_order = meta_gradient == "first-order"
    batch = make_tasks(learner, tasks=1)
    maml = make_maml(learner, steps=steps, meta_gradient=meta_gradient, adapt_norm=False, inner_lr=0.01)
    parameters = maml.initial_parameters()
    gradients = maml.meta_gradient(parameters, batch).gradients
    generator = torch.Generator().manual_seed(3)
    noise = {"generator": generator, "dtype": torch.float64}
    direction = {name: torch.randn(w.shape, **noise) for name, w in parameters.items()}
    task = TaskBatch(*(tensor[0] for tensor in batch))
    adapted = maml.adapt(parameters, task.support_x, task.support_y, steps).weights

    def query_loss(epsilon: float) -> float:
        start = adapted if first_order else parameters
        moved = {name: w + epsilon * direction[name] for name, w in start.items()}
        if first_order:
            return maml.loss(maml.call(moved, task.query_x), task.query_y).item()
        return maml.outer_loss(moved, Task(*task))[0].item()

    epsilon = 1e-9  # so small that no ReLU and no maximum changes sides on the way
    measured = (query_loss(epsilon) - query_loss(-epsilon)) / (2 * epsilon)
    slope = sum((gradients[name] * direction[name]).sum().item() for name in parameters)
    assert slope == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_tasks_at_once_does_not_change_the_result(engine):
    batch = make_tasks("conv")  # three tasks: chunks of two divide unevenly
    expected, result = (
        maml.meta_gradient(maml.initial_parameters(), batch)
        for maml in (make_maml("conv", steps=2, engine=engine, tasks_at_once=n) for n in (None, 2))
    )
    assert_close(result.gradients, expected.gradients, 1e-12)
    assert torch.allclose(result.losses, expected.losses) and torch.allclose(result.outputs, expected.outputs)


def test_the_papers_initial_weights_and_networks():
    heads = {
        name: build_learner(name, 5, init="paper").requires_grad_(False)[-1]
        for name in ("conv", "conv-pool", "conv4", "fc", "mlp")
    }
    for name in ("conv", "conv-pool"):
        assert heads[name].weight.std().item() == pytest.approx(1, abs=0.15)
    xavier = (6 / (32 * 5 * 5 + 5)) ** 0.5  # uniform, of mini-ImageNet's
    assert heads["conv4"].weight.abs().max().item() == pytest.approx(xavier, rel=0.02)
    assert all(0.015 < heads[name].weight.abs().max() <= 0.02 for name in ("fc", "mlp"))
    assert not any(head.bias.any() for head in heads.values())
    flat = build_learner("conv-flat", 5)
    assert flat[-1].in_features == 256 and flat[1].weight.requires_grad
    assert flat(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    assert not build_learner("conv", 5)[1].weight.requires_grad
    assert build_learner("conv", 5, arguments={"scale": True})[1].weight.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_computes_the_learner_alone_in_half_precision(engine):
    batch = TaskBatch(*(tensor.float() for tensor in make_tasks("mlp")))
    network = build_learner("mlp", 1, init="torch", seed=1)
    learner_types, loss_types = set(), set()

    class Noted(nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            learner_types.add(output.dtype)
            return output

    network[2].__class__ = Noted

    def loss(outputs, targets):
        loss_types.add(outputs.dtype)
        return F.mse_loss(outputs, targets)

    def gradient(dtype: torch.dtype | None) -> torch.Tensor:
        learner_types.clear()
        maml = Algorithm(network, loss, inner_lr=0.05, compute_dtype=dtype, engine=engine)
        result = maml.meta_gradient(maml.initial_parameters(), batch)
        return torch.cat([g.flatten() for g in result.gradients.values()])

    exact, narrow = gradient(None), gradient(torch.bfloat16)
    assert learner_types == {torch.bfloat16}
    assert loss_types == {narrow.dtype} == {torch.float32}
    assert 1e-4 < (narrow - exact).norm() / exact.norm() < 0.15

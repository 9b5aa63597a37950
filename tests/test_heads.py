"""Heads that are computed for each task instead of learned: zero, and prototypes from the support set."""

from contextlib import nullcontext

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
    filled,
    inner_loop,
    key_of,
    learned,
    meta_gradient,
    normal,
    plain_predictions,
    run,
    tasks_of,
)
from torch import nn
from torch.nn import functional as F

from common.batch import TaskBatch
from common.task import Task
from learners.batch_norm import BatchNorm
from learners.losses import cross_entropy
from maml import RATE

HEAD = ["head.weight", "head.bias"]


class Classifier(nn.Module):
    """A body and a linear head; the head is not the last of the children."""

    def __init__(self, ways: int, *between: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, ways)
        self.body = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh())

    def forward(self, x):
        return self.head(self.body(x))


def classifier(ways: int = 3, *between: nn.Module) -> nn.Module:
    module = filled(Classifier(ways, *between))
    module.body = filled(module.body)  # the same whatever the ways
    return module


def labelled(ways: int = 3) -> TaskBatch:
    """Return tasks with classes in any order and of different sizes."""
    size = EXAMPLES + ways
    labels = [torch.stack([torch.arange(size).roll(i + j) % ways for i in range(TASKS)]) for j in (0, 1)]
    x = [normal(TASKS, size, 3, seed=seed) + 0.5 * y[..., None] for seed, y in enumerate(labels)]
    return TaskBatch(x[0], labels[0], x[1], labels[1])


def zero_head(module, leaves, task, key):
    return {n: torch.zeros_like(module.get_parameter(n)).requires_grad_() for n in HEAD}


def prototype_head(module, leaves, task, key):
    weights = {n.removeprefix("body."): w for n, w in leaves.items() if n.startswith("body.")}
    embeddings = run(module.body, weights, task.support_x, key_of(key, "prototypes"))
    ways = range(module.head.out_features)
    means = torch.stack([embeddings[task.support_y == way].mean(0) for way in ways])
    return {"head.weight": 2 * means, "head.bias": -means.pow(2).sum(1)}


HEADS = {"zero": zero_head, "prototype": prototype_head}


def build(module: nn.Module, init: str, **options):
    return algorithm(module, F.cross_entropy, head="head", head_init=init, **options)


@pytest.mark.parametrize("fast_weights", ["all", "head"])
@pytest.mark.parametrize("between", ["nothing", "dropout", "batch norm"])
@pytest.mark.parametrize("init", HEADS)
def test_the_meta_gradient_through_a_computed_head_matches_a_plain_loop(init, between, fast_weights):
    layer = {"nothing": nn.Identity(), "dropout": nn.Dropout(0.4), "batch norm": nn.BatchNorm1d(4)}[between]
    loop = {"adapted": HEAD if fast_weights == "head" else None, "compute_head": HEADS[init]}
    loop |= {"keys": KEYS if between == "dropout" else None, "loss": F.cross_entropy}
    choices = {"head": "head", "head_init": init, "fast_weights": fast_weights}
    assert_matches_plain_loop(classifier(3, layer), labelled(), **loop, **choices)


def test_prototypes_under_running_statistics_do_not_depend_on_the_other_classes():
    module = classifier(3, BatchNorm(4).double())
    maml = build(module, "prototype", batch_norm="per-step")
    parameters, task = maml.initial_parameters(), tasks_of(labelled())[0]
    others = torch.where(task.support_y[:, None] == 0, task.support_x, task.support_x + 1)
    running = {name: s + torch.tensor([[0.3], [2.0]]) for name, s in maml.initial_statistics().items()}
    for statistics in (running, None):
        with maml.running() if statistics else nullcontext():
            first, second = (
                maml.start(parameters, Task(x, task.support_y), statistics).fast["head.weight"][0]
                for x in (task.support_x, others)
            )
        assert torch.equal(first, second) == (statistics is not None)
    with pytest.raises(ValueError, match="running statistics"):
        maml.predictions(parameters, labelled(), 1, ("per-step",))


@pytest.mark.parametrize("init", HEADS)
def test_with_a_computed_head_the_same_parameters_serve_any_number_of_ways(init):
    parameters = build(classifier(3), init).initial_parameters()
    for ways in (2, 5):
        module, batch = classifier(ways), labelled(ways)
        maml = build(module, init)
        shapes = {name: w.shape for name, w in maml.initial_parameters().items()}
        assert shapes == {name: w.shape for name, w in parameters.items()}
        outputs = maml.predictions(parameters, batch, STEPS)["transductive"]
        assert outputs.shape == (TASKS, STEPS + 1, EXAMPLES + ways, ways)
        expected = plain_predictions(module, F.cross_entropy, batch, compute_head=HEADS[init])
        torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("init", HEADS)
def test_reptile_from_a_computed_head_moves_the_body_to_where_the_inner_loop_ends(init):
    module, batch = classifier(), labelled()
    result = meta_gradient(build(module, init, meta_gradient="reptile"), batch, "unrolled")
    moved = {n: torch.zeros_like(w) for n, w in learned(module).items() if n not in HEAD}
    for task in tasks_of(batch):
        pool = Task(torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y]))
        start = learned(module) | HEADS[init](module, learned(module), pool, None)
        *_, fast = inner_loop(module, F.cross_entropy, start, pool)
        for name in moved:
            moved[name] += (start[name] - fast[name]).detach() / TASKS
    assert_close(result.gradients, moved)


@pytest.mark.parametrize("init", HEADS)
def test_a_learner_that_is_all_head_learns_its_rates_alone(init):
    maml = algorithm(filled(nn.Linear(3, 3)), F.cross_entropy, head_init=init, inner_rates="layer-step")
    assert maml.initial_parameters().keys() == {RATE + "weight", RATE + "bias"}
    unrolled, adjoint = (meta_gradient(maml, labelled(), engine).gradients for engine in ENGINES)
    assert_close(unrolled, adjoint)


def test_prototypes_are_computed_from_the_main_one_of_several_outputs():
    class Two(nn.Sequential):
        def forward(self, x):
            logits = super().forward(x)
            return {"norm": logits.square().sum(1), "logits": logits}

    module = filled(Two(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    plain = nn.Sequential(*module)
    results = []
    for learner in (module, plain):
        maml = algorithm(learner, cross_entropy, head_init="prototype")
        results.append(meta_gradient(maml, labelled(), "unrolled").gradients)
    assert_close(*results)

"""Heads that are computed for each task instead of learned: zero, prototypes, and a ridge regression."""

from contextlib import nullcontext
from math import log

import pytest
import torch
from plain_loop import (
    ENGINES,
    EXAMPLES,
    KEYS,
    ORDERS,
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
    vectors,
)
from torch import nn
from torch.nn import functional as F

from common.batch import TaskBatch
from common.task import Extras, Task
from learners.computed_heads import LOG_LAMBDA, SCALE, initial_ridge, prototypes, ridge
from learners.losses import cross_entropy
from learners.reading import Reading
from maml import RATE

HEAD = ["head.weight", "head.bias"]
LAMBDA, FACTOR = 0.3, 1.7


class Classifier(nn.Module):
    """A body and a linear head; the head is not the last of the children."""

    def __init__(self, ways: int, *between: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(width, ways)
        self.body = nn.Sequential(nn.Linear(3, width), *between, nn.Tanh())

    def forward(self, x):
        return self.head(self.body(x))


def classifier(ways: int = 3, *between: nn.Module, width: int = 4) -> nn.Module:
    module = filled(Classifier(ways, *between, width=width))
    module.body = filled(module.body)  # the same whatever the ways
    return module


def labelled(ways: int = 3) -> TaskBatch:
    """Return tasks with classes in any order and of different sizes."""
    size = EXAMPLES + ways
    labels = [torch.stack([torch.arange(size).roll(i + j) % ways for i in range(TASKS)]) for j in (0, 1)]
    x = [normal(TASKS, size, 3, seed=seed) + 0.5 * y[..., None] for seed, y in enumerate(labels)]
    return TaskBatch(x[0], labels[0], x[1], labels[1])


def embed(module, leaves, task, key):
    weights = {n.removeprefix("body."): w for n, w in leaves.items() if n.startswith("body.")}
    return run(module.body, weights, task.support_x, key_of(key, "prototypes"))


def zero_head(module, leaves, task, key):
    return {n: torch.zeros_like(module.get_parameter(n)).requires_grad_() for n in HEAD}


def prototype_head(module, leaves, task, key):
    embeddings, ways = embed(module, leaves, task, key), range(module.head.out_features)
    means = torch.stack([embeddings[task.support_y == way].mean(0) for way in ways])
    return {"head.weight": 2 * means, "head.bias": -means.pow(2).sum(1)}


def ridge_head(module, leaves, task, key):
    """Minimise the squared error and the penalty by the normal equations of all features."""
    embeddings, targets = embed(module, leaves, task, key), task.support_y
    x = F.pad(embeddings, (0, 1), value=1.0)
    y = targets if targets.is_floating_point() else 2 * F.one_hot(targets, module.head.out_features) - 1.0
    penalty = len(x) * leaves[LOG_LAMBDA].exp() * torch.eye(x.shape[1]).double()
    solution = leaves[SCALE] * torch.linalg.inv(x.T @ x + penalty) @ x.T @ y.double()
    return {"head.weight": solution[:-1].T, "head.bias": solution[-1]}


HEADS = {"zero": zero_head, "prototype": prototype_head, "ridge": ridge_head}
NUMBERS = initial_ridge(LAMBDA, FACTOR, torch.zeros((), dtype=torch.float64))


def of(init: str) -> dict:
    """Return the arguments of a plain loop with a computed head."""
    return {"compute_head": HEADS[init], "more": NUMBERS if init == "ridge" else None}


def choices(init: str) -> dict:
    return {"head": "head", "head_init": init, "ridge_lambda": LAMBDA, "ridge_scale": FACTOR}


def build(module: nn.Module, init: str, **options):
    return algorithm(module, F.cross_entropy, **choices(init) | options)


def assert_meta_gradient(init: str, module: nn.Module, batch: TaskBatch, *, steps: int, **options) -> None:
    options |= of(init) | choices(init) | {"orders": ORDERS if steps else ["exact"]}
    assert_matches_plain_loop(module, batch, steps=steps, **options)


@pytest.mark.parametrize("fast_weights", ["all", "head"])
@pytest.mark.parametrize("between", ["nothing", "dropout", "batch norm"])
@pytest.mark.parametrize(
    ("init", "steps"), [("prototype", 0), ("ridge", 0), *((init, STEPS) for init in HEADS)]
)
def test_the_meta_gradient_through_a_computed_head_matches_a_plain_loop(init, steps, between, fast_weights):
    layer = {"nothing": nn.Identity(), "dropout": nn.Dropout(0.4), "batch norm": nn.BatchNorm1d(4)}[between]
    loop = {"adapted": HEAD if fast_weights == "head" else None, "loss": F.cross_entropy}
    loop |= {"keys": KEYS if between == "dropout" else None, "fast_weights": fast_weights}
    assert_meta_gradient(init, classifier(3, layer), labelled(), steps=steps, **loop)


@pytest.mark.parametrize("steps", [0, STEPS])
@pytest.mark.parametrize("width", [3, 4, 5, 9])  # with five examples: fewer, as many and more features
def test_a_ridge_head_of_numbers_matches_the_normal_equations_whatever_the_sizes(width, steps):
    assert_meta_gradient("ridge", classifier(2, width=width), vectors(3), steps=steps)


def test_a_prototypical_network_is_minus_the_squared_distance_to_the_class_means():
    x, labels, query = normal(6, 4, seed=1), torch.arange(6) % 3, normal(5, 4, seed=2)
    weight, bias = prototypes(x, labels, 3, Extras())
    means = torch.stack([x[labels == way].mean(0) for way in range(3)])
    logits = -(torch.cdist(query, means) ** 2)
    torch.testing.assert_close((query @ weight.T + bias).softmax(1), logits.softmax(1))


def test_the_probabilities_of_a_ridge_head_are_those_of_its_authors():
    """They regress 1 and 0, both sides of the system divided by the root of the number of examples."""
    x, labels, query = normal(6, 9, seed=1), torch.arange(6) % 3, normal(4, 9, seed=2)
    weight, bias = ridge(x, labels, 3, NUMBERS, Extras())
    rows, y = F.pad(x, (0, 1), value=1.0) / 6**0.5, F.one_hot(labels, 3).double() / 6**0.5
    theirs = rows.T @ torch.linalg.inv(rows @ rows.T + LAMBDA * torch.eye(6).double()) @ y
    theirs = 2 * FACTOR * F.pad(query, (0, 1), value=1.0) @ theirs
    torch.testing.assert_close((query @ weight.T + bias).softmax(1), theirs.softmax(1))


def test_a_label_that_is_no_class_is_left_out_of_a_ridge_regression():
    x, labels = normal(6, 4), torch.tensor([0, 1, -100, 2, 1, -100])
    known = labels >= 0
    expected = ridge(x[known], labels[known], 3, NUMBERS, Extras())
    torch.testing.assert_close(ridge(x, labels, 3, NUMBERS, Extras()), expected)


def test_prototypes_under_running_statistics_do_not_depend_on_the_other_classes():
    module = classifier(3, nn.BatchNorm1d(4).double())
    maml = build(module, "prototype", batch_norm="per-step")
    parameters, task = maml.initial_parameters(), tasks_of(labelled())[0]
    others = torch.where(task.support_y[:, None] == 0, task.support_x, task.support_x + 1)
    running = {name: s + torch.tensor([[0.3], [2.0]]) for name, s in maml.initial_statistics().items()}
    for statistics in (running, None):
        with maml.use_running_statistics() if statistics else nullcontext():
            first, second = (
                maml.start(parameters, Task(x, task.support_y), statistics).fast["head.weight"][0]
                for x in (task.support_x, others)
            )
        assert torch.equal(first, second) == (statistics is not None)
    with pytest.raises(ValueError, match="running statistics"):
        maml.predictions(parameters, labelled(), 1, ("per-step",))


@pytest.mark.parametrize("normalisation", ["transductive", "inductive"])
@pytest.mark.parametrize("init", HEADS)
def test_with_a_computed_head_the_same_parameters_serve_any_number_of_ways(init, normalisation):
    norm = nn.BatchNorm1d(4)
    parameters = build(classifier(3, norm), init).initial_parameters()
    for ways in (2, 5):
        module, batch = classifier(ways, norm), labelled(ways)
        maml = build(module, init)
        shapes = {name: w.shape for name, w in maml.initial_parameters().items()}
        assert shapes == {name: w.shape for name, w in parameters.items()}
        outputs = maml.predictions(parameters, batch, STEPS, (normalisation,))[normalisation]
        assert outputs.shape == (TASKS, STEPS + 1, EXAMPLES + ways, ways)
        how = of(init) | {"normalisation": normalisation}
        torch.testing.assert_close(outputs, plain_predictions(module, F.cross_entropy, batch, **how))


@pytest.mark.parametrize("init", ["zero", "prototype"])
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
    maml = build(filled(nn.Linear(3, 3)), init, head=None, inner_rates="layer-step")
    expected = {RATE + "weight", RATE + "bias"} | (NUMBERS.keys() if init == "ridge" else set())
    assert maml.initial_parameters().keys() == expected
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


def test_heads_that_cannot_be_computed_say_so():
    with pytest.raises(ValueError, match="no outputs that are read as ordinal"):
        build(classifier(), "ridge", reading=Reading("ordinal", 4))
    maml = build(classifier(), "ridge")
    parameters, (x, y, *_) = maml.initial_parameters(), labelled()
    with pytest.raises(ValueError, match=r"a ridge head of 3 outputs has targets \(8, 2\)"):
        maml.adapt(parameters, x[0], normal(8, 2), 0)
    with pytest.raises(ValueError, match=r"inputs \[examples, features\], not \(8, 2, 4\)"):
        maml.adapt(parameters, x[0][:, None].expand(-1, 2, -1), y[0], 0)
    assert NUMBERS[LOG_LAMBDA].item() == pytest.approx(log(LAMBDA))

"""Tasks of different sizes: padding changes nothing, whatever it holds, for every algorithm."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from algorithms import vary
from plain_loop import ENGINES, ORDERS, assert_close, filled, integers, normal
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F

from commands.presets import PRESETS
from commands.resolve import resolve
from common.batch import TaskBatch, tree_map
from common.choices import NORMALISATIONS, Choices
from common.random import Stream, minibatch_order, task_stream
from common.task import Extras, Task
from evaluation.meta_test import _measure, loss_per_step
from learners.heads import add_context
from learners.losses import LOSSES, TaskLoss
from learners.metrics import build_metric
from learners.reading import Reading, hide_classes
from maml import MAML
from training.meta_gradients import make_meta_gradient

SIZES = [(3, 2, 4), (2, 1, 1), (4, 3, 2)]  # classes, and support and query examples of each, by task
WAYS = 4
KEYS = torch.tensor([[11, 12], [13, 14], [15, 16]])


def image_task(number: int, ways: int, shots: int, queries: int) -> TaskBatch:
    """Return a task `[examples, ...]` of its own size."""
    x = normal(ways, shots + queries, 2, 4, 4, seed=number) + torch.arange(ways).view(-1, 1, 1, 1, 1)
    parts = []
    for images in x.split([shots, queries], 1):
        parts += [images.flatten(0, 1), torch.arange(ways).repeat_interleave(images.shape[1])]
    return TaskBatch(*parts)


def image_tasks() -> list[TaskBatch]:
    return [image_task(number, *size) for number, size in enumerate(SIZES)]


def curve_tasks() -> list[TaskBatch]:
    return [
        TaskBatch(*(normal(n, 1, seed=10 * number + i) for i, n in enumerate((k, k, q, q))))
        for number, (_, k, q) in enumerate(SIZES)
    ]


def padded(tasks: list[TaskBatch], *, first: bool = False, ways: bool = False) -> TaskBatch:
    """Return the tasks as one batch; padding is noise, in any places, or behind examples that are `first`."""
    parts, generator = {}, torch.Generator().manual_seed(0)
    for name in ("support", "query"):
        sizes = [len(getattr(task, f"{name}_y")) for task in tasks]
        places = [torch.randperm(max(sizes) + 1, generator=generator)[:size].sort().values for size in sizes]
        places = [torch.arange(size) for size in sizes] if first else places
        mask = parts[f"{name}_mask"] = torch.zeros(len(tasks), max(sizes) + 1, dtype=torch.bool)
        for part in (f"{name}_x", f"{name}_y"):
            like = getattr(tasks[0], part)
            noise = 3 * torch.rand(*mask.shape, *like.shape[1:], generator=generator)
            parts[part] = noise.to(like.dtype)
            for row, place, task in zip(parts[part], places, tasks, strict=True):
                row[place] = getattr(task, part)
        for row, place in zip(mask, places, strict=True):
            row[place] = True
    numbers = torch.tensor([int(task.support_y.max()) + 1 for task in tasks]) if ways else None
    return TaskBatch(**parts, ways=numbers)


def alone(task: TaskBatch) -> TaskBatch:
    return tree_map(lambda t: t[None], task)


def image_network(*between: nn.Module, outputs: int = WAYS) -> nn.Module:
    # no bias before batch norm: its gradient is rounding, which Adam makes large
    first = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()
    first = *first, nn.Linear(12, 5, bias=False)
    return filled(nn.Sequential(*first, nn.BatchNorm1d(5), *between, nn.Linear(5, outputs)))


def choices_of(algorithm: str, **changes) -> Choices:
    """Return a preset's choices, with two small steps."""
    small = {"steps": 2, "inner_lr": 0.05, "inner_batch": None, "context_size": 3, "cg_damping": 0.5}
    return replace(resolve({"algorithm": algorithm, "dataset": "omniglot"}).choices, **small | changes)


def assert_same(maml: MAML, batch: TaskBatch, tasks: list[TaskBatch], mamls: list[MAML], **inputs) -> None:
    """Compare a padded batch with its tasks alone; `mamls` are the algorithm of each."""
    parameters = vary(maml.initial_parameters())
    for engine in ENGINES if maml.choices.meta_gradient in ORDERS else ENGINES[:1]:
        result = make_meta_gradient(maml, engine=engine)(parameters, batch, **inputs)
        singles = [
            make_meta_gradient(one, engine=engine)(parameters, alone(task), **inputs)
            for one, task in zip(mamls, tasks, strict=True)
        ]
        for part in ("gradients", "statistics"):
            ours, theirs = getattr(result, part), [getattr(one, part) for one in singles]
            expected = {name: torch.stack([one[name] for one in theirs]).mean(0) for name in ours}
            assert not expected or assert_close(ours, expected, 1e-10) is None
        torch.testing.assert_close(result.losses, torch.cat([one.losses for one in singles]), **EXACT)
        for number, one in enumerate(singles):
            ways = None if batch.ways is None else int(batch.ways[number])
            ours = result.outputs[number][batch.query_mask[number]][:, :ways]
            torch.testing.assert_close(ours, one.outputs[0][:, :ways], **EXACT)


EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        *((algorithm, {}) for algorithm in PRESETS),
        ("maml", {"batch_norm": "inductive"}),
        ("maml", {"head_init": "zero"}),
        *(("maml", {"head_init": init, "steps": n}) for init in ("prototype", "ridge") for n in (0, 2)),
    ],
)
def test_padding_changes_nothing_for_any_algorithm(algorithm, changes):
    tasks, network = image_tasks(), image_network()
    if algorithm == "cavia":
        network = add_context(network, 3).double()
    inputs = {"step_weights": torch.tensor([0.3, 0.7]).double()} if algorithm == "maml++" else {}
    choices = choices_of(algorithm, **changes)
    maml = MAML(network, LOSSES["cross-entropy"], choices, tasks_at_once=2)
    mamls = [MAML(network, of_first_classes(task), choices) for task in tasks]
    mamls = of_own_classes(choices) if choices.starts_apart else mamls
    assert_same(maml, padded(tasks, ways=True), tasks, mamls, **inputs)


def of_first_classes(task: TaskBatch):
    """Return the cross-entropy over the classes that a task has."""
    ways = int(task.support_y.max()) + 1
    return lambda outputs, targets: F.cross_entropy(outputs[:, :ways], targets)


def of_own_classes(choices: Choices) -> list[MAML]:
    """Return the algorithm with a head of each task's own classes, which it computes."""
    return [MAML(image_network(outputs=ways), F.cross_entropy, choices) for ways, *_ in SIZES]


@pytest.mark.parametrize("width", [2, 9])
def test_padding_changes_nothing_for_a_ridge_regression_of_numbers(width):
    tasks = curve_tasks()
    network = filled(nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)))
    choices = Choices(inner_lr=0.05, steps=0, head_init="ridge")
    maml = MAML(network, LOSSES["mse"], choices)
    assert_same(maml, padded(tasks), tasks, [maml] * len(tasks))


def test_predictions_losses_accuracies_and_metrics_leave_padding_out():
    tasks, choices = image_tasks(), choices_of("maml++")
    network = image_network()
    batch, reading = padded(tasks, ways=True), Reading("classes", WAYS, metric=build_metric("f1"))
    maml = MAML(network, LOSSES["cross-entropy"], choices, reading=reading)
    parameters = vary(maml.initial_parameters())
    statistics = {n: s + 0.3 for n, s in maml.initial_statistics().items()}
    outputs = maml.predictions(parameters, batch, 3, NORMALISATIONS, statistics=statistics)
    measured = {name: _measure(maml, reading, outputs[name], batch) for name in NORMALISATIONS}
    for number, task in enumerate(tasks):
        own = replace(reading, classes=SIZES[number][0])
        one = MAML(network, of_first_classes(task), choices, reading=own)
        theirs = one.predictions(parameters, alone(task), 3, NORMALISATIONS, statistics=statistics)
        for name in NORMALISATIONS:
            expected = theirs[name][..., : own.classes]
            ours = outputs[name][number][:, batch.query_mask[number]][..., : own.classes]
            torch.testing.assert_close(ours, expected[0], **EXACT)
            for measure, value in _measure(one, own, expected, alone(task)).items():
                torch.testing.assert_close(measured[name][measure][number], value[0], **EXACT)


def test_calibration_leaves_padding_out():
    mask, outputs, y = torch.tensor([[True, False, True, True]]), normal(1, 4, 6), normal(1, 4, 3, seed=1)
    reading = Reading("normal")
    ours = reading.measure_further(outputs, y, mask)
    theirs = reading.measure_further(outputs[mask], y[mask], before=0)
    torch.testing.assert_close({n: v[0] for n, v in ours.items()}, theirs, **EXACT)


# ---- losses --------------------------------------------------------------------------------------


def own_mean(outputs, targets):
    return (outputs - targets).abs().square().sum(1).sqrt().mean()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (LOSSES["mse"], (6, 2), None),
        (LOSSES["huber"], (6, 2, 3), None),
        (partial(LOSSES["huber"], delta=0.1), (6, 1), None),
        (LOSSES["gaussian-nll"], (6, 4), normal(6, 2)),
        (LOSSES["bce"], (6, 3), None),
        (LOSSES["bce"], (6, 3), integers(3, 6)),
        (LOSSES["cross-entropy"], (6, 3), integers(3, 6)),
        (partial(LOSSES["cross-entropy"], label_smoothing=0.2), (6, 3), integers(3, 6)),
        (partial(LOSSES["cross-entropy"], ignore_index=1), (6, 3, 2, 2), integers(3, 6, 2, 2)),
        (F.smooth_l1_loss, (6, 2), None),
        (own_mean, (6, 2), None),
    ],
)
def test_a_loss_and_its_derivatives_are_those_of_the_examples_that_count(loss, outputs, targets):
    x = normal(*outputs)
    y = torch.rand(outputs).double() if targets is None else targets
    mask = torch.tensor([True, False, True, True, False, True])
    for masked in (TaskLoss(loss), TaskLoss(loss, unpads=True)):
        for derivative in (lambda f: f, grad, hessian):
            ours = derivative(partial(masked, targets=y, extras=Extras(mask=mask)))(x)
            theirs = derivative(lambda x: loss(x[mask], y[mask]))(x)
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(
    "loss", [LOSSES["cross-entropy"], partial(LOSSES["cross-entropy"], label_smoothing=0.2), LOSSES["bce"]]
)
def test_classes_that_a_task_lacks_take_no_part_in_its_loss(loss):
    x, y, mask = normal(6, 5), integers(3, 6), torch.tensor([True, False, True, True, False, True])
    extras = Extras(mask=mask, ways=torch.tensor(3))
    theirs = grad(lambda x: loss(x[mask, :3], y[mask]))(x)
    for masked in (TaskLoss(loss), TaskLoss(loss, unpads=True)):
        ours = grad(lambda x, masked=masked: masked(hide_classes(x, extras.ways), y, extras))(x)
        torch.testing.assert_close(ours, theirs, **EXACT)


# ---- what padding would change -------------------------------------------------------------------


class Attention(nn.Module):
    """Every example attends to all."""

    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x


def median_loss(outputs, targets):
    """Reduce the whole batch in a way of its own."""
    return ((outputs - targets) ** 2).mean(1).logsumexp(0)


@pytest.mark.parametrize(("mixing", "loss"), [(Attention(), F.mse_loss), (nn.Identity(), median_loss)])
def test_one_after_another_tasks_are_computed_without_their_padding(mixing, loss):
    tasks = curve_tasks()
    network = filled(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), mixing, nn.Linear(4, 1)))
    batch = padded(tasks)
    maml = MAML(network, loss, choices_of("maml"), vectorise=False)
    mamls = [maml.with_options(vectorise=True)] * len(tasks)
    assert_same(maml, batch, tasks, mamls)
    outputs = maml.predictions(maml.initial_parameters(), batch, 2)["transductive"]
    expected = loss_per_step(maml, outputs, batch)
    for number, task in enumerate(tasks):
        theirs = mamls[0].predictions(maml.initial_parameters(), alone(task), 2)["transductive"]
        torch.testing.assert_close(outputs[number][:, batch.query_mask[number]], theirs[0], **EXACT)
        torch.testing.assert_close(expected[number], loss_per_step(mamls[0], theirs, alone(task))[0], **EXACT)
    with pytest.raises(AssertionError):
        assert_same(mamls[0], batch, tasks, mamls)


def test_dropout_draws_the_same_for_examples_that_come_first():
    tasks = curve_tasks()
    network = filled(nn.Sequential(nn.Linear(1, 9), nn.Dropout(), nn.Linear(9, 1)))
    maml = MAML(network, F.mse_loss, choices_of("maml"))
    parameters = maml.initial_parameters()
    result = maml.meta_gradient(parameters, padded(tasks, first=True), keys=KEYS)
    singles = [maml.meta_gradient(parameters, alone(t), keys=KEYS[i : i + 1]) for i, t in enumerate(tasks)]
    torch.testing.assert_close(result.losses, torch.cat([one.losses for one in singles]), **EXACT)


def test_a_batch_with_masks_is_not_taken_for_its_four_parts():
    tasks = curve_tasks()
    assert len([*tasks[0]]) == 4
    with pytest.raises(ValueError, match="name those"):
        [*padded(tasks)]


def stream_of(tasks: range) -> Stream:
    return task_stream("train", 3, 7, tasks, torch.device("cpu"))


def test_minibatches_are_those_of_the_task_without_its_padding():
    sizes = [5, 7, 2, 9]
    mask = torch.arange(9) < torch.tensor(sizes)[:, None]
    order = minibatch_order(stream_of(range(4)), 9, 5, 4, mask)
    for number, size in enumerate(sizes):
        own = minibatch_order(stream_of(range(number, number + 1)), size, 5, 4)
        if own is None:  # all, and padding
            steps = [rows[mask[number, rows]].sort().values.tolist() for rows in order[number]]
            assert steps == [[*range(size)]] * 4
        else:
            assert torch.equal(order[number], own[0])


def test_reptile_learns_from_minibatches_of_the_examples_that_count():
    tasks = curve_tasks()
    network = filled(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    maml, batch = MAML(network, F.mse_loss, choices_of("reptile", inner_optimizer="sgd")), padded(tasks)
    mask = Task.of(batch, Extras()).pooled_mask(axis=1)
    order = minibatch_order(stream_of(range(3)), mask.shape[1], 4, 2, mask)
    result = make_meta_gradient(maml)(maml.initial_parameters(), batch, order=order)
    for number, task in enumerate(tasks):
        places = mask[number].cumsum(0) - 1  # among the task's own
        rows = [places[step[mask[number, step]]] for step in order[number]]
        weights = dict(network.named_parameters())
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        for chosen in rows:
            loss = F.mse_loss(functional_call(network, weights, (x[chosen],)), y[chosen])
            gradients = torch.autograd.grad(loss, [*weights.values()])
            weights = {n: w - 0.05 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
        outputs = functional_call(network, weights, (task.query_x,))
        ours = result.outputs[number][batch.query_mask[number]]
        torch.testing.assert_close(ours, outputs.detach(), **EXACT)

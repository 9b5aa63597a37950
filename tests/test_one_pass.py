"""What is not adapted at the beginning of a network sees each example once, and the numbers stay the same."""

from dataclasses import replace

import pytest
import torch
from plain_loop import EXAMPLES, TASKS, assert_close, filled, integers, normal
from torch import nn
from torch.nn import functional as F

from commands.parser import parse
from commands.resolve import resolve
from common.batch import TaskBatch
from common.choices import HEAD_INITS, Choices
from learners.heads import ContextLayer
from maml import MAML
from training.meta_gradients import make_meta_gradient
from training.one_pass import OnePass

STEPS, WAYS = 3, 3
passes: list[int] = []


class Counting(nn.Module):
    """Count the passes of a network of two parts, whose head is not the last of its children."""

    def __init__(self, *between: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.after = after or nn.Identity()
        self.top = nn.Sequential(nn.Linear(4, WAYS))
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), *between, nn.Tanh())

    def forward(self, x):
        passes.append(1)
        return self.after(self.top(self.body(x)))


def batch(*, padded: bool) -> TaskBatch:
    x, more = (normal(TASKS, EXAMPLES, 2, seed=seed) for seed in (1, 2))
    ways = torch.tensor([2, WAYS] if padded else [WAYS, WAYS])
    y = torch.arange(EXAMPLES) % ways[:, None]
    tasks = TaskBatch(x, y, more, y)
    if not padded:
        return tasks
    mask = torch.ones(TASKS, EXAMPLES).bool()
    mask[0, 3:] = False
    return replace(tasks, support_mask=mask, query_mask=~mask | (y == 1), ways=ways)


def build(kind: type[MAML], module: nn.Module | None = None, **choices) -> MAML:
    fixed = {"fast_weights": "head", "head": "top", "inner_lr": 0.3, "steps": STEPS}
    module = filled(Counting() if module is None else module)
    return kind(module, F.cross_entropy, Choices(**fixed | choices), example=batch(padded=False).support_x[0])


ROWS = [  # choices beside the head's start
    {"steps": 0},
    {},
    {"meta_gradient": "first-order"},
    {"objective": "multi-step", "inner_rates": "layer-step", "batch_norm": "inductive"},
]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("init", HEAD_INITS)
@pytest.mark.parametrize("padded", [False, True])
def test_meta_gradients_and_predictions_are_those_of_many_passes(init, row, padded):
    if "steps" in row and init in ("learned", "zero"):  # then nothing is adapted
        row = {"steps": 1}
    many, once = (build(kind, head_init=init, **row) for kind in (MAML, OnePass))
    assert once.rest
    tasks, parameters = batch(padded=padded), many.initial_parameters()
    weights = torch.tensor([0.2, 0.3, 0.5]).double() if "objective" in row else None
    ours, theirs = (make_meta_gradient(m)(parameters, tasks, step_weights=weights) for m in (once, many))
    assert_close(ours.gradients, theirs.gradients)
    torch.testing.assert_close(ours.losses, theirs.losses)
    both = ("transductive", "inductive")
    assert_close(*(maml.predictions(parameters, tasks, 2 * many.steps, both) for maml in (once, many)))


def sequence() -> nn.Module:
    norms = (nn.BatchNorm1d(4) for _ in range(2))
    layers = zip((nn.Linear(2, 4), nn.Linear(4, 4)), norms, (nn.Tanh(), nn.Tanh()), strict=True)
    return nn.Sequential(*(part for layer in layers for part in layer), nn.Linear(4, WAYS))


@pytest.mark.parametrize("row", ROWS[1:], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("adapted", ["context", "head"])
def test_a_sequence_is_divided_before_its_first_adapted_weights(adapted, row, padded):
    module = sequence()
    if adapted == "context":  # after the second linear layer's batch norm
        module[4] = ContextLayer(nn.BatchNorm1d(4), 4, 3, film=True)
    row = row | {"fast_weights": adapted, "head": "3,6" if adapted == "head" else None}
    many, once = (build(kind, module, **row) for kind in (MAML, OnePass))
    assert once.rest and len(once.before) == (4 if adapted == "context" else 3)
    tasks, parameters = batch(padded=padded), many.initial_parameters()
    weights = torch.tensor([0.2, 0.3, 0.5]).double() if "objective" in row else None
    ours, theirs = (make_meta_gradient(m)(parameters, tasks, step_weights=weights) for m in (once, many))
    assert_close(ours.gradients, theirs.gradients)
    both = ("transductive", "inductive")
    assert_close(*(maml.predictions(parameters, tasks, 5, both) for maml in (once, many)))


def test_a_sequence_with_a_weight_in_both_parts_is_not_divided():
    module = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    module[4].weight = module[1].weight
    once, many = (build(kind, module, head="3") for kind in (OnePass, MAML))
    assert once.rest is None
    one, other = (m.meta_gradient(many.initial_parameters(), batch(padded=False)) for m in (once, many))
    assert_close(one.gradients, other.gradients)


def test_the_body_sees_each_example_once():
    once, tasks = build(OnePass), batch(padded=False)
    parameters = once.initial_parameters()
    passes.clear()
    once.meta_gradient(parameters, tasks)
    assert len(passes) == 2  # support and query
    passes.clear()
    once.predictions(parameters, tasks, 10, ("transductive", "inductive"))
    assert len(passes) == 3


def test_a_rate_that_is_set_from_outside_is_the_heads():
    tasks, one, other = batch(padded=False), build(OnePass), build(OnePass, inner_lr=0.1)
    parameters = one.initial_parameters()
    with one.use_rate(0.1):
        assert_close(*(maml.meta_gradient(parameters, tasks).gradients for maml in (one, other)))


class Drawing(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("module", "choices"),
    [
        (Counting(after=nn.Softmax(1)), {}),  # the head is not the last
        (Counting(Drawing()), {}),  # each pass of the body is another one
        (Counting(), {"head": "top,body.0"}),  # not one linear layer
        (Counting(), {"fast_weights": "all"}),
        (Counting(), {"batch_norm": "per-step"}),
        (Counting(), {"norm_per_step": True}),
    ],
)
def test_what_cannot_be_passed_once_goes_the_usual_way(module, choices):
    once, many = build(OnePass, module, **choices), build(MAML, module, **choices)
    assert once.rest is None
    keys, tasks = torch.tensor([[1, 2], [3, 4]]), batch(padded=False)
    one, other = (m.meta_gradient(many.initial_parameters(), tasks, keys=keys) for m in (once, many))
    assert_close(one.gradients, other.gradients)


def test_minibatches_of_the_support_set_go_the_usual_way():
    once, many, tasks = build(OnePass), build(MAML), batch(padded=False)
    order = integers(EXAMPLES, TASKS, STEPS, 2)
    one, other = (m.meta_gradient(many.initial_parameters(), tasks, order=order) for m in (once, many))
    assert_close(one.gradients, other.gradients)


@pytest.mark.parametrize(
    ("algorithm", "engine"), [("maml", "adjoint"), ("anil", "unrolled"), ("cavia", "unrolled")]
)
def test_several_steps_of_the_end_alone_are_unrolled(algorithm, engine):
    settings = parse(["--dataset", "omniglot", "-s", "5", "--algorithm", algorithm])
    assert resolve(settings).training.engine == engine

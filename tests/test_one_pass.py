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
BOTH = ("transductive", "inductive")
passes: list[int] = []


class Counting(nn.Module):
    """Count the passes."""

    elementary = True  # as the tool's own layers

    def forward(self, x):
        passes.append(1)
        return x


def sequence(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(Counting(), nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), *between),
        *(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, WAYS)),
    )


def batch(*, padded: bool = False) -> TaskBatch:
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
    module = filled(sequence() if module is None else module)
    fixed = {"fast_weights": "head", "inner_lr": 0.3, "steps": STEPS}
    return kind(module, F.cross_entropy, Choices(**fixed | choices), example=batch().support_x[0])


def assert_alike(once: MAML, many: MAML, *, padded: bool = False) -> None:
    tasks, parameters = batch(padded=padded), many.initial_parameters()
    several = many.choices.objective == "multi-step"
    weights = torch.tensor([0.2, 0.3, 0.5]).double() if several else None
    ours, theirs = (make_meta_gradient(m)(parameters, tasks, step_weights=weights) for m in (once, many))
    assert_close(ours.gradients, theirs.gradients)
    torch.testing.assert_close(ours.losses, theirs.losses)
    assert_close(*(maml.predictions(parameters, tasks, 2 * many.steps, BOTH) for maml in (once, many)))


ROWS = [  # choices beside what is adapted
    {"steps": 1},
    {},
    {"meta_gradient": "first-order"},
    {"objective": "multi-step", "inner_rates": "layer-step", "batch_norm": "inductive"},
]


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("init", HEAD_INITS)
@pytest.mark.parametrize("padded", [False, True])
def test_numbers_are_those_of_many_passes_however_the_head_begins(init, row, padded):
    once, many = (build(kind, head_init=init, **row) for kind in (OnePass, MAML))
    assert len(once.before) == 7
    assert_alike(once, many, padded=padded)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("adapted", ["context", "head", "head with a frozen norm"])
def test_a_sequence_is_divided_before_its_first_adapted_weights(adapted, row, padded):
    module = sequence()
    if adapted == "context":
        module[5] = ContextLayer(nn.BatchNorm1d(4), 4, 3, film=True)
        row = row | {"fast_weights": "context"}
    else:
        row = row | {"head": "4,7" if adapted == "head" else "2,4,7", "adapt_norm": False}
    once, many = (build(kind, module, **row) for kind in (OnePass, MAML))
    assert len(once.before) == (5 if adapted == "context" else 4)
    assert_alike(once, many, padded=padded)


def test_what_comes_before_sees_each_example_once():
    once = build(OnePass)
    parameters = once.initial_parameters()
    passes.clear()
    once.meta_gradient(parameters, batch())
    assert len(passes) == 2  # support and query
    passes.clear()
    once.predictions(parameters, batch(), 10, BOTH)
    assert len(passes) == 3


def test_a_rate_that_is_set_from_outside_is_the_rests():
    one, other = build(OnePass), build(OnePass, inner_lr=0.1)
    parameters = one.initial_parameters()
    with one.use_rate(0.1):
        assert_close(*(maml.meta_gradient(parameters, batch()).gradients for maml in (one, other)))


class Own(nn.Module):
    """Compute something of its own after the head, or between the layers."""

    def __init__(self, function, after: bool = True) -> None:
        super().__init__()
        self.function, self.after, self.layers = function, after, sequence()

    def forward(self, x):
        return self.function(self.layers(x)) if self.after else self.layers(self.function(x))


def with_a_hook() -> nn.Module:
    module = sequence()
    module.register_forward_hook(lambda module, x, y: y.clamp(-1, 1))
    return module


def tied() -> nn.Module:
    module = sequence(nn.Linear(4, 4))
    module.append(nn.Linear(WAYS, 4)).append(nn.Linear(4, 4))
    module[10].weight = module[4].weight
    return module


@pytest.mark.parametrize(
    ("module", "choices"),
    [
        (Own(lambda y: y.clamp(-1, 1)), {}),
        (Own(lambda x: x - x.mean(0), after=False), {}),
        (sequence(nn.Sigmoid()), {}),  # any other layer, were it harmless
        (with_a_hook(), {}),
        (tied(), {"head": "9"}),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 2)), nn.Linear(2, 4), nn.Linear(4, WAYS)), {}),
        (sequence(), {"fast_weights": "all"}),
        (sequence(), {"batch_norm": "per-step"}),
        (sequence(), {"norm_per_step": True}),
    ],
)
def test_what_might_not_be_the_same_in_all_steps_goes_the_usual_way(module, choices):
    once, many = (build(kind, module, **choices) for kind in (OnePass, MAML))
    assert once.rest is None
    one, other = (m.meta_gradient(many.initial_parameters(), batch()) for m in (once, many))
    assert_close(one.gradients, other.gradients)


def test_minibatches_of_the_support_set_go_the_usual_way():
    once, many = build(OnePass), build(MAML)
    order = integers(EXAMPLES, TASKS, STEPS, 2)
    one, other = (m.meta_gradient(many.initial_parameters(), batch(), order=order) for m in (once, many))
    assert_close(one.gradients, other.gradients)


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ("--algorithm anil", "unrolled"),
        ("--algorithm cavia", "unrolled"),
        ("--algorithm maml", "adjoint"),
        ("--algorithm anil --inner-batch 3", "adjoint"),
        ("--algorithm anil --norm-per-step", "adjoint"),
        ("--algorithm anil --learner torchvision:resnet18", "adjoint"),
    ],
)
def test_several_steps_are_unrolled_where_little_is(flags, engine):
    settings = parse(["--dataset", "omniglot", "-s", "5", *flags.split()])
    assert resolve(settings).training.engine == engine

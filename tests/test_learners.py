"""What a learner may be made of: each kind of layer, input, output and head against a plain loop.

The loop runs the user's own module, PyTorch's layers as they are, one task after the other, and
differentiates in reverse over reverse.
"""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from inner_loop import RATE, pass_around
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from commands.adapt import adapt_to
from common.batch import TaskBatch, arguments_of, tree_map
from common.optimizers import InnerOptimizer
from common.random import keys_of, task_stream
from evaluation.meta_test import SEED
from learners.batch_norm import BatchNorm
from learners.elementary import Elementary
from learners.heads import head_names
from learners.losses import LOSSES
from maml import MAML

ENGINES = ("unrolled", "adjoint")
TASKS, EXAMPLES, STEPS, LR = 2, 5, 2, 0.1
TOKENS = 7
KEYS = torch.tensor([[11, 12], [13, 14]])  # of two tasks


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(below: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def made(module: nn.Module) -> nn.Module:
    """In float64, with parameters that are no ones and zeros, always the same."""
    generator = torch.Generator().manual_seed(1)
    module = module.double()
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.6 * drawn + 0.7 * (parameter.dim() == 1))
    return module


# ---- the plain loop -------------------------------------------------------------------------


def key_of(keys, purpose: str, step: int = 0):
    """The keys of one pass of one task."""
    return None if keys is None else pass_around({"keys": keys}, purpose, step)["keys"]


def passed(module: nn.Module, weights: dict, x, key=None):
    """The module's outputs. What it has done to its buffers stays, detached, as running statistics are."""
    positional, named = arguments_of(x)
    drawing = nullcontext() if key is None else Elementary(key)
    with (
        sdpa_kernel(SDPBackend.MATH),
        drawing,
    ):  # the kernel with two derivatives
        outputs = functional_call(module, weights, positional, named)
    for layer in module.modules():
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.detach().clone()
    return outputs


def inner_loop(
    module, loss, weights, adapted, x, y, *, steps=STEPS, rates=None, first_order=False, keys=None, carry=True
):
    """The weights after 0, 1, ... steps of one task; the module's buffers go along, if they `carry`.

    `rates` are those of an element where they have the weight's shape, else those of a step.
    """
    yield weights
    for step in range(steps):
        # of their own: fast weights are independent of each other, however they began
        seen = {n: (w.detach() if first_order else w.clone()) for n, w in weights.items()}
        seen = {n: w if w.requires_grad else w.requires_grad_() for n, w in seen.items()}
        own = module if carry else copy.deepcopy(module)
        value = loss(passed(own, seen, x, key_of(keys, "support", step)), y)
        gradients = torch.autograd.grad(
            value, [seen[n] for n in adapted], create_graph=not first_order, allow_unused=True
        )
        weights = dict(weights)
        for name, gradient in zip(adapted, gradients, strict=True):
            if gradient is not None:
                rate = rates[name] if rates else LR
                if rates and rate.shape != gradient.shape:
                    rate = rate[step]
                weights[name] = weights[name] - rate * gradient
        yield weights


def tasks_of(batch: TaskBatch):
    return [TaskBatch(*(tree_map(lambda t, i=i: t[i], part) for part in batch)) for i in range(TASKS)]


def plain_loop(module, loss, batch, *, leaves=None, adapted=None, head=None, keys=None, **options):
    """The meta-gradient by name, the query losses `[tasks]` and the outputs of each task.

    `head(module, weights, task, key)` gives the weights that tasks begin with and do not share; `options`
    are the inner loop's.
    """
    if leaves is None:
        leaves = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    leaves = {n: p.clone().requires_grad_() for n, p in leaves.items()}
    rates = {n.removeprefix(RATE): r for n, r in leaves.items() if n.startswith(RATE)}
    losses, outputs = [], []
    for number, task in enumerate(tasks_of(batch)):
        own, key = copy.deepcopy(module), None if keys is None else keys[number]
        start = {n: w for n, w in leaves.items() if not n.startswith(RATE)}
        start |= head(own, start, task, key) if head else {}
        *path, fast = inner_loop(
            own, loss, start, adapted or list(start), task.support_x, task.support_y,
            rates=rates, keys=key, **options,
        )  # fmt: skip
        outputs.append(passed(own, fast, task.query_x, key_of(key, "query", len(path))))
        losses.append(loss(outputs[-1], task.query_y))
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True)), torch.stack(losses).detach(), outputs


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def predicting(module: nn.Module) -> nn.Module:
    """As `eval` has it, but that PyTorch's own norm layers go on with the examples at hand."""
    kinds = (*BATCH_NORMS, nn.InstanceNorm2d)
    at_hand = [layer for layer in module.modules() if type(layer) in kinds and layer.training]
    module.eval()
    for layer in at_hand:
        layer.train()
    return module


@torch.no_grad()
def inductive(module: nn.Module, weights: dict, support_x, x):
    """The query's outputs with the support set's biased statistics, written into PyTorch's own layers."""
    module = predicting(copy.deepcopy(module))
    found, handles = {}, []
    for name, layer in module.named_modules():
        if type(layer) in BATCH_NORMS and layer.training:

            def see(layer, inputs, name=name):
                (seen,) = inputs
                axes = [0, *range(2, seen.dim())]
                found[f"{name}.running_mean"] = seen.mean(axes)
                found[f"{name}.running_var"] = seen.var(axes, correction=0)

            handles.append(layer.register_forward_pre_hook(see))
    functional_call(module, weights, (support_x,))
    for handle in handles:
        handle.remove()
    return functional_call(module.eval(), weights | found, (x,))


def plain_predictions(module, loss, weights, batch, *, adapted=None, steps=STEPS, keys=None, head=None):
    """After 0, 1, ... steps, batch norm with the query's own statistics: `[tasks, steps + 1, ...]`."""
    of_tasks = []
    for number, task in enumerate(tasks_of(batch)):
        own, key = copy.deepcopy(module), None if keys is None else keys[number]
        start = {n: w.clone().requires_grad_() for n, w in weights.items()}
        start |= head(own, start, task, key) if head else {}
        adapted = adapted or list(start)
        found = [
            passed(predicting(copy.deepcopy(own)), fast, task.query_x).detach()
            for fast in inner_loop(
                own, loss, start, adapted, task.support_x, task.support_y, steps=steps, keys=key
            )
        ]
        of_tasks.append(torch.stack(found))
    return torch.stack(of_tasks)


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max().item() for g in theirs.values())
    assert scale > 1e-6  # a comparison of zeros would prove nothing
    for name in ours:
        assert ours[name].shape == theirs[name].shape, name
        assert (ours[name] - theirs[name]).abs().max().item() < tolerance * scale, name


def apart(ours: dict, theirs: dict) -> float:
    """How far two gradients are from each other, relative to the second."""
    scale = max(g.abs().max().item() for g in theirs.values())
    return max((ours[n] - theirs[n]).abs().max().item() for n in theirs) / scale


def assert_is_the_plain_loops(
    module, batch, *, loss=F.mse_loss, orders=(False, True), steps=STEPS, keys=None, adapted=None,
    options=None, tolerance=1e-9,
):  # fmt: skip
    """Both engines, exact and first order: gradients, losses, outputs; and these two orders differ."""
    gradients = []
    for first_order in orders:
        expected, losses, found = plain_loop(
            module, loss, batch, first_order=first_order, keys=keys, adapted=adapted, steps=steps
        )
        gradients.append(expected)
        for engine in ENGINES:
            given = {"steps": steps, "first_order": first_order, "engine": engine} | (options or {})
            maml = MAML(module, loss, inner_lr=LR, **given)
            result = maml.meta_gradient(maml.initial_parameters(), batch, keys=keys)
            assert_same(result.gradients, expected, tolerance)
            assert torch.allclose(result.losses, losses, rtol=tolerance)
            for number, one in enumerate(found):
                tree_map(lambda a, b, n=number: torch.testing.assert_close(a[n], b), result.outputs, one)
    assert len(gradients) == 1 or apart(*gradients) > 1e-3


# ---- learners, one of each kind -------------------------------------------------------------


class Attention(nn.Module):
    """Attends from each place to all."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 2)

    def forward(self, x):  # [examples, length, 4]
        attended = (
            self.layer(x, x.flip(1), x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        )
        return self.out(attended.tanh().mean(1))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(features, 2)

    def forward(self, x):  # [examples, length, 4]
        outputs, _ = self.layer(x)
        return self.out(outputs[:, -1])


class Cells(nn.Module):
    """The user's own loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = cell = x.new_zeros(len(x), 3)
        for time in range(x.shape[1]):
            hidden, cell = self.cell(x[:, time], (hidden, cell))
        return self.out(hidden)


class Constant(nn.Module):
    """Divides by a size that counts as a constant, in three ways to write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x):
        if self.way == "detach":
            return x / x.detach().square().mean()
        if self.way == "data":
            return x / x.data.square().mean()
        with torch.no_grad():
            size = x.square().mean()
        return x / size


class Text(nn.Module):
    """Of tokens `[examples, length]`."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(TOKENS, 3, **options), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.embedding(tokens).mean(1).tanh())


class Tied(nn.Module):
    """A language model: scores of all tokens, from the embeddings that it reads."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(TOKENS, 3), nn.Linear(3, 3)
        self.out = nn.Linear(3, TOKENS, bias=bias)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.middle(self.embedding(tokens)).tanh().mean(1))


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def vectors(*shape: int, targets: int = 2) -> TaskBatch:
    x, more_x = (random(TASKS, EXAMPLES, *shape, seed=seed) for seed in (1, 2))
    y, more_y = (random(TASKS, EXAMPLES, targets, seed=seed) for seed in (3, 4))
    return TaskBatch(x, y, more_x, more_y)


def sentences(*, language: bool = False) -> TaskBatch:
    batch = vectors(1)
    x = [integers(TOKENS, TASKS, EXAMPLES, 4, seed=seed) for seed in (1, 2)]
    y = [integers(TOKENS, TASKS, EXAMPLES, seed=seed) for seed in (3, 4)]
    y = y if language else [batch.support_y, batch.query_y]
    return TaskBatch(x[0], y[0], x[1], y[1])


def images() -> TaskBatch:
    return vectors(2, 4, 4)


def convolutions(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))


def layers(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2))


def batch_norm_2d() -> nn.Module:
    return convolutions(nn.BatchNorm2d(4))


KINDS = {
    "batch norm of vectors": (lambda: layers(nn.BatchNorm1d(4)), lambda: vectors(3)),
    "batch norm of sequences": (lambda: layers(nn.BatchNorm1d(6)), lambda: vectors(6, 3, targets=1)),
    "batch norm of images": (batch_norm_2d, images),
    "batch norm, no statistics": (
        lambda: layers(nn.BatchNorm1d(4, affine=False, track_running_stats=False)),
        lambda: vectors(3),
    ),
    "layer norm": (lambda: layers(nn.LayerNorm(4)), lambda: vectors(3)),
    "layer norm of images": (lambda: convolutions(nn.LayerNorm([2, 2])), images),
    "group norm": (lambda: convolutions(nn.GroupNorm(2, 4)), images),
    "instance norm": (lambda: convolutions(nn.InstanceNorm2d(4, affine=True)), images),
    "instance norm, running": (lambda: convolutions(nn.InstanceNorm2d(4, track_running_stats=True)), images),
    "embedding": (Text, sentences),
    "embedding with padding": (lambda: Text(padding_idx=1), sentences),
    "attention": (lambda: Attention(nn.MultiheadAttention(4, 2, batch_first=True)), lambda: vectors(3, 4)),
    "transformer": (
        lambda: Attention(nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)),
        lambda: vectors(3, 4),
    ),
    "lstm": (
        lambda: Recurrent(nn.LSTM(4, 3, batch_first=True, bidirectional=True), 6),
        lambda: vectors(3, 4),
    ),
    "gru": (lambda: Recurrent(nn.GRU(4, 3, 2, batch_first=True), 3), lambda: vectors(3, 4)),
    "lstm cell": (Cells, lambda: vectors(3, 4)),
    "tied": (Tied, lambda: sentences(language=True)),
    "frozen": (lambda: frozen(layers(nn.BatchNorm1d(4)), "0.weight", "1.bias"), lambda: vectors(3)),
}  # fmt: skip


def build(kind: str) -> tuple[nn.Module, TaskBatch]:
    """The learner and its tasks."""
    module, batch = (make() for make in KINDS[kind])
    if kind == "batch norm of sequences":  # a target for each place: [tasks, examples, 6, 2]
        x, _, more, _ = batch
        batch = TaskBatch(x, x[..., :2].sin(), more, more[..., :2].sin())
    return made(module), batch


def loss_of(kind: str):
    return F.cross_entropy if kind == "tied" else F.mse_loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_of_any_learner_is_that_of_a_plain_loop(kind):
    module, batch = build(kind)
    assert_is_the_plain_loops(module, batch, loss=loss_of(kind))
    maml = MAML(module, loss_of(kind), inner_lr=LR)
    parameters = maml.initial_parameters()
    assert parameters.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    outputs = maml.predictions(parameters, batch, STEPS)["transductive"]
    torch.testing.assert_close(outputs, plain_predictions(module, loss_of(kind), parameters, batch))


@pytest.mark.parametrize(
    ("way", "vectorised"),
    [("detach", True), ("detach", False), ("no_grad", True), ("no_grad", False), ("data", False)],
)
def test_what_the_learner_takes_for_a_constant_is_one_in_every_derivative(way, vectorised):
    assert_is_the_plain_loops(made(layers(Constant(way))), vectors(3), options={"vectorised": vectorised})


def test_what_the_loss_takes_for_a_constant_is_one_in_every_derivative():
    def loss(outputs, targets):  # the worst examples count most
        with torch.no_grad():
            shares = (outputs - targets).square().sum(1).softmax(0)
        return (shares * (outputs - targets).square().sum(1)).sum()

    assert_is_the_plain_loops(made(layers()), vectors(3), loss=loss)


def state_of(*modules: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for module in modules for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "kind",
    [
        "batch norm of vectors",
        "batch norm of images",
        "instance norm, running",
        "frozen",
        "own",
        "super",
        "assigned",
    ],
)
def test_nothing_stays_behind_and_nothing_passes_between_tasks(kind, engine):
    module, batch = (made(BUFFERED[kind]()), vectors(3)) if kind in BUFFERED else build(kind)
    maml = MAML(module, F.mse_loss, inner_lr=LR, steps=STEPS, engine=engine)
    parameters = maml.initial_parameters()
    before = state_of(module, maml.learner)
    first, second = (maml.meta_gradient(parameters, batch) for _ in range(2))
    maml.predictions(parameters, batch, steps=1)
    after = state_of(module, maml.learner)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(g, second.gradients[n]) for n, g in first.gradients.items())
    alone = [
        maml.meta_gradient(parameters, TaskBatch(*(t[i : i + 1] for t in batch))).gradients
        for i in range(TASKS)
    ]
    assert apart(alone[0], alone[1]) > 1e-2
    assert_same(first.gradients, {n: (g + alone[1][n]) / 2 for n, g in alone[0].items()}, 1e-11)


# ---- buffers --------------------------------------------------------------------------------


class OwnNorm(nn.BatchNorm1d):
    """Moves its statistics in place, and normalises with them."""

    def forward(self, x):
        if self.training:
            seen = x.detach()
            self.num_batches_tracked += 1
            self.running_mean.mul_(0.6).add_(0.4 * seen.mean(0))
            self.running_var.mul_(0.6).add_(0.4 * seen.var(0))
        scale = self.weight * torch.rsqrt(self.running_var + self.eps) / (1 + self.num_batches_tracked)
        return (x - self.running_mean) * scale + self.bias


class NoGradNorm(nn.BatchNorm1d):
    """The same, as most write it."""

    @torch.no_grad()
    def moved(self, x):
        self.running_mean.mul_(0.6).add_(0.4 * x.mean(0))

    def forward(self, x):
        if self.training:
            self.moved(x)
        return (x - self.running_mean) * self.weight + self.bias


class AttachedNorm(nn.BatchNorm1d):
    """The same, but that a pass's own part in the statistics is differentiated."""

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.6)
            self.running_mean += 0.4 * x.mean(0)
        return (x - self.running_mean) * self.weight + self.bias


class SuperNorm(nn.BatchNorm1d):
    """PyTorch's own forward, and more: its running statistics move in training, and serve in evaluation."""

    def forward(self, x):
        return super().forward(x).sin()


class Assigning(nn.Module):
    """Puts another tensor in the place of its buffer; persistent it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.linspace(-0.5, 0.5, 4), persistent=False)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        if self.training:
            self.memory = 0.5 * self.memory + 0.5 * x.mean(0).detach()
        return x + self.gain * self.memory**2


BUFFERED = {
    "own": lambda: layers(OwnNorm(4)),
    "own, without gradient": lambda: layers(NoGradNorm(4)),
    "own, attached": lambda: layers(AttachedNorm(4)),
    "super": lambda: layers(SuperNorm(4)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "assigned": lambda: layers(Assigning()),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", BUFFERED)
def test_each_task_has_buffers_of_its_own_that_go_through_its_inner_steps(kind, example):
    module, batch = made(BUFFERED[kind]()), vectors(3)
    options = {"example": batch.support_x[0]} if example else {}
    assert_is_the_plain_loops(module, batch, steps=3, options=options)

    maml = MAML(module, F.mse_loss, inner_lr=LR, steps=3, **options)
    before = state_of(module, maml.learner)
    maml.meta_gradient(maml.initial_parameters(), batch)
    after = state_of(module, maml.learner)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with_them, without = (
        plain_loop(module, F.mse_loss, batch, steps=3, carry=carry)[0] for carry in (True, False)
    )
    assert kind == "super" or apart(without, with_them) > 1e-3  # where they count in training


@pytest.mark.parametrize("kind", BUFFERED)
def test_predictions_use_the_buffers_of_the_inner_loop_and_leave_them(kind):
    module, batch = made(BUFFERED[kind]()), vectors(3)
    maml = MAML(module, F.mse_loss, inner_lr=LR)
    parameters = maml.initial_parameters()
    expected = plain_predictions(module, F.mse_loss, parameters, batch)
    outputs = maml.predictions(parameters, batch, STEPS)["transductive"]
    torch.testing.assert_close(outputs, expected)
    for number, task in enumerate(tasks_of(batch)):
        adapted = adapt_to(maml, parameters, task.support_x, task.support_y, steps=STEPS)
        for _ in range(2):
            torch.testing.assert_close(adapted.predict(task.query_x), expected[number, -1])
        module_of_task = adapted.module(module).eval()
        torch.testing.assert_close(module_of_task(task.query_x), expected[number, -1])


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.InstanceNorm1d, nn.SyncBatchNorm])
def test_a_norm_layer_in_evaluation_mode_keeps_its_running_statistics(layer, example):
    module = made(layers(layer(4, track_running_stats=True, affine=True)))
    norm = module[1].eval()
    norm.running_mean += torch.linspace(-1, 1, 4)
    norm.running_var += torch.linspace(0.5, 2, 4)
    batch = vectors(3)
    if layer is nn.InstanceNorm1d:
        module[0] = made(nn.Conv1d(2, 4, 3))
        module[3] = made(nn.Linear(1, 2))
        batch = TaskBatch(*(random(TASKS, EXAMPLES, *s, seed=i) for i, s in enumerate(2 * ((2, 3), (4, 2)))))
    options = {"example": batch.support_x[0]} if example else {}
    before = state_of(module)
    assert_is_the_plain_loops(module, batch, options=options)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(module), strict=True))
    maml = MAML(module, F.mse_loss, inner_lr=LR, **options)
    parameters = maml.initial_parameters()
    outputs = maml.predictions(parameters, batch, STEPS, ("transductive", "inductive"))
    expected = plain_predictions(module, F.mse_loss, parameters, batch)
    torch.testing.assert_close(outputs["transductive"], expected)
    torch.testing.assert_close(outputs["inductive"], expected)
    assert maml.learner.training and not maml.learner[1].training  # predicting leaves the modes as they were


# ---- parameters -----------------------------------------------------------------------------


def test_a_frozen_parameter_is_no_meta_parameter_and_stays_as_it_is():
    module, batch = build("frozen")
    before = {n: module.get_parameter(n).clone() for n in ("0.weight", "1.bias")}
    maml = MAML(module, F.mse_loss, inner_lr=LR, steps=STEPS)
    parameters = maml.initial_parameters()
    assert not before.keys() & parameters.keys() and before.keys() <= maml.fixed.keys()
    moved = {n: w + 0.1 for n, w in parameters.items()}
    maml.meta_gradient(moved, batch)
    for module_now in (module, maml.learner):
        assert all(torch.equal(module_now.get_parameter(n), w) for n, w in before.items())
    changed = frozen(made(layers(nn.BatchNorm1d(4))), "0.weight", "1.bias")
    changed[0].weight.data += 0.5  # what is frozen counts all the same
    other = MAML(changed, F.mse_loss, inner_lr=LR, steps=STEPS).meta_gradient(parameters, batch).gradients
    assert apart(other, maml.meta_gradient(parameters, batch).gradients) > 1e-3


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_is_found_by_the_name_of_the_first_of_its_places(bias):
    module, batch = made(Tied(bias=bias)), sentences(language=True)
    head = {"embedding.weight"} | ({"out.bias"} if bias else set())
    assert head_names(module) == head
    assert_is_the_plain_loops(
        module, batch, loss=F.cross_entropy, adapted=sorted(head), options={"fast_weights": "head"}
    )
    for init in ("zero", "prototype"):  # it would take the embeddings along
        with pytest.raises(ValueError, match="not one linear layer with a bias"):
            MAML(module, F.cross_entropy, inner_lr=LR, head_init=init)


class Unused(nn.Module):
    """One layer that is never called, and one whose outputs the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never, self.unseen = layers(), nn.Linear(2, 2), nn.Linear(3, 1)

    def forward(self, x):
        return {"seen": self.body(x), "unseen": self.unseen(x)}


def test_parameters_that_do_not_reach_the_loss_have_a_gradient_of_zero():
    module, batch = made(Unused()), vectors(3)

    def loss(outputs, targets):
        return F.mse_loss(outputs["seen"], targets)

    assert_is_the_plain_loops(module, batch, loss=loss)
    for engine in ENGINES:
        maml = MAML(module, loss, inner_lr=LR, steps=STEPS, engine=engine)
        gradients = maml.meta_gradient(maml.initial_parameters(), batch).gradients
        silent = {n for n, g in gradients.items() if not g.any()}
        assert silent == {f"{layer}.{p}" for layer in ("never", "unseen") for p in ("weight", "bias")}


# ---- inputs and outputs ---------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Numbers, and tokens to go with them; what is not given by name would not be found."""

    def __init__(self, outputs: str = "tensor") -> None:
        super().__init__()
        self.layer, self.embedding, self.out = nn.Linear(3, 4), nn.Embedding(TOKENS, 4), nn.Linear(4, 2)
        self.scale, self.outputs = nn.Linear(4, 1), outputs

    def forward(self, numbers, token):
        hidden = (self.layer(numbers) * self.embedding(token)).tanh()
        mean, scale = self.out(hidden), self.scale(hidden)
        if self.outputs == "dict":
            return {"scale": scale, "mean": mean}
        return (mean, scale) if self.outputs == "tuple" else mean + scale


def two_inputs(kind: str) -> TaskBatch:
    numbers, batch = vectors(3), sentences()
    pairs = [(numbers.support_x, batch.support_x[..., 0]), (numbers.query_x, batch.query_x[..., 0])]
    if kind == "dict":  # not in the order of the arguments
        pairs = [{"token": token, "numbers": x} for x, token in pairs]
    return TaskBatch(pairs[0], numbers.support_y, pairs[1], numbers.query_y)


def likelihood(outputs, targets):
    """Uses both outputs: a Gaussian's mean and the logarithm of its width."""
    mean, width = outputs if isinstance(outputs, tuple) else (outputs["mean"], outputs["scale"])
    return (width + 0.5 * (targets - mean) ** 2 * torch.exp(-2 * width)).mean()


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs_come_as_a_tuple_or_by_name(kind):
    module, batch = made(TwoInputs()), two_inputs(kind)
    assert_is_the_plain_loops(module, batch)
    maml = MAML(module, F.mse_loss, inner_lr=LR)
    parameters = maml.initial_parameters()
    expected = plain_predictions(module, F.mse_loss, parameters, batch)
    both = maml.predictions(parameters, batch, STEPS, ("transductive", "inductive"))
    torch.testing.assert_close(both["transductive"], expected)
    torch.testing.assert_close(both["inductive"], expected)


@pytest.mark.parametrize("options", [{}, {"tasks_at_once": 1}, {"normalisation": "inductive"}])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_outputs_all_reach_the_loss(kind, options):
    module, batch = made(TwoInputs(kind)), two_inputs("tuple")
    assert_is_the_plain_loops(module, batch, loss=likelihood, orders=(False,), options=options)


def test_several_targets_are_a_tree_too():
    module, batch = made(TwoInputs("tuple")), two_inputs("tuple")
    batch = batch._replace(
        support_y=(batch.support_y, batch.support_x[1]), query_y=(batch.query_y, batch.query_x[1])
    )

    def loss(outputs, targets):
        return F.mse_loss(outputs[0], targets[0]) + F.mse_loss(outputs[1][:, 0], targets[1].double() / TOKENS)

    assert_is_the_plain_loops(module, batch, loss=loss)


# ---- what vmap cannot take ------------------------------------------------------------------


class DataDependent(nn.Module):
    """Decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.taken = []

    def forward(self, x):
        self.taken.append(x.mean().item() > 0)
        scale = x.std().item()
        return self.out((self.layer if self.taken[-1] else self.other)(x / scale).tanh())


def test_a_learner_that_decides_by_values_goes_one_task_at_a_time():
    module, batch = made(DataDependent()), vectors(3)
    batch = batch._replace(support_x=batch.support_x + torch.tensor([1.0, -1.0]).view(2, 1, 1))
    assert_is_the_plain_loops(module, batch, options={"vectorised": False})
    passed(module, dict(module.named_parameters()), batch.support_x[0])
    passed(module, dict(module.named_parameters()), batch.support_x[1])
    assert module.taken == [True, False]  # tasks go different ways
    for engine in ENGINES:
        maml = MAML(module, F.mse_loss, inner_lr=LR, engine=engine)
        with pytest.raises(RuntimeError, match="item"):
            maml.meta_gradient(maml.initial_parameters(), batch)


@pytest.mark.parametrize("kind", ["batch norm of images", "lstm", "own", "prototype"])
def test_one_task_at_a_time_is_the_same_as_all_at_once(kind):
    if kind == "prototype":
        module, batch = classifier(), labelled()
        options = {"head_init": "prototype", "inner_rates": "element", **HEAD}
    else:
        module, batch = (made(BUFFERED[kind]()), vectors(3)) if kind in BUFFERED else build(kind)
        options = {}
    loss = F.cross_entropy if kind == "prototype" else F.mse_loss
    for engine in ENGINES:
        at_once, one_by_one = (
            MAML(module, loss, inner_lr=LR, steps=STEPS, engine=engine, vectorised=v, **options)
            for v in (True, False)
        )
        parameters = at_once.initial_parameters()
        expected = at_once.meta_gradient(parameters, batch)
        result = one_by_one.meta_gradient(parameters, batch)
        assert_same(result.gradients, expected.gradients, 1e-11)
        torch.testing.assert_close(result.outputs, expected.outputs)
        found, wanted = (
            maml.predictions(parameters, batch, 1)["transductive"] for maml in (one_by_one, at_once)
        )
        torch.testing.assert_close(found, wanted)


# ---- dropout --------------------------------------------------------------------------------


def dropout_of(kind: str) -> tuple[nn.Module, TaskBatch]:
    if kind == "plain":
        return made(layers(nn.Dropout(0.4))), vectors(3)
    if kind == "channels":
        return made(convolutions(nn.Dropout2d(0.4))), images()
    return made(Recurrent(nn.LSTM(4, 3, 2, batch_first=True, dropout=0.4), 3)), vectors(3, 4)


@pytest.mark.parametrize("kind", ["plain", "channels", "between recurrent layers"])
def test_dropout_with_the_same_keys_is_the_same(kind):
    module, batch = dropout_of(kind)
    assert_is_the_plain_loops(module, batch, keys=KEYS)
    for engine in ENGINES:
        maml = MAML(module, F.mse_loss, inner_lr=LR, steps=STEPS, engine=engine)
        parameters = maml.initial_parameters()
        first, again, other = (
            maml.meta_gradient(parameters, batch, keys=keys).gradients for keys in (KEYS, KEYS, KEYS + 2)
        )
        assert all(torch.equal(g, again[n]) for n, g in first.items())
        assert apart(other, first) > 1e-2
        chunks = maml.with_options(tasks_at_once=1).meta_gradient(parameters, batch, keys=KEYS).gradients
        assert_same(chunks, first, 1e-11)


class Watched(nn.Module):
    """Dropout that remembers what it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = []

    def forward(self, x):
        mask = F.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks.append(tuple((mask > 0).flatten().tolist()))
        return x * mask


def test_each_task_step_and_pass_drops_others():
    module, batch = classifier(3, Watched()), labelled()
    options = {"inner_lr": LR, "steps": STEPS, "vectorised": False, "head_init": "prototype", **HEAD}
    maml = MAML(module, F.cross_entropy, **options)
    parameters = maml.initial_parameters()
    after_each_step = torch.tensor([0.5, 0.5], dtype=torch.float64)
    maml.meta_gradient(parameters, batch, keys=KEYS, step_weights=after_each_step)
    masks = [mask for layer in (maml.learner, maml._body) for mask in layer.body[1].masks]
    assert len(masks) == len(set(masks)) == TASKS * (1 + STEPS + STEPS)  # prototypes, support, query
    maml = MAML(module, F.cross_entropy, **options)
    maml.predictions(parameters, batch, STEPS, keys=KEYS)
    masks = maml.learner.body[1].masks
    assert sum(all(mask) for mask in masks) == TASKS * (STEPS + 1)  # the queries'
    assert len(set(masks)) == TASKS * STEPS + 1


def test_adjoint_goes_back_through_the_masks_that_it_came_by():
    module, batch = made(layers(Watched())), vectors(3)
    maml = MAML(module, F.mse_loss, inner_lr=LR, steps=STEPS, vectorised=False, engine="adjoint")
    maml.meta_gradient(maml.initial_parameters(), batch, keys=KEYS)
    masks = maml.learner[1].masks
    assert len(set(masks)) == TASKS * (STEPS + 1) and len(masks) == TASKS * (2 * STEPS + 1)


def test_predictions_drop_in_the_inner_loop_and_nothing_in_the_query():
    module, batch = dropout_of("plain")
    maml = MAML(module, F.mse_loss, inner_lr=LR)
    parameters = maml.initial_parameters()
    outputs = maml.predictions(parameters, batch, STEPS, ("transductive", "inductive"), keys=KEYS)
    expected = plain_predictions(module, F.mse_loss, parameters, batch, keys=KEYS)
    torch.testing.assert_close(outputs["transductive"], expected)
    torch.testing.assert_close(outputs["inductive"], expected)
    others = plain_predictions(module, F.mse_loss, parameters, batch, keys=KEYS + 2)
    assert (expected - others).abs().max() > 1e-3
    at_start = torch.stack([copy.deepcopy(module).eval()(x) for x in batch.query_x])
    torch.testing.assert_close(outputs["transductive"][:, 0], at_start)
    keys = keys_of(task_stream("test", SEED, 0, range(1), torch.device("cpu"))).expand(TASKS, 2)
    expected = plain_predictions(module, F.mse_loss, parameters, batch, keys=keys)
    for number, task in enumerate(tasks_of(batch)):
        adapted = adapt_to(maml, parameters, task.support_x, task.support_y, steps=STEPS)
        torch.testing.assert_close(adapted.predict(task.query_x), expected[number, -1])
        torch.testing.assert_close(adapted.module(module).eval()(task.query_x), expected[number, -1])


@pytest.mark.parametrize("kind", ["plain", "channels", "between recurrent layers"])
def test_a_learner_that_draws_is_refused_without_keys(kind):
    module, batch = dropout_of(kind)
    for engine in ENGINES:
        maml = MAML(module, F.mse_loss, inner_lr=LR, engine=engine)
        parameters = maml.initial_parameters()
        assert maml.draws(batch.support_x[0])
        with pytest.raises(ValueError, match="give keys"):
            maml.meta_gradient(parameters, batch)
        with pytest.raises(ValueError, match="give keys"):
            maml.predictions(parameters, batch, 1)
        maml.predictions(parameters, batch, 0)  # the query draws nothing
    assert not MAML(made(layers()), F.mse_loss, inner_lr=LR).draws(vectors(3).support_x[0])


# ---- losses ---------------------------------------------------------------------------------


def one_hot(classes: torch.Tensor) -> torch.Tensor:
    return F.one_hot(classes, 3).double()


def of_classes(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, one_hot(targets))


CLASSES = [integers(3, TASKS, EXAMPLES, seed=seed) for seed in (5, 6)]
BITS = [(random(TASKS, EXAMPLES, 3, seed=seed) > 0).double() for seed in (5, 6)]
FAR = [3 * random(TASKS, EXAMPLES, 3, seed=seed) for seed in (5, 6)]  # errors on both sides of Huber's 1
LOSS_CASES = {
    "mse": ("mse", F.mse_loss, FAR),
    "cross-entropy": ("cross-entropy", F.cross_entropy, CLASSES),
    "bce of classes": ("bce", of_classes, CLASSES),
    "bce of numbers": ("bce", F.binary_cross_entropy_with_logits, BITS),
    "huber": ("huber", F.huber_loss, FAR),
}


def test_every_loss_has_its_case():
    assert {name for name, *_ in LOSS_CASES.values()} == LOSSES.keys()


@pytest.mark.parametrize("case", LOSS_CASES)
def test_each_loss_is_torchs_own(case):
    name, theirs, targets = LOSS_CASES[case]
    module = made(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    batch = vectors(3)._replace(support_y=targets[0], query_y=targets[1])
    for first_order in (False, True):
        expected, values, _ = plain_loop(module, theirs, batch, first_order=first_order)
        for engine in ENGINES:
            maml = MAML(
                module, LOSSES[name], inner_lr=LR, steps=STEPS, first_order=first_order, engine=engine
            )
            result = maml.meta_gradient(maml.initial_parameters(), batch)
            assert_same(result.gradients, expected)
            torch.testing.assert_close(result.losses, values)
    if name == "huber":
        errors = (module(batch.support_x) - batch.support_y).abs()
        assert (errors < 1).any() and (errors > 1).any()


# ---- heads that are computed ----------------------------------------------------------------


class Classifier(nn.Module):
    """A body and a linear head; the head is not the last of the children."""

    def __init__(self, ways: int, *between: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, ways)
        self.body = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh())

    def forward(self, x):
        return self.head(self.body(x))


def classifier(ways: int = 3, *between: nn.Module) -> nn.Module:
    """With the same body whatever the ways."""
    module = made(Classifier(ways, *between))
    module.body = made(module.body)
    return module


def labelled(ways: int = 3) -> TaskBatch:
    """Classes in any order, not of the same number of examples."""
    orders = [
        torch.stack([torch.arange(EXAMPLES + ways).roll(i + j) % ways for i in range(TASKS)]) for j in (0, 1)
    ]
    x = [random(TASKS, EXAMPLES + ways, 3, seed=seed) + 0.5 * y[..., None] for seed, y in enumerate(orders)]
    return TaskBatch(x[0], orders[0], x[1], orders[1])


HEAD = {"head": "head"}  # `MAML`'s argument


def zero_head(module, leaves, task, key):
    return {
        n: torch.zeros_like(p).requires_grad_() for n, p in module.named_parameters() if n.startswith("head.")
    }


def prototypes_of(body: nn.Module, leaves, x, y, ways: int, key=None):
    weights = {n.removeprefix("body."): w for n, w in leaves.items() if n.startswith("body.")}
    embeddings = passed(body, weights, x, key)
    means = torch.stack([embeddings[y == way].mean(0) for way in range(ways)])
    return {"head.weight": 2 * means, "head.bias": -means.pow(2).sum(1)}


def prototype_head(module, leaves, task, key):
    ways = module.head.out_features
    return prototypes_of(module.body, leaves, task.support_x, task.support_y, ways, key_of(key, "prototypes"))


HEADS = {"zero": zero_head, "prototype": prototype_head}
HEAD_OPTIONS = {
    "all": {},
    "head": {"fast_weights": "head"},
    "rates by element": {"inner_rates": "element", "inner_lr_max": 2 * LR},
    "rates by layer and step": {"inner_rates": "layer-step", "inner_lr_max": 2 * LR},
    "rates of the head": {"fast_weights": "head", "inner_rates": "element", "inner_lr_max": 2 * LR},
}


@pytest.mark.parametrize("choice", HEAD_OPTIONS)
@pytest.mark.parametrize("init", HEADS)
def test_a_computed_head_is_that_of_a_plain_loop(init, choice):
    module, batch, options = classifier(), labelled(), HEAD_OPTIONS[choice]
    adapted = ["head.weight", "head.bias"] if "fast_weights" in options else None
    gradients = []
    for first_order in (False, True):
        for engine in ENGINES:
            maml = MAML(
                module, F.cross_entropy, inner_lr=LR, steps=STEPS, head_init=init, engine=engine,
                first_order=first_order, **HEAD, **options,
            )  # fmt: skip
            parameters = maml.initial_parameters()
            weights = {name for name in parameters if not name.startswith(RATE)}
            assert weights == {"body.0.weight", "body.0.bias"}
            expected, losses, _ = plain_loop(
                module, F.cross_entropy, batch, leaves=parameters, head=HEADS[init], adapted=adapted,
                first_order=first_order,
            )  # fmt: skip
            result = maml.meta_gradient(parameters, batch)
            assert_same(result.gradients, expected)
            torch.testing.assert_close(result.losses, losses)
        gradients.append(expected)
    assert apart(*gradients) > 1e-3


def test_prototypes_before_the_first_step_classify_by_the_distance_to_the_means():
    module, batch = classifier(), labelled()
    maml = MAML(module, F.cross_entropy, inner_lr=LR, head_init="prototype", **HEAD)
    logits = maml.predictions(maml.initial_parameters(), batch, 0)["transductive"][:, 0]
    for number, task in enumerate(tasks_of(batch)):
        support, query = module.body(task.support_x), module.body(task.query_x)
        means = torch.stack([support[task.support_y == way].mean(0) for way in range(3)])
        distances = torch.cdist(query, means) ** 2
        torch.testing.assert_close(logits[number].softmax(-1), (-distances).softmax(-1).detach())


def test_prototypes_under_running_statistics_do_not_depend_on_the_other_classes():
    body = nn.Sequential(nn.Linear(3, 5), BatchNorm(5)).double()
    module = nn.Sequential(OrderedDict(body=body, head=nn.Linear(5, 3).double()))
    maml = MAML(module, F.cross_entropy, inner_lr=LR, normalisation="per-step", head_init="prototype", **HEAD)
    parameters, task = maml.initial_parameters(), tasks_of(labelled())[0]
    others = torch.where(task.support_y[:, None] == 0, task.support_x, task.support_x + 1)
    statistics = {name: s + torch.tensor([[0.3], [2.0]]) for name, s in maml.initial_statistics().items()}
    for given in (statistics, None):
        with maml.running() if given else nullcontext():
            first, second = (
                maml.start(parameters, x, task.support_y, {}, given).fast["head.weight"][0]
                for x in (task.support_x, others)
            )
        assert torch.equal(first, second) == (given is not None)
    with pytest.raises(ValueError, match="running statistics"):
        maml.predictions(parameters, labelled(), 1, ("per-step",))
    with pytest.raises(ValueError, match="running statistics"):
        adapt_to(maml, parameters, task.support_x, task.support_y, steps=1, normalisation="per-step")


@pytest.mark.parametrize("options", [{}, {"fast_weights": "head"}])
def test_gradients_through_prototypes_agree_with_finite_differences(options):
    batch = labelled()
    for engine in ENGINES:
        maml = MAML(
            classifier(), F.cross_entropy, inner_lr=LR, steps=STEPS, head_init="prototype", engine=engine,
            **HEAD, **options,
        )  # fmt: skip
        parameters = maml.initial_parameters()
        gradients = maml.meta_gradient(parameters, batch).gradients
        for name, gradient in gradients.items():
            for place in range(0, gradient.numel(), 5):
                step = torch.zeros_like(gradient)
                step.view(-1)[place] = 1e-5
                above, below = (
                    maml.meta_gradient(parameters | {name: parameters[name] + s}, batch).losses.mean().item()
                    for s in (step, -step)
                )
                assert gradient.view(-1)[place].item() == pytest.approx(
                    (above - below) / 2e-5, rel=1e-6, abs=1e-9
                )


@pytest.mark.parametrize("kind", ["dropout", "batch norm", "own", "order"])
def test_prototypes_are_a_pass_of_the_learner_like_any_other(kind):
    """It drops by keys of its own, leaves the buffers as they were, and sees the whole support set."""
    between = {
        "dropout": nn.Dropout(0.4),
        "batch norm": nn.BatchNorm1d(4),
        "own": OwnNorm(4),
        "order": nn.Tanh(),
    }
    module, batch = classifier(3, between[kind]), labelled()
    keys = KEYS if kind == "dropout" else None
    order = integers(EXAMPLES + 3, TASKS, STEPS, 4) if kind == "order" else None

    def head(module, leaves, task, key):
        return prototype_head(
            copy.deepcopy(module), leaves, task, key
        )  # its buffers begin the inner loop anew

    for first_order in (False, True):
        if order is None:
            expected, *_ = plain_loop(
                module, F.cross_entropy, batch, head=head, first_order=first_order, keys=keys,
                leaves={n: p for n, p in module.named_parameters() if not n.startswith("head.")},
            )  # fmt: skip
        else:
            expected = minibatches_by_hand(module, batch, order, first_order)
        for engine in ENGINES:
            maml = MAML(
                module, F.cross_entropy, inner_lr=LR, steps=STEPS, head_init="prototype",
                first_order=first_order, engine=engine, **HEAD,
            )  # fmt: skip
            result = maml.meta_gradient(maml.initial_parameters(), batch, keys=keys, order=order)
            assert_same(result.gradients, expected)


def minibatches_by_hand(module, batch, order, first_order):
    leaves = {n: p.detach().clone().requires_grad_() for n, p in module.body.named_parameters(prefix="body")}
    losses = []
    for number, task in enumerate(tasks_of(batch)):
        fast = leaves | prototype_head(module, leaves, task, None)
        for chosen in order[number]:
            *_, fast = inner_loop(
                module, F.cross_entropy, fast, list(fast), task.support_x[chosen], task.support_y[chosen],
                steps=1, first_order=first_order,
            )  # fmt: skip
        losses.append(F.cross_entropy(passed(module, fast, task.query_x), task.query_y))
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("fast_weights", ["all", "head"])
@pytest.mark.parametrize("init", HEADS)
def test_reptile_from_a_computed_head_moves_the_body_to_where_it_went(init, fast_weights, buffers):
    module, batch = classifier(3, OwnNorm(4) if buffers else nn.Identity()), labelled()
    maml = MAML(
        module, F.cross_entropy, inner_lr=LR, steps=STEPS, head_init=init, meta_gradient="reptile",
        fast_weights=fast_weights, **HEAD,
    )  # fmt: skip
    parameters = maml.initial_parameters()
    result = maml.meta_gradient(parameters, batch)
    moved = {n: torch.zeros_like(w) for n, w in parameters.items()}
    for number, task in enumerate(tasks_of(batch)):
        pool = task._replace(
            support_x=torch.cat([task.support_x, task.query_x]),
            support_y=torch.cat([task.support_y, task.query_y]),
        )
        own = copy.deepcopy(module)
        start = {n: w.clone().requires_grad_() for n, w in parameters.items()}
        start |= HEADS[init](copy.deepcopy(module), start, pool, None)
        adapted = list(start) if fast_weights == "all" else ["head.weight", "head.bias"]
        *_, fast = inner_loop(
            own, F.cross_entropy, start, adapted, pool.support_x, pool.support_y, steps=STEPS
        )
        for name in moved:
            moved[name] += (start[name] - fast[name]).detach() / TASKS
        outputs = passed(own, fast, task.query_x)
        torch.testing.assert_close(result.outputs[number], outputs.detach())
        torch.testing.assert_close(result.losses[number], F.cross_entropy(outputs, task.query_y).detach())
    if fast_weights == "all":
        assert_same(result.gradients, moved)
    else:
        assert not any(g.any() for g in result.gradients.values())


@pytest.mark.parametrize("init", HEADS)
def test_with_a_computed_head_the_same_parameters_serve_any_number_of_ways(init):
    trained = MAML(classifier(3), F.cross_entropy, inner_lr=LR, head_init=init, **HEAD)
    parameters = {n: w + 0.1 for n, w in trained.initial_parameters().items()}
    for ways in (2, 5):
        module, batch = classifier(ways), labelled(ways)
        maml = MAML(module, F.cross_entropy, inner_lr=LR, head_init=init, **HEAD)
        assert {n: w.shape for n, w in maml.initial_parameters().items()} == {
            n: w.shape for n, w in parameters.items()
        }
        expected = plain_predictions(module, F.cross_entropy, parameters, batch, head=HEADS[init])
        outputs = maml.predictions(parameters, batch, STEPS)["transductive"]
        assert outputs.shape == (TASKS, STEPS + 1, EXAMPLES + ways, ways)
        torch.testing.assert_close(outputs, expected)
        for number, task in enumerate(tasks_of(batch)):
            adapted = adapt_to(maml, parameters, task.support_x, task.support_y, steps=STEPS)
            torch.testing.assert_close(adapted.predict(task.query_x), expected[number, -1])
            torch.testing.assert_close(adapted.module(module).eval()(task.query_x), expected[number, -1])


@pytest.mark.parametrize("init", HEADS)
def test_a_learner_that_is_all_head_learns_its_rates_alone(init):
    module, batch = made(nn.Linear(3, 3)), labelled()
    for engine in ENGINES:
        maml = MAML(
            module,
            F.cross_entropy,
            inner_lr=LR,
            steps=STEPS,
            head_init=init,
            inner_rates="element",
            engine=engine,
        )
        parameters = maml.initial_parameters()
        assert parameters.keys() == {RATE + "weight", RATE + "bias"}
        result = maml.meta_gradient(parameters, batch)

        def head(module, leaves, task, key):
            if init == "zero":
                return {n: torch.zeros_like(p).requires_grad_() for n, p in module.named_parameters()}
            found = prototypes_of(nn.Identity(), {}, task.support_x, task.support_y, 3)
            return {n.removeprefix("head."): w.requires_grad_() for n, w in found.items()}

        expected, *_ = plain_loop(
            module, F.cross_entropy, batch, leaves=parameters, head=head,
        )  # fmt: skip
        assert_same(result.gradients, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_init": "prototype", "optimizer": InnerOptimizer(0, proximal=1.0)}, "no proximal term"),
        ({"head_init": "zero", "fast_weights": "body"}, "inner loop adapts"),
        ({"head_init": "zero", "meta_gradient": "joint"}, "without an inner loop"),
        ({"head_init": "ones"}, "head_init"),
    ],
)
def test_a_head_that_could_not_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MAML(classifier(), F.cross_entropy, inner_lr=LR, **HEAD, **options)


# ---- predictions, and putting to use --------------------------------------------------------


@pytest.mark.parametrize("adapt_norm", [True, False])
def test_predictions_and_adapted_modules_are_those_of_a_plain_loop(adapt_norm):
    module = made(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(),
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2),
        )
    )  # fmt: skip
    batch = images()
    maml = MAML(module, F.mse_loss, inner_lr=LR, adapt_norm=adapt_norm)
    parameters = maml.initial_parameters()
    adapted_names = [n for n in parameters if adapt_norm or n.split(".")[0] not in ("1", "4")]
    before = state_of(module, maml.learner)
    both = maml.predictions(parameters, batch, STEPS, ("transductive", "inductive"))
    expected = plain_predictions(module, F.mse_loss, parameters, batch, adapted=adapted_names)
    torch.testing.assert_close(both["transductive"], expected)
    assert (both["inductive"] - expected).abs().max() > 1e-2
    for number, task in enumerate(tasks_of(batch)):
        own = copy.deepcopy(module)
        start = {n: w.clone().requires_grad_() for n, w in parameters.items()}
        wanted = [
            inductive(own, fast, task.support_x, task.query_x)
            for fast in inner_loop(
                own, F.mse_loss, start, adapted_names, task.support_x, task.support_y, steps=STEPS
            )
        ]
        torch.testing.assert_close(both["inductive"][number], torch.stack(wanted))
        adapted = adapt_to(maml, parameters, task.support_x, task.support_y, steps=STEPS)
        torch.testing.assert_close(adapted.predict(task.query_x), wanted[-1])
        module_of_task = adapted.module(module)
        torch.testing.assert_close(module_of_task.eval()(task.query_x), wanted[-1])
        torch.testing.assert_close(module_of_task(task.query_x[:1]), wanted[-1][:1])  # one query at a time
        transductive = adapt_to(
            maml, parameters, task.support_x, task.support_y, steps=STEPS, normalisation="transductive"
        )
        torch.testing.assert_close(transductive.predict(task.query_x), expected[number, -1])
    after = state_of(module, maml.learner)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_residual_network_of_torchvision_is_as_in_a_plain_loop():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = models.resnet18(num_classes=2).double()
    assert (
        sum(isinstance(m, BatchNorm) for m in MAML(network, F.cross_entropy, inner_lr=LR).learner.modules())
        == 20
    )
    labels = torch.arange(2).repeat_interleave(2).expand(TASKS, -1)
    batch = TaskBatch(
        random(TASKS, 4, 3, 32, 32, seed=1), labels, random(TASKS, 4, 3, 32, 32, seed=2), labels
    )
    assert_is_the_plain_loops(network, batch, loss=F.cross_entropy, orders=(False,), steps=1, tolerance=1e-7)

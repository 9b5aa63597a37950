"""Learners of every kind of layer, buffer, input, output and loss match a plain loop."""

import copy
import typing
from dataclasses import replace

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
    convolutions,
    distance,
    filled,
    images,
    integers,
    layers,
    meta_gradient,
    normal,
    plain_loop,
    plain_predictions,
    vectors,
)
from torch import nn
from torch.nn import functional as F

from common.batch import TaskBatch
from learners.batch_norm import BatchNorm
from learners.heads import head_names
from learners.losses import LOSSES

TOKENS = 7


# ---- learners, one of each kind -------------------------------------------------------------


class Constant(nn.Module):
    """Divide by a size that counts as a constant, written in one of three ways."""

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


def sentences(*, language: bool = False) -> TaskBatch:
    batch = vectors(1)
    x = [integers(TOKENS, TASKS, EXAMPLES, 4, seed=seed) for seed in (1, 2)]
    y = [integers(TOKENS, TASKS, EXAMPLES, seed=seed) for seed in (3, 4)]
    y = y if language else [batch.support_y, batch.query_y]
    return TaskBatch(x[0], y[0], x[1], y[1])


def places() -> TaskBatch:
    """A target for each place of a sequence: `[tasks, examples, 6, 2]`."""
    x, _, more, _ = vectors(6, 3)
    return TaskBatch(x, x[..., :2].sin(), more, more[..., :2].sin())


def without_statistics() -> nn.Module:
    return layers(nn.BatchNorm1d(4, affine=False, track_running_stats=False))


KINDS = {
    "batch norm of sequences": (lambda: layers(nn.BatchNorm1d(6)), places),
    "batch norm of images": (lambda: convolutions(nn.BatchNorm2d(4)), images),
    "batch norm, no statistics": (without_statistics, lambda: vectors(3)),
    "instance norm, running": (lambda: convolutions(nn.InstanceNorm2d(4, track_running_stats=True)), images),
    "tied": (Tied, lambda: sentences(language=True)),
    "frozen": (lambda: frozen(layers(nn.BatchNorm1d(4)), "0.weight", "1.bias"), lambda: vectors(3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_meta_gradient_and_predictions_of_any_learner_match_a_plain_loop(kind):
    module, batch = (make() for make in KINDS[kind])
    module, loss = filled(module), F.cross_entropy if kind == "tied" else F.mse_loss
    assert_matches_plain_loop(module, batch, loss=loss)
    maml = algorithm(module, loss)
    parameters = maml.initial_parameters()
    assert parameters.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    outputs = maml.predictions(parameters, batch, STEPS)["transductive"]
    torch.testing.assert_close(outputs, plain_predictions(module, loss, batch))


@pytest.mark.parametrize(
    ("way", "vectorise"),
    [("detach", True), ("detach", False), ("no_grad", True), ("no_grad", False), ("data", False)],
)
def test_a_constant_in_the_learner_is_one_in_every_derivative(way, vectorise):
    assert_matches_plain_loop(filled(layers(Constant(way))), vectors(3), vectorise=vectorise)


def used_twice(layer: nn.Module) -> nn.Module:
    return layers(layer, nn.Tanh(), layer)


def used_twice_and_tied() -> nn.Module:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    return layers(other, nn.Tanh(), layer, nn.Tanh(), layer)


SHARED = {
    "linear": lambda: used_twice(nn.Linear(4, 4)),
    "batch norm": lambda: used_twice(nn.BatchNorm1d(4)),
    "tied too": used_twice_and_tied,
}


@pytest.mark.parametrize("vectorise", [True, False])
@pytest.mark.parametrize("kind", SHARED)
def test_a_module_that_is_used_twice_has_the_gradient_of_both_uses_and_keeps_its_tensors(kind, vectorise):
    module = filled(SHARED[kind]())
    assert_matches_plain_loop(module, vectors(3), vectorise=vectorise)
    maml = algorithm(module, vectorise=vectorise)
    before = dict(maml.learner.named_parameters(remove_duplicate=False))
    maml.meta_gradient(maml.initial_parameters(), vectors(3))
    after = dict(maml.learner.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)


def test_a_head_that_is_used_twice_cannot_be_computed():
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="not one linear layer with a bias"):
        algorithm(nn.Sequential(layer, nn.Tanh(), layer), F.cross_entropy, head_init="prototype")


def test_a_constant_in_the_loss_is_one_in_every_derivative():
    def loss(outputs, targets):  # the worst examples count most
        with torch.no_grad():
            shares = (outputs - targets).square().sum(1).softmax(0)
        return (shares * (outputs - targets).square().sum(1)).sum()

    assert_matches_plain_loop(filled(layers()), vectors(3), loss=loss)


@pytest.mark.parametrize("adapt_norm", [True, False])
def test_transductive_and_inductive_predictions_match_a_plain_loop(adapt_norm):
    parts = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()]
    parts += [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)]
    module = filled(nn.Sequential(*parts))
    maml = algorithm(module, adapt_norm=adapt_norm)
    adapted = [n for n in maml.initial_parameters() if adapt_norm or n.split(".")[0] not in ("1", "4")]
    both = maml.predictions(maml.initial_parameters(), images(), STEPS, ("transductive", "inductive"))
    for normalisation, outputs in both.items():
        expected = plain_predictions(
            module, F.mse_loss, images(), adapted=adapted, normalisation=normalisation
        )
        torch.testing.assert_close(outputs, expected)
    assert (both["inductive"] - both["transductive"]).abs().max() > 1e-2


# ---- parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_goes_by_its_first_name_and_cannot_be_computed(bias):
    module, batch = filled(Tied(bias=bias)), sentences(language=True)
    head = {"embedding.weight"} | ({"out.bias"} if bias else set())
    assert head_names(module) == head
    assert_matches_plain_loop(module, batch, loss=F.cross_entropy, adapted=sorted(head), fast_weights="head")
    for init in ("zero", "prototype"):  # the embeddings would go with it
        with pytest.raises(ValueError, match="not one linear layer with a bias"):
            algorithm(module, F.cross_entropy, head_init=init)


class Unused(nn.Module):
    """One layer that is never called, and one whose outputs the loss ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never, self.ignored = layers(), nn.Linear(2, 2), nn.Linear(3, 1)

    def forward(self, x):
        return {"used": self.body(x), "ignored": self.ignored(x)}


def test_parameters_that_do_not_reach_the_loss_have_a_gradient_of_zero():
    module, batch = filled(Unused()), vectors(3)

    def loss(outputs, targets):
        return F.mse_loss(outputs["used"], targets)

    assert_matches_plain_loop(module, batch, loss=loss)
    for engine in ENGINES:
        gradients = meta_gradient(algorithm(module, loss), batch, engine).gradients
        zero = {n for n, g in gradients.items() if not g.any()}
        assert zero == {f"{layer}.{p}" for layer in ("never", "ignored") for p in ("weight", "bias")}


# ---- inputs and outputs ---------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Numbers, and a token for each example; outputs are a tensor, a tuple or a dictionary."""

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
    """Use both outputs: a Gaussian's mean and the logarithm of its width."""
    mean, width = outputs if isinstance(outputs, tuple) else (outputs["mean"], outputs["scale"])
    return (width + 0.5 * (targets - mean) ** 2 * torch.exp(-2 * width)).mean()


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs_come_as_a_tuple_or_by_name(kind):
    module, batch = filled(TwoInputs()), two_inputs(kind)
    assert_matches_plain_loop(module, batch)
    maml = algorithm(module)
    both = maml.predictions(maml.initial_parameters(), batch, STEPS, ("transductive", "inductive"))
    for outputs in both.values():  # without batch norm they are the same
        torch.testing.assert_close(outputs, plain_predictions(module, F.mse_loss, batch))


@pytest.mark.parametrize("options", [{}, {"tasks_at_once": 1}, {"batch_norm": "inductive"}])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_outputs_all_reach_the_loss(kind, options):
    module, batch = filled(TwoInputs(kind)), two_inputs("tuple")
    assert_matches_plain_loop(module, batch, loss=likelihood, orders=("exact",), **options)


def test_several_targets_all_reach_the_loss():
    module, batch = filled(TwoInputs("tuple")), two_inputs("tuple")
    batch = replace(
        batch, support_y=(batch.support_y, batch.support_x[1]), query_y=(batch.query_y, batch.query_x[1])
    )

    def loss(outputs, targets):
        return F.mse_loss(outputs[0], targets[0]) + F.mse_loss(outputs[1][:, 0], targets[1].double() / TOKENS)

    assert_matches_plain_loop(module, batch, loss=loss)


# ---- without vmap ---------------------------------------------------------------------------


class DataDependent(nn.Module):
    """Choose a layer by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        layer = self.layer if x.mean().item() > 0 else self.other
        return self.out(layer(x / x.std().item()).tanh())


def test_a_learner_that_decides_by_values_is_trained_one_task_at_a_time():
    module, batch = filled(DataDependent()), vectors(3)
    shift = torch.tensor([1.0, -1.0]).view(2, 1, 1)  # so that tasks go different ways
    batch = replace(batch, support_x=batch.support_x + shift)
    assert_matches_plain_loop(module, batch, vectorise=False)
    for engine in ENGINES:
        with pytest.raises(RuntimeError, match="item"):
            meta_gradient(algorithm(module), batch, engine)


# ---- dropout --------------------------------------------------------------------------------

DROPOUT = {
    "plain": (lambda: layers(nn.Dropout(0.4)), lambda: vectors(3)),
    "channels": (lambda: convolutions(nn.Dropout2d(0.4)), images),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_a_function_of_the_keys(kind):
    module, batch = (make() for make in DROPOUT[kind])
    module = filled(module)
    assert_matches_plain_loop(module, batch, keys=KEYS)
    maml = algorithm(module)
    parameters = maml.initial_parameters()
    for engine in ENGINES:
        first, again, other = (
            meta_gradient(maml, batch, engine, keys=keys).gradients for keys in (KEYS, KEYS, KEYS + 2)
        )
        assert all(torch.equal(g, again[n]) for n, g in first.items())
        assert distance(other, first) > 1e-2
        chunks = meta_gradient(maml.with_options(tasks_at_once=1), batch, engine, keys=KEYS).gradients
        assert_close(chunks, first, 1e-11)
        with pytest.raises(ValueError, match="give keys"):
            meta_gradient(maml, batch, engine)
    with pytest.raises(ValueError, match="give keys"):
        maml.predictions(parameters, batch, 1)
    maml.predictions(parameters, batch, 0)  # the query draws nothing


class Watched(nn.Module):
    """Dropout that remembers its masks, where no pass is undone."""

    masks: typing.ClassVar[list] = []

    def forward(self, x):
        mask = F.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks.append(tuple((mask > 0).flatten().tolist()))
        return x * mask


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_differ_by_task_step_and_pass_and_the_adjoint_draws_them_again(engine):
    maml, masks = algorithm(filled(layers(Watched())), vectorise=False), Watched.masks
    masks.clear()
    meta_gradient(maml, vectors(3), engine, keys=KEYS)
    back = TASKS * STEPS if engine == "adjoint" else 0
    assert len(set(masks)) == TASKS * (STEPS + 1) == len(masks) - back


def test_predictions_apply_dropout_in_the_inner_loop_and_not_in_the_query():
    module, batch = filled(layers(nn.Dropout(0.4))), vectors(3)
    maml = algorithm(module)
    outputs = maml.predictions(maml.initial_parameters(), batch, STEPS, ("transductive",), keys=KEYS)
    expected = plain_predictions(module, F.mse_loss, batch, keys=KEYS)
    torch.testing.assert_close(outputs["transductive"], expected)
    assert (expected - plain_predictions(module, F.mse_loss, batch, keys=KEYS + 2)).abs().max() > 1e-3
    at_start = torch.stack([copy.deepcopy(module).eval()(x) for x in batch.query_x])
    torch.testing.assert_close(outputs["transductive"][:, 0], at_start)


# ---- losses ---------------------------------------------------------------------------------


def bce_of_classes(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, F.one_hot(targets, 3).double())


def nll_of_pytorch(outputs, targets):
    mean, raw = outputs[:, :3], outputs[:, 3:]
    return F.gaussian_nll_loss(mean, targets, F.softplus(raw) + 1e-4, full=True)


CLASSES = [integers(3, TASKS, EXAMPLES, seed=seed) for seed in (5, 6)]
BITS = [(normal(TASKS, EXAMPLES, 3, seed=seed) > 0).double() for seed in (5, 6)]
FAR = [3 * normal(TASKS, EXAMPLES, 3, seed=seed) for seed in (5, 6)]  # errors on both sides of Huber's 1
WHOLE = [target.long() for target in FAR]
LOSS_CASES = {
    "mse": ("mse", F.mse_loss, FAR),
    "cross-entropy": ("cross-entropy", F.cross_entropy, CLASSES),
    "bce of classes": ("bce", bce_of_classes, CLASSES),
    "bce of numbers": ("bce", F.binary_cross_entropy_with_logits, BITS),
    "huber": ("huber", F.huber_loss, FAR),
    "huber of whole numbers": ("huber", lambda y, target: F.huber_loss(y, target.double()), WHOLE),
    "mse of whole numbers": ("mse", lambda y, target: F.mse_loss(y, target.double()), WHOLE),
    "gaussian-nll": ("gaussian-nll", nll_of_pytorch, FAR),
}


@pytest.mark.parametrize("case", LOSS_CASES)
def test_each_loss_is_pytorchs(case):
    assert {name for name, *_ in LOSS_CASES.values()} == LOSSES.keys()
    name, theirs, targets = LOSS_CASES[case]
    outputs = 6 if name == "gaussian-nll" else 3
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))
    batch = replace(vectors(3), support_y=targets[0], query_y=targets[1])
    for order in ORDERS:
        expected, values, _ = plain_loop(module, theirs, batch, order=order)
        for engine in ENGINES:
            result = meta_gradient(algorithm(module, LOSSES[name], meta_gradient=order), batch, engine)
            assert_close(result.gradients, expected)
            torch.testing.assert_close(result.losses, values)


# ---- torchvision ----------------------------------------------------------------------------


def test_a_residual_network_of_torchvision_matches_a_plain_loop():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = models.resnet18(num_classes=2).double()
    converted = algorithm(network, F.cross_entropy).learner.modules()
    assert sum(isinstance(layer, BatchNorm) for layer in converted) == 20
    labels = torch.arange(2).repeat_interleave(2).expand(TASKS, -1)
    x = [normal(TASKS, 4, 3, 32, 32, seed=seed) for seed in (1, 2)]
    batch = TaskBatch(x[0], labels, x[1], labels)
    assert_matches_plain_loop(
        network, batch, loss=F.cross_entropy, orders=("exact",), steps=1, tolerance=1e-7
    )

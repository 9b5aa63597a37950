"""Substituted functions: values, derivatives and random numbers; and the layer that a diagnosis names."""

import copy
import math

import pytest
import torch
from plain_loop import KEYS, TASKS, assert_matches_plain_loop, normal
from torch import nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from common.batch import TaskBatch
from learners.diagnosis import find_failure
from learners.elementary import Elementary
from learners.functional import FunctionalLearner


def tensors(outputs) -> list:
    if isinstance(outputs, tuple):
        return [tensor for part in outputs for tensor in tensors(part)]
    return [] if outputs is None else [outputs]


def curved(outputs, targets=None) -> torch.Tensor:
    """Return a number that depends on all outputs, with derivatives of every order."""
    return sum((t * t.cos() + 0.1 * t**3).sum() for t in tensors(outputs))


class Apply(nn.Module):
    """Apply a function to the input times one weight, `[8]`, along the last axis."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.linspace(0.8, 1.2, 8))

    def forward(self, x):
        return self.function(x * self.weight)


class Attention(nn.MultiheadAttention):
    """Attend from `x` to other positions of `x`; keys and values may have fewer features."""

    def __init__(self, *arguments, call, **options):
        super().__init__(*arguments, **options)
        self.call = call

    def forward(self, x):
        return super().forward(x, x.roll(1, 0)[..., : self.kdim], x[..., : self.vdim] ** 2, **self.call)


def attention(call=None, **options) -> nn.Module:
    return Attention(8, 2, call=call or {}, **options)


def product_attention(**options) -> nn.Module:
    def function(x):
        heads = x.unflatten(-1, (4, 2)).permute(1, 2, 0, 3)  # [batch, heads, length, features]
        keys = heads[:, :2] if options.get("enable_gqa") else heads
        return F.scaled_dot_product_attention(heads, keys.roll(1, -2), keys**2, **options)

    return Apply(function)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3, padding_idx=1)
        nn.init.normal_(self.embedding.weight)

    def forward(self, x):
        return self.embedding((x > 0).long() + (x > 1))


class Written(nn.Module):
    """Fill a tensor that the pass has allocated."""

    def forward(self, x):
        outputs = torch.zeros(4, 2, 8, dtype=x.dtype)
        for time in range(len(x)):
            outputs[time] = x[time] * (outputs[time - 1] + 1.0)
        return outputs


class Calling(nn.Module):
    """Call a module with what a function makes of x; outputs are a tuple of tensors."""

    def __init__(self, module, arguments=lambda x: (x,)):
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x):
        return tuple(tensors(self.module(*self.arguments(x))))


def example(module: nn.Module) -> nn.Module:
    """Return the module on the first example of the batch, without the batch axis."""
    return Calling(module, lambda x: (x[:, 0],))


CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True]])
ATTENTION = {
    "attention by head, masked": lambda: attention(
        {"average_attn_weights": False, "attn_mask": CAUSAL, "key_padding_mask": PADDING}, bias=False
    ),
    "attention, three-dimensional mask": lambda: attention({"attn_mask": normal(4, 4, 4)}),
    "attention, causal": lambda: attention({"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "attention, batch first": lambda: attention({"key_padding_mask": None}, batch_first=True),
    "attention, other features": lambda: attention(kdim=5, vdim=3),
    "attention, one example": lambda: example(
        attention({"attn_mask": CAUSAL, "key_padding_mask": PADDING[1]})
    ),
    "product, causal": lambda: product_attention(is_causal=True),
    "product, masked row": lambda: product_attention(attn_mask=torch.arange(4)[:, None] > torch.arange(4)),
    "product, grouped heads": lambda: product_attention(enable_gqa=True, scale=0.3),
    "encoder and decoder": lambda: Calling(
        nn.Transformer(8, 2, 1, 1, 12, dropout=0.0), lambda x: (x, x.roll(1, 0))
    ),
}
RECURRENT = {
    "lstm, projected": lambda: nn.LSTM(8, 5, num_layers=2, proj_size=3, bidirectional=True, batch_first=True),
    "lstm, no bias": lambda: nn.LSTM(8, 3, proj_size=2, bias=False),
    "gru": lambda: nn.GRU(8, 3, num_layers=2, bidirectional=True),
    "rnn": lambda: nn.RNN(8, 3, bias=False),
    "rnn, relu": lambda: nn.RNN(8, 3, nonlinearity="relu"),
}
CELLS = {
    "lstm cell": lambda: nn.LSTMCell(8, 3),
    "gru cell": lambda: nn.GRUCell(8, 3, bias=False),
    "rnn cell, relu": lambda: nn.RNNCell(8, 3, nonlinearity="relu"),
}
OTHERS = {
    "layer norm of two axes": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm([2, 8])),
    "padded embedding": lambda: Embedded(),
    "written to": lambda: Apply(Written()),
}
ALL = ATTENTION | RECURRENT | CELLS | OTHERS


def assert_both_engines_match(module: nn.Module, inputs: torch.Tensor, **options) -> None:
    """Compare with a plain loop; inputs are those of support and query, `[2, tasks, ...]`."""
    batch = TaskBatch(inputs[0], torch.zeros(TASKS), inputs[1], torch.zeros(TASKS))
    assert_matches_plain_loop(module, batch, loss=curved, orders=("exact",), steps=1, **options)


@pytest.mark.parametrize("name", ALL)
def test_both_engines_match_a_plain_loop(name):
    torch.manual_seed(1)
    module = Calling(ALL[name]()).double()
    inputs = normal(2, TASKS, 2, 8) if "cell" in name else normal(2, TASKS, 4, 2, 8)
    batch_first = "batch first" in name or "projected" in name
    assert_both_engines_match(module, inputs.transpose(2, 3) if batch_first else inputs)


def test_an_encoder_in_evaluation_takes_no_shortcut():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).double().eval()
    inputs, padding = normal(TASKS, 2, 4, 8), PADDING.expand(TASKS, -1, -1)

    def forward(x, padding):
        with Elementary():
            return module(x, src_key_padding_mask=padding)

    with torch.no_grad():
        outputs = vmap(forward)(inputs, padding)
        expected = torch.stack([module(x, src_key_padding_mask=PADDING) for x in inputs])
    # PyTorch's shortcut puts zeros where there is padding
    assert torch.allclose(outputs[~padding], expected[~padding], atol=1e-12)


# ---- random numbers -------------------------------------------------------------------------


def draw(function, keys=KEYS, x=None) -> torch.Tensor:
    """Return the function of x `[tasks, ...]`, with a key for each task."""

    def run(key, x):
        with Elementary(key):
            return function(x)

    x = torch.ones(TASKS, 4, 50) if x is None else x
    return vmap(run)(keys, x)


def test_masks_depend_on_task_call_and_keys_alone():
    def twice(x):
        return torch.stack([F.dropout(x), F.dropout(x)])

    masks = draw(twice)
    assert len({tuple(mask.flatten().tolist()) for mask in masks.flatten(0, 1)}) == 2 * TASKS
    assert torch.equal(masks, draw(twice))
    for changed in (KEYS + torch.tensor([1, 0]), KEYS + torch.tensor([0, 1])):
        assert not torch.equal(masks, draw(twice, changed))
    for task, key in enumerate(KEYS):
        with Elementary(key) as mode:
            assert torch.equal(twice(torch.ones(4, 50)), masks[task])
        assert mode.draws.calls == 2
    traced = make_fx(lambda keys: draw(twice, keys))(KEYS)  # as a compiler sees it
    assert torch.equal(traced(KEYS + 7), draw(twice, KEYS + 7))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (F.dropout1d, (2, 9, 5)),
        (F.dropout2d, (2, 9, 20)),  # three axes are a batch here
        (F.dropout3d, (2, 9, 5, 4, 3)),
        (F.dropout1d, (9, 5)),
    ],
)
def test_dropout_drops_whole_channels(function, shape):
    dropped = draw(function, x=torch.ones(TASKS, *shape))
    channels = dropped.flatten(1 + shape.index(9) + 1).flatten(0, -2)  # [channels, positions]
    assert (channels == channels[:, :1]).all() and len(channels[:, 0].unique()) == 2


def test_dropout_is_the_identity_at_0_and_in_evaluation_and_zero_at_1():
    x = normal(3, 4, 5)
    with Elementary() as mode:
        for p, training in ((0.5, False), (0.0, True)):
            assert torch.equal(F.dropout(input=x, p=p, training=training), x)
            assert torch.equal(F.dropout1d(x, p, training), x)
        assert not F.dropout(x, 1.0).any() and not F.dropout2d(x, 1.0).any()
    assert mode.draws.calls == 0


def fill(x):
    """Change x itself, whatever the call returns."""
    x.bernoulli_(0.25)
    return x


DRAWING = {  # function, mean, standard deviation
    "uniform": (lambda x: torch.rand(4, 5000), 0.5, 12**-0.5),
    "dropout": (lambda x: F.dropout(torch.ones_like(x), 0.3), 1.0, (0.3 / 0.7) ** 0.5),
    "uniform alike": (torch.rand_like, 0.5, 12**-0.5),
    "uniform in half precision": (lambda x: torch.rand_like(x, dtype=torch.bfloat16), 0.5, 12**-0.5),
    "normal": (lambda x: torch.randn((4, 5000), dtype=x.dtype), 0.0, 1.0),
    "normal alike": (torch.randn_like, 0.0, 1.0),
    "filled, Bernoulli": (lambda x: fill(torch.empty(4, 5000)), 0.25, 0.1875**0.5),
    "Bernoulli": (torch.bernoulli, 0.25, 0.1875**0.5),
    "Bernoulli, method": (lambda x: x.bernoulli(), 0.25, 0.1875**0.5),
}


@pytest.mark.parametrize("name", DRAWING)
def test_numbers_have_their_distribution_and_differ_between_tasks(name):
    function, mean, deviation = DRAWING[name]
    values = draw(function, x=torch.full((TASKS, 4, 5000), 0.25)).double()
    assert not torch.equal(values[0], values[1])
    assert values.mean().item() == pytest.approx(mean, abs=0.02)
    assert values.std().item() == pytest.approx(deviation, abs=0.02)
    assert "uniform" not in name or values.max() < 1


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_dropout_within_a_layer_depends_on_the_keys_in_both_engines(name):
    module = attention(dropout=0.4) if name == "attention" else nn.LSTM(8, 3, num_layers=2, dropout=0.4)
    module, inputs = Calling(module).double(), normal(2, TASKS, 4, 2, 8)
    assert_both_engines_match(module, inputs, keys=KEYS)
    first, second = draw(lambda x: module(x)[0], x=inputs[0, :1].expand(TASKS, -1, -1, -1))
    assert not torch.equal(first, second)


WITH_ZERO = nn.MultiheadAttention(2, 1, add_zero_attn=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (F.dropout, "give keys"),
        (torch.rand_like, "give keys"),
        (lambda x: torch.randperm(3), "randperm draws random numbers in a way"),
        (lambda x: x.normal_(), "normal_ draws"),
        (F.gumbel_softmax, "gumbel_softmax draws"),
        (lambda x: F.embedding(x.long(), x[0], max_norm=1.0), "max_norm"),
        (lambda x: F.embedding_bag(x[0].long(), x[0]), "average rows of nn.Embedding"),
        (lambda x: F.one_hot(x.long()), "give num_classes"),
        (lambda x: torch.ops.aten.normal_(x), "normal_ draws"),
        (lambda x: x.requires_grad_(), "use torch.func.grad"),
        (lambda x: torch.autograd.grad(x.sum(), x), "use torch.func.grad"),
        (lambda x: WITH_ZERO(x, x, x), "without add_bias_kv"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, x > 0, is_causal=True), "not both"),
        (lambda x: nn.LSTM(2, 1)(nn.utils.rnn.pack_sequence([x[0]])), "PackedSequence"),
    ],
)
def test_a_function_that_cannot_be_substituted_is_refused_in_one_line(function, message):
    with Elementary(), torch.no_grad(), pytest.raises(ValueError, match=message):
        function(torch.ones(2, 2, 2))


# ---- diagnosis ------------------------------------------------------------------------------


class OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubed(nn.Module):
    def forward(self, x):
        return OnceDifferentiable.apply(x)


@pytest.mark.parametrize(
    ("faulty", "layer", "kind", "problem", "reason"),
    [
        (Cubed(), "", "Sequential", "second derivative", "once_differentiable"),
        (nn.Dropout(), "1.0", "Dropout", "forward pass", "give keys"),
    ],
)
def test_a_diagnosis_names_the_problem_and_the_layer_that_fails(faulty, layer, kind, problem, reason):
    learner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(copy.deepcopy(faulty), nn.Tanh())).double()
    before = copy.deepcopy(learner.state_dict())
    finding = find_failure(FunctionalLearner(learner), normal(4, 2, 8), None, vmap)
    assert (finding.layer, finding.kind, finding.problem) == (layer, kind, problem)
    assert reason in finding.reason and len(finding.reason) <= 160 and "\n" not in finding.reason
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learner.modules())


def test_a_diagnosis_finds_nothing_in_a_sound_learner():
    learner = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 12), nn.Dropout(), nn.ReLU(inplace=True)
    ).double()
    assert find_failure(FunctionalLearner(learner), normal(4, 2, 8), KEYS[0], vmap) is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4)])
def test_smoothed_cross_entropy_with_class_weights_is_pytorchs(shape, reduction):
    logits, weight = normal(2, *shape), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    labels = torch.arange(math.prod(shape) // 3 * 2).reshape(2, shape[0], *shape[2:]) % 3
    labels[:, 0] = -100

    def loss(logits, labels):
        return F.cross_entropy(logits, labels, weight, reduction=reduction, label_smoothing=0.1)

    with Elementary():
        ours = vmap(loss)(logits, labels)
    expected = torch.stack([loss(*task) for task in zip(logits, labels, strict=True)])
    torch.testing.assert_close(ours, expected)

"""A learner's forward pass, carried out from elementary operations alone.

Meta-learning differentiates a forward pass twice, under `vmap`, and must be able to draw the same random
numbers again. Fused functions stand in the way: PyTorch's kernels of attention have no second derivative,
those of recurrent networks no rule for `vmap`, and random numbers come from a hidden state. Within
`Elementary` each such function is replaced by one of this file, which does the same out of products, sums
and elementwise functions; any other function runs as it is. The module is not touched.

    with Elementary(keys):
        outputs = functional_call(learner, weights, (x,))

The functions here take the mode and then the arguments of the one that they stand for. The mode is off while
they run: what they call is not replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from common.random import Stream

Replacement = Callable[..., Any]

_REPLACEMENTS: dict[Any, Replacement] = {}


class Elementary(TorchFunctionMode):
    """The mode in which functions are replaced; enter a new one for each forward pass.

    Arguments:
        keys: int64 `[2]`, two 32-bit words that stand for all that the random numbers are to depend on (seed,
            task, pass); of one task, where `vmap` goes over tasks. None: a pass that draws is refused.
        like: of one task, where `vmap` goes over tasks: what the pass allocates (`torch.zeros`, say) becomes
            one tensor for each task too, and so may be written to. None: `keys` serve.

    Each random number is a function of `keys`, of the number of the drawing call within the pass, and of the
    position in what is drawn. Raises ValueError where a function draws and there are no keys, and for
    functions that cannot be replaced; it says what to do.
    """

    def __init__(self, keys: Tensor | None = None, like: Tensor | None = None) -> None:
        super().__init__()
        self.keys = keys
        self.like = keys if like is None else like
        self.draws = 0  # drawing calls so far

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return replacement(self, *args, **kwargs or {})

    # ---- random numbers ---------------------------------------------------------------------

    def bits(self, count: int, name: str) -> Tensor:
        """24 random bits each, int64 `[count]`, for a function of that name."""
        if self.keys is None:
            raise ValueError(f"{name} draws random numbers: give keys")
        call = self.draws
        self.draws += 1
        return words(self.keys, call, count) >> 8

    def uniform(self, like: Tensor, name: str) -> Tensor:
        """In [0, 1), of that tensor's shape, type and device."""
        held = min(24, 1 - round(math.log2(torch.finfo(like.dtype).eps)))  # more bits would round to 1
        bits = self.bits(like.numel(), name).to(like.device) >> (24 - held)
        return (bits.to(like.dtype) * 2.0**-held).view(like.shape)

    def normal(self, like: Tensor, name: str) -> Tensor:
        """Standard normal, of that tensor's shape, type and device (Box and Muller's transform)."""
        bits = self.bits(2 * like.numel(), name).to(like.device)
        radius, angle = (bits.to(_wide(like.dtype)) * 2.0**-24).chunk(2)
        values = torch.sqrt(-2.0 * torch.log1p(-radius)) * torch.cos(2.0 * math.pi * angle)
        return values.to(like.dtype).view(like.shape)

    def kept(self, p: float, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """1 with probability 1 - p and 0 elsewhere: the same whatever the type."""
        bits = self.bits(math.prod(shape), name).to(like.device)
        return (bits >= round(p * 2**24)).to(like.dtype).view(shape)


_NOTHING_TO_REPLACE = (nn.Sequential, nn.Linear, nn.Conv2d, nn.ReLU, nn.Tanh, nn.Flatten, nn.MaxPool2d)


def is_elementary(module: nn.Module) -> bool:
    """Whether a module is made of layers in which nothing is replaced.

    Then the mode, and the few percent of a small network's time that it costs, can be done without. Layers of
    our own say so by an attribute `elementary`.
    """
    return all(
        type(layer) in _NOTHING_TO_REPLACE or getattr(type(layer), "elementary", False)
        for layer in module.modules()
    )


class NoGradHolds(TorchFunctionMode):
    """Within it, what is computed under `torch.no_grad` has no derivative in forward mode either."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **kwargs or {})
        with _set_fwd_grad_enabled(False):
            return func(*args, **kwargs or {})


def words(keys: Tensor, call: int, count: int) -> Tensor:
    """32-bit words in int64, `[count]`, of the drawing call of that number; all different.

    `keys`: int64 `[2]`, 32-bit words.
    """
    return Stream.from_keys(keys).at(call).words(count)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in where half precision would not do."""
    return torch.promote_types(dtype, torch.float32)


def _replaces(*functions: Any) -> Callable[[Replacement], Replacement]:
    def register(replacement: Replacement) -> Replacement:
        _REPLACEMENTS.update(dict.fromkeys(functions, replacement))
        return replacement

    return register


# ---- dropout --------------------------------------------------------------------------------
#
# Never in place: what is dropped from may be shared by the tasks, the mask is not.


def _dropped(mode: Elementary, x: Tensor, p: float, train: bool, shape: Sequence[int], name: str) -> Tensor:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0.0 or not train:
        return x
    if p == 1.0:
        return x * 0.0
    return x * (mode.kept(p, shape, x, name) / (1.0 - p))


def _alpha_dropped(
    mode: Elementary, x: Tensor, p: float, train: bool, shape: Sequence[int], name: str
) -> Tensor:
    """Dropped to the value that SELU saturates at, and brought back to mean 0 and variance 1."""
    if p in (0.0, 1.0) or not train:
        return _dropped(mode, x, p, train, shape, name)
    saturation = -1.7580993408473766
    scale = ((1.0 - p) * (1.0 + p * saturation**2)) ** -0.5
    kept = mode.kept(p, shape, x, name)
    return scale * (x * kept + saturation * (1.0 - kept) - saturation * p)


def _channels(x: Tensor) -> tuple[int, ...]:
    """One number for each channel of `[batch, channels, ...]`."""
    return (*x.shape[:2], *(1,) * (x.dim() - 2))


@_replaces(F.dropout)
def _dropout(
    mode: Elementary, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropped(mode, input, p, training, input.shape, "dropout")


@_replaces(torch.dropout, torch.dropout_)
def _torch_dropout(mode: Elementary, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropped(mode, input, p, train, input.shape, "dropout")


@_replaces(torch.feature_dropout, torch.feature_dropout_)
def _feature_dropout(mode: Elementary, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropped(mode, input, p, train, _channels(input), "feature_dropout")


@_replaces(F.dropout2d)
def _dropout2d(
    mode: Elementary, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropped(mode, input, p, training, _channels(input), "dropout2d")


def _dropout_of_channels(unbatched: int, name: str) -> Replacement:
    def dropout(
        mode: Elementary, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if input.dim() == unbatched:
            return dropout(mode, input.unsqueeze(0), p, training).squeeze(0)
        return _dropped(mode, input, p, training, _channels(input), name)

    return dropout


_replaces(F.dropout1d)(_dropout_of_channels(2, "dropout1d"))
_replaces(F.dropout3d)(_dropout_of_channels(4, "dropout3d"))


@_replaces(F.alpha_dropout)
def _alpha_dropout(
    mode: Elementary, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(mode, input, p, training, input.shape, "alpha_dropout")


@_replaces(torch.alpha_dropout, torch.alpha_dropout_)
def _torch_alpha_dropout(mode: Elementary, input: Tensor, p: float, train: bool) -> Tensor:
    return _alpha_dropped(mode, input, p, train, input.shape, "alpha_dropout")


@_replaces(F.feature_alpha_dropout)
def _feature_alpha_dropout(
    mode: Elementary, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(mode, input, p, training, _channels(input), "feature_alpha_dropout")


@_replaces(torch.feature_alpha_dropout, torch.feature_alpha_dropout_)
def _torch_feature_alpha_dropout(mode: Elementary, input: Tensor, p: float, train: bool) -> Tensor:
    return _alpha_dropped(mode, input, p, train, _channels(input), "feature_alpha_dropout")


# ---- other random numbers -------------------------------------------------------------------
#
# A generator is passed over: the keys say what is drawn.


@_replaces(torch.rand)
def _rand(mode: Elementary, *size: Any, generator: Any = None, **options: Any) -> Tensor:
    return mode.uniform(torch.empty(*size, **options), "rand")


@_replaces(torch.randn)
def _randn(mode: Elementary, *size: Any, generator: Any = None, **options: Any) -> Tensor:
    return mode.normal(torch.empty(*size, **options), "randn")


@_replaces(torch.rand_like)
def _rand_like(mode: Elementary, input: Tensor, *, generator: Any = None, **options: Any) -> Tensor:
    return mode.uniform(torch.empty_like(input, **options), "rand_like")


@_replaces(torch.randn_like)
def _randn_like(mode: Elementary, input: Tensor, *, generator: Any = None, **options: Any) -> Tensor:
    return mode.normal(torch.empty_like(input, **options), "randn_like")


@_replaces(torch.bernoulli, torch.Tensor.bernoulli)
def _bernoulli(mode: Elementary, input: Tensor, p: float | None = None, *, generator: Any = None) -> Tensor:
    uniform = mode.uniform(torch.empty_like(input, dtype=_wide(input.dtype)), "bernoulli")
    return (uniform < (input if p is None else p)).to(input.dtype)


@_replaces(torch.Tensor.bernoulli_)
def _bernoulli_(mode: Elementary, input: Tensor, p: float | Tensor = 0.5, *, generator: Any = None) -> Tensor:
    uniform = mode.uniform(torch.empty_like(input, dtype=torch.float32), "bernoulli_")
    return input.copy_(uniform < p)


@_replaces(torch.Tensor.uniform_)
def _uniform_(
    mode: Elementary, input: Tensor, *limits: float, generator: Any = None, **named: float
) -> Tensor:
    given = dict(zip(("from", "to"), limits, strict=False)) | named  # a parameter cannot be called `from`
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    return input.copy_(low + (high - low) * mode.uniform(input, "uniform_"))


@_replaces(torch.Tensor.normal_)
def _normal_(
    mode: Elementary, input: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None
) -> Tensor:
    return input.copy_(mean + std * mode.normal(input, "normal_"))


@_replaces(torch.Tensor.exponential_)
def _exponential_(mode: Elementary, input: Tensor, lambd: float = 1.0, *, generator: Any = None) -> Tensor:
    return input.copy_(-torch.log1p(-mode.uniform(input, "exponential_")) / lambd)


@_replaces(torch.normal)
def _normal(
    mode: Elementary,
    mean: float | Tensor,
    std: float | Tensor = 1.0,
    size: Sequence[int] | None = None,
    *,
    generator: Any = None,
    **options: Any,
) -> Tensor:
    if size is None:
        size = torch.broadcast_shapes(*(s.shape for s in (mean, std) if isinstance(s, Tensor)))
        given = mean if isinstance(mean, Tensor) else std
        assert isinstance(given, Tensor)
        options = {"dtype": given.dtype, "device": given.device}
    return mean + std * mode.normal(torch.empty(size, **options), "normal")


@_replaces(F.rrelu)
def _rrelu(
    mode: Elementary,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2)
    slope = lower + (upper - lower) * mode.uniform(input, "rrelu")
    return torch.where(input > 0, input, slope * input)


@_replaces(F.gumbel_softmax)
def _gumbel_softmax(
    mode: Elementary, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    exponential = -torch.log1p(-mode.uniform(logits, "gumbel_softmax"))
    tiny = torch.finfo(logits.dtype).tiny  # a uniform number may be 0
    soft = ((logits - exponential.clamp(min=tiny).log()) / tau).softmax(dim)
    if not hard:
        return soft
    index = soft.argmax(dim, keepdim=True)
    return torch.zeros_like(soft).scatter(dim, index, 1.0) - soft.detach() + soft


def _refused(name: str) -> Replacement:
    def refuse(mode: Elementary, *arguments: Any, **named: Any) -> NoReturn:
        raise ValueError(
            f"{name} draws random numbers in a way that cannot be repeated for each task: "
            "draw with torch.rand, torch.randn or bernoulli"
        )

    return refuse


for _name in (
    *("multinomial", "randint", "randint_like", "randperm", "poisson", "binomial"),
    *("Tensor.multinomial", "Tensor.random_", "Tensor.cauchy_", "Tensor.geometric_", "Tensor.log_normal_"),
    *("nn.functional.fractional_max_pool2d_with_indices", "nn.functional._fractional_max_pool2d"),
    *("nn.functional.fractional_max_pool3d_with_indices", "nn.functional._fractional_max_pool3d"),
):
    _function: Any = torch
    for _part in _name.split("."):
        _function = getattr(_function, _part)
    _replaces(_function)(_refused(_name.split(".")[-1].removeprefix("_")))


# ---- tensors that a forward pass allocates --------------------------------------------------


def _fresh(function: Callable[..., Tensor]) -> Replacement:
    """One for each task, where there are tasks: then what depends on the task can be written to it."""

    def make(mode: Elementary, *arguments: Any, **named: Any) -> Tensor:
        made = function(*arguments, **named)
        if mode.like is None or made.requires_grad:
            return made
        return mode.like.new_empty(made.shape, dtype=made.dtype, device=made.device).copy_(made)

    return make


for _function in (
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full),
):
    _replaces(_function)(_fresh(_function))


# ---- attention ------------------------------------------------------------------------------


def _attention(
    mode: Elementary, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """What is attended to `[..., queries, values' features]`, and the weights `[..., queries, keys]`.

    `mask` is added to the scores. A query that may attend to no key attends to nothing: its weights are 0.
    """
    scores = (q * scale) @ k.mT
    if mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores + mask
        alone = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(alone, 0.0).softmax(-1).masked_fill(alone, 0.0)
    weights = _dropped(mode, weights, dropout_p, True, weights.shape, "attention's dropout")
    return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add, of one that is True where attention is allowed."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """True where a query may attend: to no later key."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()


@_replaces(F.scaled_dot_product_attention)
def _scaled_dot_product_attention(
    mode: Elementary,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
        attn_mask = _causal(query, key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
    return _attention(mode, query, key, value, mask, scale, dropout_p)[0]


def _by_query(mask: Tensor, batch: int) -> Tensor:
    """Of `[queries, keys]` or `[batch * heads, queries, keys]`, as it goes with the scores."""
    return mask.unflatten(0, (batch, -1)) if mask.dim() == 3 else mask


def _by_key(mask: Tensor, batch: int) -> Tensor:
    """The same of `[batch, keys]`."""
    return mask[:, None, None, :]


@_replaces(F.multi_head_attention_forward)
def _multi_head_attention_forward(
    mode: Elementary,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See there; `query` is `[queries, batch, features]` or `[queries, features]`."""
    if query.dim() == 2:
        output, weights = _multi_head_attention_forward(
            mode,
            *(x.unsqueeze(1) for x in (query, key, value)),
            *(embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn),
            *(dropout_p, out_proj_weight, out_proj_bias, training),
            None if key_padding_mask is None else key_padding_mask.unsqueeze(0),
            *(need_weights, attn_mask, use_separate_proj_weight),
            *(q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v),
            *(average_attn_weights, is_causal),
        )
        return output.squeeze(1), None if weights is None else weights.squeeze(0)

    batch, features, keys = *query.shape[1:], key.shape[0]
    if features != embed_dim_to_check:
        raise ValueError(f"was expecting embedding dimension of {embed_dim_to_check}, but got {features}")
    if is_causal and attn_mask is None:
        raise ValueError("multi_head_attention_forward: give the attn_mask that is_causal is a hint for")
    if use_separate_proj_weight:
        matrices: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        matrices = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, matrix, bias)  # type: ignore[arg-type]
        for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
    )
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(1, batch, -1)]) for x, b in ((k, bias_k), (v, bias_v)))

    def by_head(x: Tensor) -> Tensor:
        """`[batch, heads, length, features of a head]`"""
        return x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)

    q, k, v = by_head(q), by_head(k), by_head(v)
    if static_k is not None:
        k = static_k.unflatten(0, (batch, num_heads))
    if static_v is not None:
        v = static_v.unflatten(0, (batch, num_heads))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))

    mask = None
    for given, shape in ((attn_mask, _by_query), (key_padding_mask, _by_key)):
        if given is not None:
            allowed = ~given if given.dtype == torch.bool else given  # True: not allowed, unlike above
            part = F.pad(_additive(shape(allowed, batch), query.dtype), (0, k.shape[-2] - keys))
            mask = part if mask is None else mask + part

    dropout_p = dropout_p if training else 0.0
    output, weights = _attention(mode, q, k, v, mask, q.shape[-1] ** -0.5, dropout_p)
    output = output.permute(2, 0, 1, 3).flatten(2)
    output = F.linear(output, out_proj_weight, out_proj_bias)
    if not need_weights:
        return output, None
    return output, weights.mean(1) if average_attn_weights else weights


@_replaces(torch._nested_tensor_from_mask_left_aligned)
def _nested_tensor_from_mask_left_aligned(mode: Elementary, input: Tensor, mask: Tensor) -> bool:
    """No: a `TransformerEncoder` then keeps its padding, in a tensor."""
    return False


# ---- recurrent networks ---------------------------------------------------------------------
#
# A cell takes what comes from the input and what comes from the state, both `[batch, gates * hidden]`, and
# the state, a tuple of `[batch, hidden]` of which the first is the output; it gives the next state.

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm_cell(from_input: Tensor, from_state: Tensor, state: State) -> State:
    take, keep, new, show = (from_input + from_state).chunk(4, -1)
    cell = keep.sigmoid() * state[1] + take.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _gru_cell(from_input: Tensor, from_state: Tensor, state: State) -> State:
    (reset, keep, new), (reset_h, keep_h, new_h) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    new = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (new + (keep + keep_h).sigmoid() * (state[0] - new),)


def _tanh_cell(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).tanh(),)


def _relu_cell(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).relu(),)


def _scan(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], bias: bool) -> tuple[Tensor, State]:
    """One layer in one direction: the outputs `[time, batch, hidden]`, and the last state."""
    w_input, w_state, *others = weights
    b_input, b_state = others[:2] if bias else (None, None)
    projection = others[-1] if len(others) % 2 else None
    outputs = []
    for from_input in F.linear(x, w_input, b_input).unbind(0):  # one product for all times
        state = cell(from_input, F.linear(state[0], w_state, b_state), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _recurrent(
    mode: Elementary,
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Outputs, and the last states `[layers * directions, batch, hidden]`, as are the first, `states`."""
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (num_layers * directions)
    x = x.transpose(0, 1) if batch_first else x
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            own = weights[row * per_direction : (row + 1) * per_direction]
            forward = x.flip(0) if direction else x
            output, state = _scan(cell, forward, tuple(s[row] for s in states), own, has_biases)
            outputs.append(output.flip(0) if direction else output)
            last.append(state)
        x = torch.cat(outputs, -1)
        if layer < num_layers - 1:
            x = _dropped(mode, x, dropout, train, x.shape, "dropout between recurrent layers")
    return x.transpose(0, 1) if batch_first else x, *(torch.stack(s) for s in zip(*last, strict=True))


def _replace_recurrent(name: str, cell: Cell) -> None:
    def layers(mode: Elementary, x: Tensor, states: Any, weights: Any, *options: Any) -> tuple[Tensor, ...]:
        if not isinstance(options[0], bool):  # it is the weights: behind the data came the batch sizes
            raise ValueError(f"{name} of a PackedSequence is not supported: give it a padded batch and mask")
        states = [states] if isinstance(states, Tensor) else states
        return _recurrent(mode, cell, x, states, weights, *options)

    def single(
        mode: Elementary,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | State:
        alone = isinstance(hx, Tensor)
        state = (hx,) if alone else tuple(hx)
        state = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return state[0] if alone else state

    _replaces(getattr(torch, name))(layers)
    _replaces(getattr(torch, f"{name}_cell"))(single)


_replace_recurrent("lstm", _lstm_cell)
_replace_recurrent("gru", _gru_cell)
_replace_recurrent("rnn_tanh", _tanh_cell)
_replace_recurrent("rnn_relu", _relu_cell)


@_replaces(torch.Tensor.data_ptr)
def _data_ptr(mode: Elementary, input: Tensor) -> int:
    """The weights of tasks lie nowhere of their own, and cuDNN is not to lay out those of a recurrent layer:
    that all lie in one place is its reason not to."""
    return 0


@_replaces(torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def _data(mode: Elementary, input: Tensor) -> Tensor:
    return input.detach()


# ---- embeddings -----------------------------------------------------------------------------


@_replaces(F.embedding)
def _embedding(
    mode: Elementary,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        raise ValueError("an embedding with max_norm overwrites its weights in a forward pass: leave it out")
    rows = F.embedding(input, weight, scale_grad_by_freq=scale_grad_by_freq)
    if padding_idx is None:
        return rows
    # under `vmap`, PyTorch's own second derivative does not leave the padding's row out
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


@_replaces(F.embedding_bag)
def _embedding_bag(
    elementary: Elementary,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if input.dim() != 2 or mode not in ("sum", "mean") or max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            "embedding_bag is supported for bags of one length [bags, length], mode sum or mean, "
            "without max_norm and scale_grad_by_freq"
        )
    rows = F.embedding(input, weight)  # [bags, length, features]
    counted = torch.ones_like(input, dtype=weight.dtype)
    if padding_idx is not None:
        counted = (input != padding_idx % weight.shape[0]).to(weight.dtype)
    share = counted if per_sample_weights is None else counted * per_sample_weights
    total = (rows * share.unsqueeze(-1)).sum(1)
    return total if mode == "sum" else total / counted.sum(1, keepdim=True).clamp(min=1.0)


# ---- normalisation --------------------------------------------------------------------------
#
# PyTorch's own are silently wrong here (2.11 to 2.15 at least): differentiated again, the forward-mode
# derivative of layer norm and batch norm, and under `vmap` the backward pass of layer norm, take the
# statistics for constants.


def _normalised(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))  # in half precision a sum of squares would lose the variance
    variance, mean = torch.var_mean(wide, list(axes), correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + eps)).to(x.dtype)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(x: Tensor, weight: Tensor | None) -> Tensor | None:
    """`[channels]` as it goes with `x`: `[batch, channels, ...]`."""
    return None if weight is None else weight.view(-1, *(1,) * (x.dim() - 2))


@_replaces(F.normalize)
def _normalize(
    mode: Elementary,
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    found = F.normalize(input, p, dim, eps)
    return found if out is None else out.copy_(found)


@_replaces(F.layer_norm)
def _layer_norm(
    mode: Elementary,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scaled(_normalised(input, range(-len(normalized_shape), 0), eps), weight, bias)


@_replaces(F.batch_norm)
def _batch_norm(
    mode: Elementary,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training and running_mean is not None:  # each task's own (see inner_loop.py)
        assert running_var is not None
        wide = input.detach().to(_wide(input.dtype))
        seen = torch.var_mean(wide, [0, *range(2, input.dim())], correction=1)
        for running, now in zip((running_var, running_mean), seen, strict=True):
            running.copy_(running + momentum * (now - running))
    weight, bias = _per_channel(input, weight), _per_channel(input, bias)
    if training:
        return _scaled(_normalised(input, [0, *range(2, input.dim())], eps), weight, bias)
    mean, variance = _per_channel(input, running_mean), _per_channel(input, running_var)
    assert mean is not None and variance is not None
    return _scaled((input - mean) * torch.rsqrt(variance + eps), weight, bias).to(input.dtype)


@_replaces(F.instance_norm)
def _instance_norm(
    mode: Elementary,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(mode, input, running_mean, running_var, weight, bias, eps=eps)
    weight, bias = _per_channel(input, weight), _per_channel(input, bias)
    return _scaled(_normalised(input, range(2, input.dim()), eps), weight, bias)


# ---- smaller ones, of which PyTorch lacks a derivative, or a rule for `vmap` ----------------


@_replaces(F.hardsigmoid)
def _hardsigmoid(mode: Elementary, input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3.0) / 6.0


@_replaces(F.glu)
def _glu(mode: Elementary, input: Tensor, dim: int = -1) -> Tensor:
    values, gates = input.chunk(2, dim)
    return values * gates.sigmoid()


@_replaces(F.one_hot)
def _one_hot(mode: Elementary, tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise ValueError("one_hot: give num_classes, which it would read off each task's values")
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


@_replaces(torch.cdist)
def _cdist(
    mode: Elementary, x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None
) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), ord=p, dim=-1)


@_replaces(torch._weight_norm)
def _weight_norm(mode: Elementary, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = None if dim == -1 else [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


@_replaces(torch.linalg.householder_product)
def _householder_product(mode: Elementary, input: Tensor, tau: Tensor) -> Tensor:
    """The first columns of the product of the reflections 1 - tau v v*; orthogonal weights are made so."""
    rows, columns = input.shape[-2:]
    identity = torch.eye(rows, columns, dtype=input.dtype, device=input.device)
    vectors = input.tril(-1) + identity
    product = identity
    for number in reversed(range(tau.shape[-1])):
        vector = vectors[..., number : number + 1]
        product = product - tau[..., number, None, None] * vector @ (vector.mH @ product)
    return product

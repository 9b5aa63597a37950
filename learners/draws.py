"""Random numbers that a learner draws while it trains, as pure functions of the task's keys.

`Elementary` (elementary.py) passes a `Draws` to the families that draw. The numbers depend on the task's
keys, on how many calls have drawn before in this pass, and on the position in the tensor. So a pass can be
repeated, and draws the same eager, compiled, or under `vmap`. A `generator` is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.random import Stream
from learners.spellings import Replacements, list_spellings, spell_out


class Draws:
    """The random numbers of one forward pass of one task; `keys` are int64 `[2]`, two 32-bit words."""

    def __init__(self, keys: Tensor | None) -> None:
        self.keys = keys
        self.calls = 0  # that have drawn so far

    def stream(self) -> Stream:
        """Return the stream of the next call; ValueError without keys."""
        if self.keys is None:
            raise ValueError("the learner draws random numbers: give keys")
        self.calls += 1
        return Stream.from_keys(self.keys).at(self.calls - 1)

    def uniform(self, like: Tensor) -> Tensor:
        """Return numbers in [0, 1) in the tensor's shape, type and device."""
        precision = min(24, 1 - round(math.log2(torch.finfo(like.dtype).eps)))  # more bits would round to 1
        bits = self.stream().words(like.numel()).to(like.device) >> (32 - precision)
        return (bits.to(like.dtype) * 2.0**-precision).view(like.shape)

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers in the tensor's shape, type and device."""
        wide = torch.promote_types(like.dtype, torch.float32)
        numbers = self.stream().normal(like.numel(), wide)
        return numbers.to(like.device, like.dtype).view(like.shape)

    def drop(self, x: Tensor, p: float, training: bool, shape: Sequence[int]) -> Tensor:
        """Return x with elements set to zero with probability p, and the others divided by 1 - p.

        Never in place: tasks may share x, but not the mask, whose `shape` broadcasts against x.
        """
        if p == 0.0 or not training:
            return x
        if p == 1.0:
            return x * 0.0
        bits = self.stream().words(math.prod(shape)).to(x.device) >> 8
        mask = (bits >= round(p * 2**24)).to(x.dtype).view(shape)
        return x * (mask / (1.0 - p))


def _make(draw: Any, empty: Any, draws: Draws, *size: Any, generator: Any = None, **options: Any) -> Tensor:
    return draw(draws, empty(*size, **options))


def _bernoulli(draws: Draws, input: Tensor, p: float | None = None, *, generator: Any = None) -> Tensor:
    wide = torch.promote_types(input.dtype, torch.float32)
    uniform = draws.uniform(torch.empty_like(input, dtype=wide))
    return (uniform < (input if p is None else p)).to(input.dtype)


def _bernoulli_(draws: Draws, input: Tensor, p: float | Tensor = 0.5, *, generator: Any = None) -> Tensor:
    return input.copy_(draws.uniform(torch.empty_like(input, dtype=torch.float32)) < p)


def _drop(
    width: int, draws: Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Drop elements (`width` is 0), or whole channels of examples `[channels, ...]` of `width` axes."""
    axes = input.dim()
    drawn = min(2, axes - width + 1) if width else axes  # axes that differ in their draw; batch may be absent
    return draws.drop(input, p, training, (*input.shape[:drawn], *(1,) * (axes - drawn)))


def _native_dropout(
    draws: Draws, input: Tensor, p: float, train: bool | None = True
) -> tuple[Tensor, Tensor]:
    mask = draws.drop(torch.ones_like(input), p, train is not False, input.shape)
    return input * mask, mask != 0


REPLACEMENTS: Replacements = spell_out(
    {
        "rand": partial(_make, Draws.uniform, torch.empty),
        "randn": partial(_make, Draws.normal, torch.empty),
        "rand_like": partial(_make, Draws.uniform, torch.empty_like),
        "randn_like": partial(_make, Draws.normal, torch.empty_like),
        "bernoulli": _bernoulli,
        "bernoulli_": _bernoulli_,
        "dropout": lambda draws, input, p, train: draws.drop(input, p, train, input.shape),
        "feature_dropout": lambda draws, input, p, train: _drop(1, draws, input, p, train),
        "dropout_": lambda draws, input, p, train: input.copy_(draws.drop(input, p, train, input.shape)),
        "feature_dropout_": lambda draws, input, p, train: input.copy_(_drop(1, draws, input, p, train)),
        "native_dropout": _native_dropout,
    }
) | {
    F.dropout: partial(_drop, 0),
    F.dropout1d: partial(_drop, 2),
    F.dropout2d: partial(_drop, 1),  # PyTorch takes three axes for a batch here
    F.dropout3d: partial(_drop, 4),
}
_REFUSED_NAMES = (
    *("multinomial", "normal", "poisson", "binomial", "randint", "randint_like", "randperm"),
    *("random_", "random", "uniform_", "uniform", "normal_", "normal_functional", "exponential_"),
    *("exponential", "cauchy_", "cauchy"),
    *("geometric_", "geometric", "log_normal_", "log_normal", "_standard_gamma", "_sample_dirichlet"),
    *("rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_", "alpha_dropout", "alpha_dropout_"),
    *("feature_alpha_dropout", "feature_alpha_dropout_", "fractional_max_pool2d", "fractional_max_pool3d"),
)
REFUSED = (
    *list_spellings(*_REFUSED_NAMES),
    *(F.rrelu, F.alpha_dropout, F.feature_alpha_dropout, F.gumbel_softmax),
    *(F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices),
    *(F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices),
)

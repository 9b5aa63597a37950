"""Random numbers that a learner draws while it trains, as pure functions of the task's keys.

`Elementary` (elementary.py) passes a `Draws` to every function that it substitutes; dropout and attention
read their masks from it. The functions below replace those that make or fill a random tensor. The numbers
depend on the keys, on how many calls have drawn before in this pass, and on the position in the tensor. So a
pass can be repeated, and draws the same eager, compiled, or under `vmap`. A `generator` is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from common.random import Stream

# PyTorch's function -> the one that runs instead, which takes a `Draws` and then the same arguments.
Replacements = dict[Any, Callable[..., Any]]


class Draws:
    """The random numbers of one forward pass of one task.

    Args:
        keys: int64 `[2]`, two 32-bit words; None: a pass that draws raises ValueError.
    """

    def __init__(self, keys: Tensor | None) -> None:
        self.keys = keys
        self.calls = 0  # that have drawn so far

    def stream(self, function: str) -> Stream:
        """Return the stream of the next call; `function` names the caller in errors."""
        if self.keys is None:
            raise ValueError(f"{function} draws random numbers: give keys")
        self.calls += 1
        return Stream.from_keys(self.keys).at(self.calls - 1)

    def uniform(self, like: Tensor, function: str) -> Tensor:
        """Return numbers in [0, 1) of that tensor's shape, type and device."""
        precision = min(24, 1 - round(math.log2(torch.finfo(like.dtype).eps)))  # more bits would round to 1
        bits = self.stream(function).words(like.numel()).to(like.device) >> (32 - precision)
        return (bits.to(like.dtype) * 2.0**-precision).view(like.shape)

    def normal(self, like: Tensor, function: str) -> Tensor:
        """Return standard normal numbers of that tensor's shape, type and device."""
        wide = torch.promote_types(like.dtype, torch.float32)
        numbers = self.stream(function).normal(like.numel(), wide)
        return numbers.to(like.device, like.dtype).view(like.shape)

    def mask(self, p: float, shape: Sequence[int], like: Tensor, function: str) -> Tensor:
        """Return 1 with probability 1 - p and else 0, in the type of `like`; the same in every type."""
        bits = self.stream(function).words(math.prod(shape)).to(like.device) >> 8
        return (bits >= round(p * 2**24)).to(like.dtype).view(shape)


def _rand(draws: Draws, *size: Any, generator: Any = None, **options: Any) -> Tensor:
    return draws.uniform(torch.empty(*size, **options), "rand")


def _randn(draws: Draws, *size: Any, generator: Any = None, **options: Any) -> Tensor:
    return draws.normal(torch.empty(*size, **options), "randn")


def _rand_like(draws: Draws, input: Tensor, *, generator: Any = None, **options: Any) -> Tensor:
    return draws.uniform(torch.empty_like(input, **options), "rand_like")


def _randn_like(draws: Draws, input: Tensor, *, generator: Any = None, **options: Any) -> Tensor:
    return draws.normal(torch.empty_like(input, **options), "randn_like")


def _bernoulli(draws: Draws, input: Tensor, p: float | None = None, *, generator: Any = None) -> Tensor:
    wide = torch.promote_types(input.dtype, torch.float32)
    uniform = draws.uniform(torch.empty_like(input, dtype=wide), "bernoulli")
    return (uniform < (input if p is None else p)).to(input.dtype)


def _bernoulli_(draws: Draws, input: Tensor, p: float | Tensor = 0.5, *, generator: Any = None) -> Tensor:
    uniform = draws.uniform(torch.empty_like(input, dtype=torch.float32), "bernoulli_")
    return input.copy_(uniform < p)


def _uniform_(draws: Draws, input: Tensor, *limits: float, generator: Any = None, **named: float) -> Tensor:
    bounds = dict(zip(("from", "to"), limits, strict=False)) | named  # no parameter can be called `from`
    low, high = bounds.get("from", 0.0), bounds.get("to", 1.0)
    return input.copy_(low + (high - low) * draws.uniform(input, "uniform_"))


def _normal_(
    draws: Draws, input: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None
) -> Tensor:
    return input.copy_(mean + std * draws.normal(input, "normal_"))


def refuse(function: Any, reason: str) -> Replacements:
    """Return an entry of the table that raises ValueError with that reason."""

    def replacement(draws: Draws, *arguments: Any, **options: Any) -> NoReturn:
        raise ValueError(f"{function.__name__} {reason}")

    return {function: replacement}


REPLACEMENTS: Replacements = {
    torch.rand: _rand,
    torch.randn: _randn,
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
}
for _function in (
    *(torch.multinomial, torch.normal, torch.poisson, torch.binomial, torch.randint, torch.randint_like),
    *(torch.randperm, torch.dropout, torch.feature_dropout, Tensor.multinomial, Tensor.random_),
    *(Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_, F.rrelu),
    *(F.alpha_dropout, F.feature_alpha_dropout, F.gumbel_softmax, F.fractional_max_pool2d),
    *(F.fractional_max_pool3d, F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices),
):
    REPLACEMENTS |= refuse(
        _function,
        "draws random numbers in a way that cannot be repeated for each task: draw with torch.rand, "
        "torch.randn, bernoulli or nn.functional.dropout",
    )

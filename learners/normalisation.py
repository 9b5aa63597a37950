"""Normalisation with right second derivatives.

PyTorch's own are silently wrong when they are differentiated again (2.11 to 2.15 at least): the forward-mode
derivatives of layer norm and batch norm, and the backward pass of layer norm under `vmap`, treat the
statistics as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from learners.draws import Draws, Replacements


def _normalise(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """Return x with mean 0 and biased variance 1 over these axes."""
    # a sum of squares in half precision would lose the variance
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, list(axes), correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + eps)).to(x.dtype)


def _scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(x: Tensor, weight: Any) -> Any:
    """Return `[channels]` in a shape that broadcasts against x, `[batch, channels, ...]`."""
    return None if weight is None else weight.view(-1, *(1,) * (x.dim() - 2))


def _layer_norm(
    draws: Draws,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scale_and_shift(_normalise(input, range(-len(normalized_shape), 0), eps), weight, bias)


def _batch_norm(
    draws: Draws,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    all_but_channels = [0, *range(2, input.dim())]
    weight, bias = _per_channel(input, weight), _per_channel(input, bias)
    if training:
        if running_mean is not None and running_var is not None:  # buffers of this task alone
            wide = input.detach().to(torch.promote_types(input.dtype, torch.float32))
            statistics = torch.var_mean(wide, all_but_channels, correction=1)
            for running, now in zip((running_var, running_mean), statistics, strict=True):
                running.copy_(running + momentum * (now - running))
        return _scale_and_shift(_normalise(input, all_but_channels, eps), weight, bias)
    mean, variance = _per_channel(input, running_mean), _per_channel(input, running_var)
    return _scale_and_shift((input - mean) * torch.rsqrt(variance + eps), weight, bias).to(input.dtype)


def _instance_norm(
    draws: Draws,
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
        return _batch_norm(draws, input, running_mean, running_var, weight, bias, eps=eps)
    weight, bias = _per_channel(input, weight), _per_channel(input, bias)
    return _scale_and_shift(_normalise(input, range(2, input.dim()), eps), weight, bias)


def _normalize(draws: Draws, *arguments: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    """Compute `F.normalize`; `vmap` has no rule for `out`, which spectral norm gives."""
    unit = F.normalize(*arguments, **options)
    return unit if out is None else out.copy_(unit)


REPLACEMENTS: Replacements = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.normalize: _normalize,
}

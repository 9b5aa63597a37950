"""Normalisation with right second derivatives.

PyTorch's own are silently wrong when they are differentiated again (2.11 to 2.15 at least): the forward-mode
derivatives of layer norm and batch norm, and the backward pass of layer norm under `vmap`, treat the
statistics as constants. The backward pass of weight norm is wrong, too. ATen's functions, which
`torch.batch_norm` and others call directly, take the weights before the running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batch import append_axes
from learners.spellings import Replacements, list_spellings, spell_out


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
    return None if weight is None else append_axes(weight, x.dim() - 1)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scale_and_shift(_normalise(input, range(-len(normalized_shape), 0), eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
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
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    weight, bias = _per_channel(input, weight), _per_channel(input, bias)
    return _scale_and_shift(_normalise(input, range(2, input.dim()), eps), weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    mean_square = wide.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    return _scale_and_shift((wide * torch.rsqrt(mean_square + eps)).to(input.dtype), weight, None)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]  # -1: of the whole
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


# ---- ATen's functions, some of which return the statistics, too, as constants --------------------

_WEIGHTS_FIRST = ("input", "weight", "bias", "running_mean", "running_var")
_BATCH_NORM = (*_WEIGHTS_FIRST, "training", "momentum", "eps")


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    axes = range(-len(normalized_shape), 0)
    variance, mean = torch.var_mean(input.detach(), list(axes), correction=0, keepdim=True)
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, torch.rsqrt(variance + eps)


def _reorder(function: Any, *names: str) -> Any:
    """Return a function that takes the arguments of these names in this order; cuDNN's switch is dropped."""

    def call(*arguments: Any, **options: Any) -> Any:
        options |= dict(zip(names, arguments, strict=False))
        return function(**{name: value for name, value in options.items() if not name.startswith("cudnn")})

    return call


def _native_batch_norm(input: Tensor, training: bool, eps: float, **options: Any) -> tuple[Tensor, ...]:
    output = _batch_norm(input, training=training, eps=eps, **options)
    if not training:
        return output, input.new_empty(0), input.new_empty(0)
    all_but_channels = [0, *range(2, input.dim())]
    variance, mean = torch.var_mean(input.detach(), all_but_channels, correction=0)
    return output, mean, torch.rsqrt(variance + eps)


def _native_batch_norm_legit(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    if len(arguments) > 3 and isinstance(arguments[3], bool):  # the overload without running statistics
        arguments = (*arguments[:3], None, None, *arguments[3:])
    return _reorder(_native_batch_norm, *_BATCH_NORM)(*arguments, **options)


REPLACEMENTS: Replacements = spell_out(
    {
        "layer_norm": _reorder(_layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
        "native_layer_norm": _native_layer_norm,
        "batch_norm": _reorder(_batch_norm, *_BATCH_NORM),
        "native_batch_norm": _reorder(_native_batch_norm, *_BATCH_NORM),
        "_native_batch_norm_legit": _native_batch_norm_legit,
        "_native_batch_norm_legit_no_training": _reorder(
            partial(_native_batch_norm, training=False), *_WEIGHTS_FIRST, "momentum", "eps"
        ),
        "instance_norm": _reorder(_instance_norm, *_WEIGHTS_FIRST, "use_input_stats", "momentum", "eps"),
        "rms_norm": _rms_norm,
        "_weight_norm": _weight_norm,
    }
) | {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.rms_norm: _rms_norm,
}
KERNELS = list_spellings(
    *("_batch_norm_impl_index", "_native_batch_norm_legit_functional", "_batch_norm_with_update"),
    *("_batch_norm_with_update_functional", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
    *("batch_norm_stats", "batch_norm_elemt", "batch_norm_gather_stats"),
    *("batch_norm_gather_stats_with_counts", "_weight_norm_interface", "_fused_rms_norm"),
)

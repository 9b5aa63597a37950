"""Batch normalisation for few-shot learning: statistics come from the examples at hand.

A query set is normalised with its own statistics (*transductive*), with those of the support set
(*inductive*: both pass through the network as one batch, whose `reference` is the support), or with running
statistics of each inner step (*per-step*, Antoniou et al. 2019: recorded, and given like weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.batch import append_axes
from learners.copies import Notes

_STANDARD_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNorm(nn.Module):
    """One of PyTorch's layers, by the mean and biased variance of the batch `[batch, channels, ...]`."""

    elementary = True  # see `learners.elementary.is_elementary`

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = layer.eps, layer.weight, layer.bias
        if self.weight is not None and not self.weight.requires_grad and bool((self.weight == 1).all()):
            self.weight = None  # scales nothing, for ever
        self.statistics: Tensor
        self.register_buffer("statistics", torch.zeros(2, layer.num_features), persistent=False)
        self.reference: int | None = None  # number of leading examples that give the statistics; None: all
        self.mask: Tensor | None = None  # bool [batch], which of them count; None: all
        self.uses_buffer = False  # normalise with the buffer `statistics`: mean and biased variance
        self.passes: list[Tensor] | None = None  # collects the statistics of each pass

    def forward(self, x: Tensor) -> Tensor:
        per_channel = (-1,) + (1,) * (x.dim() - 2)
        # a sum of squares in half precision would lose the variance
        centred, variance = self._centre(x.to(torch.promote_types(x.dtype, torch.float32)), per_channel)
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight.view(per_channel)
        y = centred * scale
        return (y if self.bias is None else y + self.bias.view(per_channel)).to(x.dtype)

    def _centre(self, x: Tensor, per_channel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return x minus its mean, and the biased variance, which broadcasts against x."""
        if self.uses_buffer:
            mean, variance = self.statistics.to(x.dtype).unbind()
            return x - mean.view(per_channel), variance.view(per_channel)
        reference = slice(self.reference)
        # two passes: uncompiled on a CPU, `torch.var_mean` takes longer
        mean = self._mean(x[reference])
        centred = x - mean
        variance = self._mean(centred[reference].square())
        if self.passes is not None:
            self.passes.append(torch.stack([mean.flatten(), variance.flatten()]).detach())
        return centred, variance

    def _mean(self, x: Tensor) -> Tensor:
        """Return the mean of each channel over the examples that count, which broadcasts against x."""
        # image by image: compiled, one sum over thousands of like pixels is far less exact
        means = x.mean([*range(2, x.dim())], keepdim=True) if x.dim() > 2 else x
        if self.mask is None:
            return means.mean(0, keepdim=True)
        share = self.mask[: len(x)].to(x.dtype)
        share = append_axes(share / share.sum(), x.dim())
        return (share * means).sum(0, keepdim=True)


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace PyTorch's batch norm layers by `BatchNorm`, in place; parameters keep name and value.

    A subclass with a `forward` of its own and a layer in evaluation mode stay. Instance norm in training mode
    loses its running statistics and predicts as it trains. Returns the module, or its replacement.
    """
    layers: list[Any] = list(module.modules())
    converted = {}
    for layer in layers:
        if isinstance(layer, _InstanceNorm) and layer.training:
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        standard = isinstance(layer, _BatchNorm) and type(layer).forward in _STANDARD_FORWARDS
        if standard and (layer.training or layer.running_mean is None):
            converted[layer] = BatchNorm(layer)
    for layer in layers:
        for name, child in layer._modules.items():  # named_children() would name a shared layer once
            if child in converted:
                setattr(layer, name, converted[child])
    return converted.get(module, module)


def norm_layers(module: nn.Module) -> dict[str, BatchNorm]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}


def norm_parameter_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that belong to batch norm layers."""
    layers = norm_layers(module).items()
    return frozenset(join_names(n, name) for n, layer in layers for name, _ in layer.named_parameters())


def join_names(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


@contextmanager
def set_norms(module: nn.Module, **attributes: Any) -> Iterator[dict[str, BatchNorm]]:
    """Set attributes of every `BatchNorm` and restore them on exit; yield the layers by name."""
    layers = norm_layers(module)
    before = [{name: getattr(layer, name) for name in attributes} for layer in layers.values()]
    for layer in layers.values():
        layer.__dict__.update(attributes)
    try:
        yield layers
    finally:
        for layer, values in zip(layers.values(), before, strict=True):
            layer.__dict__.update(values)


def fresh_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return mean 0 and variance 1 of each layer, `[2, channels]`, by the name of its buffer."""
    fresh = next(module.parameters(), torch.zeros(())).new_tensor([[0.0], [1.0]])
    layers = norm_layers(module).items()
    return {join_names(n, "statistics"): fresh.repeat(1, layer.statistics.shape[1]) for n, layer in layers}


@contextmanager
def record_statistics(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that is filled on exit with the mean and biased variance that each layer has seen.

    Averages over calls, `[2, channels]`, detached, by the name of the layer's buffer.
    """
    recorded: dict[str, Tensor] = {}
    with set_norms(module, passes=None) as layers:
        for layer in layers.values():
            layer.passes = Notes()
        yield recorded
        for name, layer in layers.items():
            if layer.passes:
                recorded[join_names(name, "statistics")] = torch.stack(layer.passes).mean(0)

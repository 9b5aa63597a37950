"""Batch normalisation as few-shot learning uses it: the statistics come from the batch at hand.

No running average takes part, in training or in test. *Transductive* predictions use the statistics
of the query set itself; *inductive* ones those of the support set. The second is the first with
another reference: support and query pass through the network as one batch, whose statistics come
from its leading support examples alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules import replace_layers

_STANDARD_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNorm(nn.Module):
    """Normalises each channel of `[batch, channels, ...]` with the mean and biased variance of the batch.

    `reference` is the number of leading examples that give the statistics (all, where it is None).
    The default eps is that of the layer in Finn et al.'s code, as is a shift without a scale.
    """

    def __init__(self, channels: int, *, eps: float = 1e-3, scale: bool = False, shift: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None
        self.reference: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        examples = x if self.reference is None else x[: self.reference]
        all_but_channels = [0, *range(2, x.dim())]
        # in half precision a sum of squares would lose the variance
        wide = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(examples.to(wide), all_but_channels, correction=0, keepdim=True)
        per_channel = (-1,) + (1,) * (x.dim() - 2)
        y = (x.to(wide) - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            y = y * self.weight.view(per_channel)
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        return y.to(x.dtype)


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Puts a `BatchNorm` in the place of each of PyTorch's, in place; parameters keep name and value.

    A layer that is used in several places stays one layer; a subclass with a `forward` of its own is
    left as it is.
    """

    def replacement(layer: nn.Module) -> nn.Module | None:
        if not (isinstance(layer, _BatchNorm) and type(layer).forward in _STANDARD_FORWARDS):
            return None
        ours = BatchNorm(layer.num_features, eps=layer.eps)
        ours.weight, ours.bias = layer.weight, layer.bias
        return ours

    return replace_layers(module, replacement)


def norm_parameter_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that belong to batch normalisation layers."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, BatchNorm)
        for name, _ in layer.named_parameters(recurse=False)
    )


@contextmanager
def statistics_from_first(examples: int, module: nn.Module) -> Iterator[None]:
    """Within it, every `BatchNorm` takes its statistics from that many leading examples."""
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    for layer in layers:
        layer.reference = examples
    try:
        yield
    finally:
        for layer in layers:
            layer.reference = None

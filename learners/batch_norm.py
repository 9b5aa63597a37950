"""Batch normalisation as few-shot learning uses it: the statistics come from the batch at hand.

*Transductive* predictions use the statistics of the query set itself; *inductive* ones those of the
support set. The second is the first with another reference: support and query pass through the network
as one batch, whose statistics come from its leading support examples alone.

*Per-step* normalisation (Antoniou et al. 2019) trains with the batch at hand, too, and keeps running
statistics for each inner step. The layers neither hold nor move them: what a pass has seen is read with
`recorded_statistics`, and within `given_statistics` they use what the weights bring.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learners.modules import replace_layers

_STANDARD_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNorm(nn.Module):
    """Normalises each channel of `[batch, channels, ...]` with the mean and biased variance of the batch.

    `reference` is the number of leading examples that give the statistics (all, where it is None).
    The default eps is that of the layer in Finn et al.'s code, as is a shift without a scale.
    """

    elementary = True  # see elementary.py

    def __init__(self, channels: int, *, eps: float = 1e-3, scale: bool = False, shift: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None
        self.channels = channels
        self.register_buffer("statistics", torch.zeros(2, channels), persistent=False)
        self.reference: int | None = None
        self.statistics_given = False
        self.seen: list[Tensor] | None = None  # collects what each pass has seen, where it is a list

    def forward(self, x: Tensor) -> Tensor:
        # in half precision a sum of squares would lose the variance
        wide = torch.promote_types(x.dtype, torch.float32)
        per_channel = (-1,) + (1,) * (x.dim() - 2)
        centred, variance = self._centred(x.to(wide), per_channel)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        y = centred * scale
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        return y.to(x.dtype)

    def _centred(self, x: Tensor, per_channel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """x less its mean, and the biased variance: `[channels, 1, ...]`, or with a batch axis of one in
        front. In two passes: uncompiled on a CPU, `torch.var_mean` takes longer."""
        if self.statistics_given:
            mean, variance = self.get_buffer("statistics").to(x.dtype).unbind()
            return x - mean.view(per_channel), variance.view(per_channel)
        all_but_channels = [0, *range(2, x.dim())]
        reference = slice(self.reference)
        mean = x[reference].mean(all_but_channels, keepdim=True)
        centred = x - mean
        variance = centred[reference].square().mean(all_but_channels, keepdim=True)
        if self.seen is not None:
            self.seen.append(torch.stack([mean.flatten(), variance.flatten()]).detach())
        return centred, variance


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Puts a `BatchNorm` in the place of each of PyTorch's, in place; parameters keep name and value.

    A layer that is used in several places stays one layer. A subclass with a `forward` of its own is
    left as it is, and so is a layer in evaluation mode, whose running statistics are meant to stay.
    """

    def replacement(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.training:
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
            layer.num_batches_tracked = None
        if not (isinstance(layer, _BatchNorm) and type(layer).forward in _STANDARD_FORWARDS):
            return None
        if not layer.training and layer.running_mean is not None:
            return None
        ours = BatchNorm(layer.num_features, eps=layer.eps)
        ours.weight, ours.bias = layer.weight, layer.bias
        return ours

    return replace_layers(module, replacement)


def norm_layers(module: nn.Module) -> dict[str, BatchNorm]:
    """The batch normalisation layers by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}


def _inside(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def norm_parameter_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that belong to batch normalisation layers."""
    return frozenset(
        _inside(prefix, name)
        for prefix, layer in norm_layers(module).items()
        for name, _ in layer.named_parameters(recurse=False)
    )


@contextmanager
def _within(module: nn.Module, attribute: str, value: Any) -> Iterator[dict[str, BatchNorm]]:
    """Every `BatchNorm` has that value of the attribute, and afterwards its own again; gives the layers."""
    layers = norm_layers(module)
    before = {name: getattr(layer, attribute) for name, layer in layers.items()}
    for layer in layers.values():
        setattr(layer, attribute, value)
    try:
        yield layers
    finally:
        for name, layer in layers.items():
            setattr(layer, attribute, before[name])


@contextmanager
def statistics_from_first(examples: int, module: nn.Module) -> Iterator[None]:
    """Within it, every `BatchNorm` takes its statistics from that many leading examples."""
    with _within(module, "reference", examples):
        yield


# ---- running statistics ---------------------------------------------------------------------


def fresh_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Mean 0 and variance 1 of each layer, by the name of its buffer: `[2, channels]`."""
    fresh = {}
    some = next(module.parameters(), torch.zeros(()))
    for name, layer in norm_layers(module).items():
        mean = torch.zeros(layer.channels, dtype=some.dtype, device=some.device)
        fresh[_inside(name, "statistics")] = torch.stack([mean, torch.ones_like(mean)])
    return fresh


@contextmanager
def recorded_statistics(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gives a dictionary that holds, at the end, what each layer has seen in between.

    Mean and biased variance, `[2, channels]`, by the name of the layer's buffer; detached.
    """
    recorded: dict[str, Tensor] = {}
    with _within(module, "seen", None) as layers:
        for layer in layers.values():
            layer.seen = []  # of its own
        yield recorded
        for name, layer in layers.items():
            if layer.seen:
                recorded[_inside(name, "statistics")] = torch.stack(layer.seen).mean(0)


@contextmanager
def given_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, every `BatchNorm` normalises with its buffer `statistics`: `[2, channels]`.

    `functional_call` puts the ones to use in its place.
    """
    with _within(module, "statistics_given", True):
        yield

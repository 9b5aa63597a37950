"""Which parameters the inner loop adapts: all of them, the head, the body, or a context vector."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from learners.batch_norm import BatchNorm, join_names
from learners.copies import copy_module

_NORMS = (BatchNorm, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def head_names(module: nn.Module, head: str | None = None) -> frozenset[str]:
    """Return the names of the head's parameters; a tied parameter goes by the first of its names.

    `head` are names of modules or parameters, separated by commas. None: the last module, in the order of
    `named_modules`, that has parameters of its own and is not a normalisation layer.
    """
    first_names: dict[int, str] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    names = {name: first_names.setdefault(id(p), name) for name, p in parameters}
    if head is None:
        layers = [(n, layer) for n, layer in module.named_modules() if not isinstance(layer, _NORMS)]
        parts = [n for n, layer in layers if next(layer.parameters(recurse=False), None) is not None][-1:]
    else:
        parts = [part.strip() for part in head.split(",") if part.strip()]
    selected: set[str] = set()
    for part in parts:
        inside = {first for n, first in names.items() if not part or f"{n}.".startswith(f"{part}.")}
        if not inside:
            layer_names = ", ".join(dict.fromkeys(n.rpartition(".")[0] or n for n in names))
            raise ValueError(f"the learner has no part {part!r}: there are {layer_names}")
        selected |= inside
    return frozenset(selected)


def linear_head(module: nn.Module, head: str | None = None) -> str:
    """Return the name of the head, a linear layer with a bias that is used once; ValueError if it is not."""
    names = head_names(module, head)
    layers = list(module.named_modules(remove_duplicate=False))
    for name, layer in layers:
        used_once = sum(layer is other for _, other in layers) == 1
        inside = {join_names(name, p) for p, _ in layer.named_parameters()}
        if isinstance(layer, nn.Linear) and layer.bias is not None and used_once and inside == names:
            return name
    raise ValueError(f"the head ({', '.join(sorted(names))}) is not one linear layer with a bias, used once")


def replace_module(module: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` where the submodule `name` is, in place; return the module ("": `new` itself)."""
    if not name:
        return new
    module.set_submodule(name, new)
    return module


def remove_head(module: nn.Module, head: str | None) -> nn.Module:
    """Return a copy without its linear head: its outputs are the inputs of the head."""
    return replace_module(copy_module(module), linear_head(module, head), nn.Identity())


def divide(network: nn.Module, adapted: frozenset[str]) -> tuple[nn.Module, nn.Module] | None:
    """Return the layers of a sequence before its first adapted weights, and the rest, with their names.

    None where there are none before, for another network, and where the parts share a weight or a layer of
    the first folds the axis of examples.
    """
    if type(network) is not nn.Sequential:
        return None
    parts = [(n, layer) for n, layer in network._modules.items() if layer is not None]  # perhaps one twice
    names = [{join_names(part, name) for name, _ in layer.named_parameters()} for part, layer in parts]
    first = next((number for number, part in enumerate(names) if part & adapted), 0)
    before, rest = (nn.Sequential(OrderedDict(some)) for some in (parts[:first], parts[first:]))
    tied = {*map(id, before.parameters())} & {*map(id, rest.parameters())}
    axes = {nn.Flatten: "start_dim", nn.Unflatten: "dim"}  # the first one that a layer changes
    kinds = ((layer, axes[type(layer)]) for layer in before.modules() if type(layer) in axes)
    folds = any(getattr(layer, axis) != 1 for layer, axis in kinds)
    return (before, rest) if first and not tied and not folds else None


class ContextLayer(nn.Module):
    """Modulate a layer's output by a linear function of a context vector (CAVIA, Zintgraf et al. 2019).

    The output is shifted, which for a linear layer equals joining the context to its inputs. With `film` its
    channels are scaled and shifted: y (1 + scale) + shift. The context, `[size]`, begins at zero.
    """

    elementary = True  # see `learners.elementary.is_elementary`

    def __init__(self, layer: nn.Module, channels: int, size: int, *, film: bool) -> None:
        super().__init__()
        self.layer = layer
        self.context = nn.Parameter(torch.zeros(size))
        self.modulation = nn.Linear(size, 2 * channels if film else channels, bias=False)
        self.film = film

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if not self.film:
            return y + self.modulation(self.context)
        per_channel = (-1,) + (1,) * (y.dim() - 2)
        scale, shift = self.modulation(self.context).view(2, *per_channel)
        return y * (1 + scale) + shift


def add_context(module: nn.Module, size: int, *, seed: int = 0) -> nn.Module:
    """Wrap one layer in a `ContextLayer`, in place; return the module, or its wrapper.

    Networks with convolutions: scale and shift (FiLM) after the middle one, the third of four. Others: a
    shift after the first linear layer. Batch norm would subtract a shift: its output is scaled and shifted.
    """
    layers = list(module.named_modules())
    convolutions = [n for n, (_, layer) in enumerate(layers) if isinstance(layer, nn.Conv1d | nn.Conv2d)]
    linear = [n for n, (_, layer) in enumerate(layers) if isinstance(layer, nn.Linear)]
    if not convolutions and not linear:
        raise ValueError("a context needs a convolution or a linear layer in the learner")
    position = convolutions[len(convolutions) // 2] if convolutions else linear[0]
    name, layer = layers[position]
    channels: Any = layer.out_channels if convolutions else layer.out_features
    film = bool(convolutions)
    if position + 1 < len(layers) and isinstance(layers[position + 1][1], BatchNorm | _BatchNorm):
        (name, layer), film = layers[position + 1], True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = ContextLayer(layer, channels, size, film=film)
    return replace_module(module, name, wrapped)


def context_names(module: nn.Module) -> frozenset[str]:
    layers = module.named_modules()
    return frozenset(join_names(name, "context") for name, layer in layers if isinstance(layer, ContextLayer))


def adapted_names(module: nn.Module, fast_weights: str, head: str | None = None) -> frozenset[str]:
    """Return the names of the parameters that the inner loop adapts; ValueError where there are none."""
    everything = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    contexts = context_names(module)
    selected = contexts if fast_weights == "context" else everything - contexts
    if fast_weights == "head":
        selected &= head_names(module, head)
    if fast_weights == "body":
        selected -= head_names(module, head)
    if not selected:
        raise ValueError(f"the learner has nothing to adapt: no trainable weights for {fast_weights!r}")
    return selected

"""Which parameters the inner loop adapts: the head, the body, all of them, or a context.

Functions on names of parameters; and the context layer, which CAVIA (Zintgraf et al. 2019) feeds a
vector of the task's own with.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.choices import FAST_WEIGHTS, check_choice
from learners.batch_norm import BatchNorm


def head_names(module: nn.Module, head: str | None = None) -> frozenset[str]:
    """Names of the parameters of the head.

    The rule, where `head` is None: the last module, in the order of `named_modules`, that has parameters of
    its own and is not a normalisation layer. Else the names of modules or parameters, with commas between.
    Raises ValueError for a name that is none.
    """
    # a tied parameter has several names, of which the first counts
    canonical: dict[int, str] = {}
    names: dict[str, str] = {
        name: canonical.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)
    }
    found: set[str] = set()
    for prefix in _head_parts(module, head):
        inside = {
            first for n, first in names.items() if n == prefix or n.startswith(f"{prefix}.") or not prefix
        }
        if not inside or not (prefix or head is None):
            layers = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
            raise ValueError(f"the learner has no part {prefix!r}: there are {', '.join(layers)}")
        found |= inside
    return frozenset(found)


def _head_parts(module: nn.Module, head: str | None) -> list[str]:
    """The head's modules or parameters by name: as they are given, or by the rule of `head_names`."""
    if head is not None:
        return [name.strip() for name in head.split(",")]
    norms = (BatchNorm, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    owners = [
        prefix
        for prefix, layer in module.named_modules()
        if not isinstance(layer, norms) and next(layer.parameters(recurse=False), None) is not None
    ]
    if not owners:
        raise ValueError("the learner has no parameters")
    return owners[-1:]


def head_layer(module: nn.Module, head: str | None = None) -> str:
    """The name of the layer with which the head begins; what goes into it are the features."""
    layers = [name for name, _ in module.named_modules()]
    parts = [part if part in layers else part.rpartition(".")[0] for part in _head_parts(module, head)]
    return min(parts, key=layers.index)


def linear_head(module: nn.Module, head: str | None = None) -> str:
    """The name of the linear layer with a bias that the head is; raises ValueError where it is none."""
    names = head_names(module, head)
    for name, layer in module.named_modules():
        own = {f"{name}.{p}" if name else p for p, _ in layer.named_parameters(recurse=False)}
        if own == names and isinstance(layer, nn.Linear) and layer.bias is not None:
            return name
    raise ValueError(f"the head ({', '.join(sorted(names))}) is not one linear layer with a bias")


def without_head(module: nn.Module, head: str) -> nn.Module:
    """A copy that gives what goes into the layer `head`, the last one."""
    if not head:
        return nn.Identity()
    module = copy.deepcopy(module)
    parent, _, child = head.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())
    return module


class ContextLayer(nn.Module):
    """A layer whose output a linear function of a context vector modulates.

    The output is shifted, which for a linear layer is the same as joining the context to its inputs; with
    `film` its channels are scaled and shifted: y (1 + scale) + shift. The context is a parameter, `[size]`,
    of zeros.
    """

    elementary = True  # see elementary.py

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
    """Puts a `ContextLayer` in, in place.

    As Zintgraf et al. (2019) have it: with scale and shift (FiLM) behind the middle convolution, of four the
    third; in a network without convolutions, with a shift behind the first linear layer. Where batch norm
    follows, which would subtract a shift, the context modulates that, with scale and shift.
    Raises ValueError where there is neither a convolution nor a linear layer.
    """
    layers = list(module.named_modules())
    convolutions = [name for name, layer in layers if isinstance(layer, nn.Conv2d)]
    linear = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    if not convolutions and not linear:
        raise ValueError("a context needs a convolution or a linear layer in the learner")
    name = convolutions[len(convolutions) // 2] if convolutions else linear[0]
    chosen = module.get_submodule(name)
    channels = chosen.out_channels if isinstance(chosen, nn.Conv2d) else chosen.out_features
    names = [layer_name for layer_name, _ in layers]
    following = layers[names.index(name) + 1 :][:1]
    film = bool(convolutions)
    if following and isinstance(following[0][1], BatchNorm | _BatchNorm):
        name, chosen = following[0]
        film = True
    assert isinstance(channels, int)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = ContextLayer(chosen, channels, size, film=film)
    if not name:
        return wrapped
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, wrapped)
    return module


def context_names(module: nn.Module) -> frozenset[str]:
    """Names of the context vectors."""
    return frozenset(
        f"{name}.context" if name else "context"
        for name, layer in module.named_modules()
        if isinstance(layer, ContextLayer)
    )


def adapted_names(module: nn.Module, fast_weights: str, head: str | None = None) -> frozenset[str]:
    """Names of the parameters that the inner loop adapts, batch norm's among them.

    Raises ValueError where there is nothing to adapt.
    """
    check_choice("fast_weights", fast_weights, FAST_WEIGHTS)
    everything = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    contexts = context_names(module)
    if fast_weights == "context":
        if not contexts:
            raise ValueError("there is no context in the learner: see add_context")
        return contexts
    if fast_weights == "all":
        return everything - contexts
    in_head = head_names(module, head) & everything
    chosen = (in_head if fast_weights == "head" else everything - in_head) - contexts
    if not chosen:
        raise ValueError(f"the {fast_weights} of the learner has nothing to adapt")
    return chosen

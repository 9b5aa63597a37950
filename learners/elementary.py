"""A learner's forward pass from elementary operations: exact second derivatives, `vmap`, repeatable draws.

PyTorch's fused functions get in the way: kernels of attention have no second derivative, those of recurrent
networks no rule for `vmap`, and random numbers come from a hidden state. `Elementary` substitutes them, one
file for each family of layers. All other functions run as they are, and the module is not changed.

    with Elementary(keys):
        outputs = functional_call(learner, weights, (x,))
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learners import attention, draws, normalisation, recurrent
from learners.draws import Draws, Replacements


def _embedding(
    draws: Draws, input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any
) -> Tensor:
    if options.get("max_norm") is not None:
        raise ValueError("an embedding with max_norm overwrites its weights in a forward pass: leave it out")
    rows = F.embedding(input, weight, scale_grad_by_freq=bool(options.get("scale_grad_by_freq")))
    if padding_idx is None:
        return rows
    # under `vmap`, PyTorch's second derivative does not leave out the padding's row
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


def _one_hot(draws: Draws, tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise ValueError("one_hot: give num_classes, which would depend on each task's values")
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


def _weight_norm(draws: Draws, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute `nn.utils.weight_norm`; the norm is over all axes but `dim`, or over all if that is -1."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


_OTHERS: Replacements = {
    F.embedding: _embedding,
    F.one_hot: _one_hot,
    torch._weight_norm: _weight_norm,
    F.hardsigmoid: lambda draws, x, inplace=False: F.relu6(x + 3.0) / 6.0,
    Tensor.data.__get__: lambda draws, x: x.detach(),  # type: ignore[attr-defined]  # a descriptor
}
_REPLACEMENTS = _OTHERS | draws.REPLACEMENTS | normalisation.REPLACEMENTS
_REPLACEMENTS |= attention.REPLACEMENTS | recurrent.REPLACEMENTS
_REFUSED = dict.fromkeys(
    draws.REFUSED,
    "draws random numbers in a way that cannot be repeated for each task: draw with torch.rand, torch.randn, "
    "bernoulli or nn.functional.dropout",
) | {
    F.embedding_bag: "has no second derivative: average rows of nn.Embedding",
    torch.linalg.householder_product: 'has wrong derivatives: use orthogonal_map="matrix_exp"',
}
_ALLOCATIONS = {
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}


class Elementary(TorchFunctionMode):
    """A mode that substitutes functions; enter a new one for each forward pass.

    While a substitute runs, the mode is off. Functions that cannot be substituted raise ValueError.

    Args:
        keys: int64 `[2]`, on which the random numbers depend; None: a pass that draws raises ValueError.
        like: a tensor of one task, or the keys. Under `vmap`, tensors that the pass allocates (`torch.zeros`)
            then belong to one task as well, and may be written to.
    """

    def __init__(self, keys: Tensor | None = None, like: Tensor | None = None) -> None:
        super().__init__()
        self.draws = Draws(keys)
        self.like = keys if like is None else like

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(self.draws, *args, **kwargs or {})
        if func in _REFUSED:
            raise ValueError(f"{func.__name__} {_REFUSED[func]}")
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func not in _ALLOCATIONS or self.like is None or result.requires_grad:
            return result
        return self.like.new_empty(result.shape, dtype=result.dtype, device=result.device).copy_(result)


_NOTHING_TO_REPLACE = (nn.Sequential, nn.Linear, nn.Conv2d, nn.ReLU, nn.Tanh, nn.Flatten, nn.MaxPool2d)


def is_elementary(module: nn.Module) -> bool:
    """Return whether the module can do without `Elementary`, which takes a few percent of a small one's time.

    The tool's own layers have a class attribute `elementary`. Hooks may call anything.
    """
    layers = list(module.modules())
    if any(layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer) for layer in layers):
        return False
    kinds = {type(layer) for layer in layers}
    return all(kind in _NOTHING_TO_REPLACE or getattr(kind, "elementary", False) for kind in kinds)


class NoGradHolds(TorchFunctionMode):
    """A mode that makes `torch.no_grad` hold for forward-mode derivatives too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with nullcontext() if torch.is_grad_enabled() else _set_fwd_grad_enabled(False):
            return func(*args, **kwargs or {})

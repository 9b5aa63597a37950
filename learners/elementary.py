"""A learner's forward pass from elementary operations: exact second derivatives, `vmap`, repeatable draws.

PyTorch's fused functions get in the way: kernels of attention have no second derivative, those of recurrent
networks no rule for `vmap`, and random numbers come from a hidden state. `Elementary` substitutes them, one
file for each family of layers. All other functions run as they are, and the module is not changed.

    with Elementary(keys):
        outputs = functional_call(learner, weights, (x,))
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learners import attention, draws, linear_algebra, normalisation, recurrent
from learners.draws import Draws
from learners.spellings import Replacements, list_spellings, spell_out


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Tensor:
    if options.get("max_norm") is not None:
        raise ValueError("an embedding with max_norm overwrites its weights in a forward pass: leave it out")
    rows = F.embedding(input, weight, scale_grad_by_freq=bool(options.get("scale_grad_by_freq")))
    if padding_idx is None:
        return rows
    # under `vmap`, PyTorch's second derivative does not leave out the padding's row
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


def _aten_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    padding = None if padding_idx < 0 else padding_idx
    return _embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise ValueError("one_hot: give num_classes, which would depend on each task's values")
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    values, gates = input.chunk(2, dim)
    return values * gates.sigmoid()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3.0) / 6.0


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    start = index % input.shape[dim]  # under `vmap`, PyTorch's second derivative is wrong
    return input.slice_scatter(src.unsqueeze(dim), dim, start, start + 1)


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Compute `F.gaussian_nll_loss` without its look at the values; gradients ignore the bound, as there."""
    var = torch.full_like(input, var) if isinstance(var, float) else var
    var = var.unsqueeze(-1) if var.dim() < input.dim() else var
    var = var + (var.clamp(min=eps) - var).detach()
    losses = 0.5 * (var.log() + (input - target) ** 2 / var) + full * 0.5 * math.log(2 * math.pi)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute `F.cross_entropy`; smoothing with weights calls masked_select, which `vmap` has no rule for."""
    plain = size_average is None and reduce is None
    if weight is None or not label_smoothing or target.is_floating_point() or not plain:
        old, new = (weight, size_average, ignore_index, reduce), (reduction, label_smoothing)
        return F.cross_entropy(input, target, *old, *new)
    logs, counts = input.movedim(1, -1) if input.dim() > 1 else input, target != ignore_index
    logs, labels = logs.log_softmax(-1) * weight, target.where(counts, 0)
    per_class = label_smoothing / input.shape[min(input.dim() - 1, 1)]
    likelihood = logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    losses = -((1 - label_smoothing) * likelihood + per_class * logs.sum(-1)) * counts
    if reduction == "mean":
        return losses.sum() / (weight[labels] * counts).sum()
    return losses.sum() if reduction == "sum" else losses


def _refuse(function: Any, reason: str, *arguments: Any, **options: Any) -> Any:
    raise ValueError(f"{getattr(function, '__name__', function)} {reason}")


def _refuse_autograd(function: Any, *arguments: Any, **options: Any) -> Any:
    """Raise ValueError unless `torch.func`, which calls these functions itself, does so now."""
    frame, between = sys._getframe(1), (__name__, "torch.overrides", "torch.autograd", "torch._tensor")
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(between):
        frame = frame.f_back
    is_off = arguments[-1] is False or options.get("requires_grad") is False
    if is_off or frame.f_globals.get("__name__", "").startswith("torch._functorch"):
        return function(*arguments, **options)
    raise ValueError(
        "torch.autograd (grad, backward, requires_grad) does not work in a forward pass, which torch.func "
        "differentiates: use torch.func.grad, jacrev, jacfwd or hessian, and torch.func.vmap over examples"
    )


_AUTOGRAD = (
    *(torch.autograd.grad, Tensor.backward, Tensor.requires_grad_),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]  # a descriptor
)
_REFUSED = {  # functions by the reason
    "draws random numbers in a way that cannot be repeated for each task: draw with torch.rand, torch.randn, "
    "bernoulli or nn.functional.dropout": draws.REFUSED,
    "has no second derivative: average rows of nn.Embedding": [
        F.embedding_bag,
        *list_spellings("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"),
    ],
    "has no right second derivative: call nn.functional's instead": normalisation.KERNELS,
    "overwrites an embedding's weights in a pass": list_spellings("embedding_renorm_"),
}
_REPLACEMENTS: Replacements = {
    F.embedding: _embedding,
    F.glu: _glu,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.cross_entropy: _cross_entropy,
    F.hardsigmoid: _hardsigmoid,
    Tensor.data.__get__: lambda x: x.detach(),  # type: ignore[attr-defined]  # a descriptor
    **spell_out(
        {
            "embedding": _aten_embedding,
            "one_hot": _one_hot,
            "glu": _glu,
            "hardsigmoid": _hardsigmoid,
            "hardsigmoid_": lambda input: input.copy_(_hardsigmoid(input)),
            "select_scatter": _select_scatter,
        }
    ),
    **{function: partial(_refuse_autograd, function) for function in _AUTOGRAD},
    **{function: partial(_refuse, function, why) for why, those in _REFUSED.items() for function in those},
}
_REPLACEMENTS |= normalisation.REPLACEMENTS | linear_algebra.REPLACEMENTS
_DRAWING = draws.REPLACEMENTS | attention.REPLACEMENTS | recurrent.REPLACEMENTS
_ALLOCATIONS = frozenset(
    list_spellings(*(n for k in ("empty", "zeros", "ones", "full") for n in (k, f"{k}_like", f"new_{k}")))
)


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
        if func in _REPLACEMENTS:
            return _REPLACEMENTS[func](*args, **kwargs or {})
        if func in _DRAWING:
            return _DRAWING[func](self.draws, *args, **kwargs or {})
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func not in _ALLOCATIONS or self.like is None or result.requires_grad:
            return result
        return result + self.like.new_zeros((), dtype=result.dtype, device=result.device)


_NOTHING_TO_REPLACE = (
    *(nn.Sequential, nn.Linear, nn.Conv1d, nn.Conv2d, nn.ReLU, nn.Tanh),
    *(nn.Flatten, nn.Unflatten, nn.MaxPool2d),
)


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

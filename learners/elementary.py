"""A learner's forward pass from elementary operations: exact second derivatives, `vmap`, repeatable draws.

Meta-learning differentiates a forward pass twice, vectorised over tasks, and has to draw the same random
numbers again. PyTorch's fused functions get in the way: kernels of attention have no second derivative, those
of recurrent networks no rule for `vmap`, and random numbers come from a hidden state. The inner loop
(maml.py) therefore runs learners under `Elementary`, which substitutes such functions, one file for each
family of layers. All other functions run as they are, and the module is not changed.

    with Elementary(keys):
        outputs = functional_call(learner, weights, (x,))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.overrides import TorchFunctionMode

from learners import attention, draws, dropout, missing_rules, normalisation, recurrent

_FAMILIES = (draws, dropout, attention, recurrent, normalisation, missing_rules)
_REPLACEMENTS = {function: new for family in _FAMILIES for function, new in family.REPLACEMENTS.items()}
_ALLOCATIONS = {
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}


class Elementary(TorchFunctionMode):
    """A mode that substitutes functions; enter a new one for each forward pass.

    While a substitute runs, the mode is off: the functions that it calls are PyTorch's own.

    The pass raises ValueError for functions that cannot be substituted; the message says what to do.

    Args:
        keys: int64 `[2]`, two 32-bit words on which the random numbers depend (seed, task, pass); None: a
            pass that draws raises ValueError.
        like: any tensor of one task. Tensors that the pass allocates (`torch.zeros`) then belong to one task
            as well under `vmap`, and may be written to. None: `keys` serve.
    """

    def __init__(self, keys: Tensor | None = None, like: Tensor | None = None) -> None:
        super().__init__()
        self.random = draws.Draws(keys)
        self.like = keys if like is None else like

    @property
    def draws(self) -> int:
        """Calls that have drawn random numbers so far."""
        return self.random.calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(self.random, *args, **kwargs or {})
        result = func(*args, **kwargs) if kwargs else func(*args)
        return self._copy_for_task(result) if func in _ALLOCATIONS else result

    def _copy_for_task(self, allocated: Tensor) -> Tensor:
        if self.like is None or allocated.requires_grad:
            return allocated
        shape, dtype, device = allocated.shape, allocated.dtype, allocated.device
        return self.like.new_empty(shape, dtype=dtype, device=device).copy_(allocated)


_NOTHING_TO_REPLACE = (nn.Sequential, nn.Linear, nn.Conv2d, nn.ReLU, nn.Tanh, nn.Flatten, nn.MaxPool2d)


def is_elementary(module: nn.Module) -> bool:
    """Return whether `Elementary` would change nothing in the module, judging by the classes of its layers.

    Such a learner runs without the mode, which saves a few percent of a small network's time. The tool's own
    layers have a class attribute `elementary`.
    """
    return all(
        type(layer) in _NOTHING_TO_REPLACE or getattr(type(layer), "elementary", False)
        for layer in module.modules()
    )


class NoGradHolds(TorchFunctionMode):
    """A mode that makes `torch.no_grad` hold for forward-mode derivatives too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **kwargs or {})
        with _set_fwd_grad_enabled(False):
            return func(*args, **kwargs or {})

"""PyTorch's functions by each of the names under which a forward pass may call them.

`torch.layer_norm`, `torch.ops.aten.layer_norm` and `torch.ops.aten.layer_norm.default` are one function and
reach a `TorchFunctionMode` as different objects; so do `torch.det` and `Tensor.det`. Their arguments are
those of ATen, which may have another order than those of `torch.nn.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# PyTorch's function -> the one that runs instead: its arguments are the same, after a `Draws` if it draws.
Replacements = dict[Any, Callable[..., Any]]

_C: Any = torch._C  # whose stubs leave out some of these
_PLACES = (_C._VariableFunctions, Tensor, _C._nn, _C._linalg)


def list_spellings(*names: str) -> list[Any]:
    """Return every object by which ATen's functions of these names are called, as far as PyTorch has them."""
    forms = []
    for name in names:
        forms += [getattr(place, name) for place in _PLACES if hasattr(place, name)]
        if hasattr(torch.ops.aten, name):
            packet = getattr(torch.ops.aten, name)
            forms += [packet, *(getattr(packet, overload) for overload in packet.overloads())]
    return forms


def spell_out(replacements: dict[str, Callable[..., Any]]) -> Replacements:
    """Return replacements of functions that are given by ATen's names."""
    return {form: new for name, new in replacements.items() for form in list_spellings(name)}

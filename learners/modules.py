"""Make a user's module ready: unwrap it, give lazy layers their sizes, and convert it to a type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from common.batch import Tree, cast_tree, make_arguments
from learners.copies import UnfitError, describe_layer
from learners.heads import replace_module

# By class: the name of the module inside. `torch.compile` cannot be differentiated twice, and the tool
# compiles whole iterations; a batch of tasks is spread over devices by `torchrun`.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrap(module: nn.Module) -> nn.Module:
    """Take the module out of `torch.compile` and `DataParallel`, its layers too, in place.

    Raises UnfitError for a scripted layer.
    """
    layers = list(module.named_modules(remove_duplicate=False))
    for name, layer in layers:
        if isinstance(layer, torch.jit.ScriptModule):
            kind = "scripted: its derivatives cannot be followed; use the Python module that it was made from"
            raise UnfitError(f"{describe_layer(name, layer)} is {kind}")
    for name, layer in reversed(layers):  # the innermost first
        if layer._compiled_call_impl is not None:
            layer._compiled_call_impl = None  # of `nn.Module.compile`
        if inside := _WRAPPERS.get(type(layer).__name__):
            module = replace_module(module, name, layer.get_submodule(inside))
    return module


def has_lazy(module: nn.Module) -> bool:
    """Return whether a parameter or buffer waits for its size."""
    return any(is_lazy(t) for t in (*module.parameters(), *module.buffers()))


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode, in which dropout drops nothing; each layer's own mode returns on exit."""
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def materialise(module: nn.Module, x: Tree) -> None:
    """Give lazy layers the sizes that inputs x imply, by one pass in evaluation mode."""
    positional, keywords = make_arguments(cast_tree(x, torch.get_default_dtype()))
    with torch.no_grad(), in_evaluation_mode(module):
        module(*positional, **keywords)
    for name, layer in module.named_modules():
        if has_lazy(layer) and not any(has_lazy(child) for child in layer.children()):
            raise UnfitError(f"{describe_layer(name, layer)} is lazy, and no pass reaches it: give its size")


def convert_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert real and complex tensors to a type of real numbers and its complex counterpart, in place."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():  # there is no such type of half precision
            return tensor.to(torch.promote_types(dtype, torch.float32).to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return module._apply(convert)

"""Copy a user's module, and put back what a forward pass leaves in it.

A pass should be a function of tensors, but modules keep features of the last pass as attributes, and hooks
write to their owner. Such tensors belong to one task, and are dead once the pass is over.
"""

from __future__ import annotations

import copy
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
Alias = tuple[Any, Any, str]  # a dictionary or list, a key or position, and the name of the tensor there
_OPAQUE = (Tensor, type, types.ModuleType, str, bytes, int, float, complex, type(None))


class Notes(list[Any]):
    """A list to which a hook or a layer adds in a pass: `restore_containers` leaves it alone."""


class UnfitError(ValueError):
    """A module that cannot be a function of its weights; the message names the layer."""


def describe_layer(name: str, layer: nn.Module | str) -> str:
    """Return a layer's name and class for a message; `layer` may be the name of its class."""
    kind = layer if isinstance(layer, str) else type(layer).__name__
    return f"its layer {name} ({kind})" if name else f"the network ({kind})"


def describe_owner(module: nn.Module, name: str) -> str:
    """Return the name and class of the layer that a parameter or buffer belongs to."""
    layer = name.rpartition(".")[0]
    return describe_layer(layer, module.get_submodule(layer))


# ---- copies --------------------------------------------------------------------------------------


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy; what cannot be copied (a lock, a file) is shared.

    Functions that the module keeps, such as hooks, refer to the copy's layers where they referred to the
    module's. Raises UnfitError if a layer refuses to be copied.
    """
    memo: dict[int, Any] = {}
    try:
        copied = copy.deepcopy(module, memo)
    except Exception:  # a class may refuse in any way
        memo = _share_uncopyable(module)
        try:
            copied = copy.deepcopy(module, memo)
        except Exception as error:
            raise UnfitError(f"{_find_uncopyable(module)} cannot be copied ({error})") from error
    # not through functions, which still refer to the module
    for holder in find_holders(copied, skipped=types.FunctionType):
        if not isinstance(holder, set):
            for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
                if isinstance(value, types.FunctionType):
                    holder[key] = _bind_to_copies(value, memo)
    return copied


def _share_uncopyable(module: nn.Module) -> dict[int, Any]:
    """Return the memo of a deep copy that shares what cannot be copied, and detaches computed tensors."""
    memo: dict[int, Any] = {}
    for value in _reach(module):
        if isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif not _parts(value) and not isinstance(value, nn.Module):
            try:
                copy.deepcopy(value)
            except Exception:
                memo[id(value)] = value
    return memo


def _find_uncopyable(module: nn.Module) -> str:
    for name, layer in reversed(list(module.named_modules())):  # the innermost one
        try:
            copy.deepcopy(layer, _share_uncopyable(layer))
        except Exception:
            return describe_layer(name, layer)
    return describe_layer("", module)


def _bind_to_copies(value: Any, memo: dict[int, Any]) -> Any:
    """Return the copy of what has been copied; of a function, one that refers to copies."""
    if isinstance(value, types.MethodType):
        owner = _bind_to_copies(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if not isinstance(value, types.FunctionType) or id(value) in memo:
        return memo.get(id(value), value)
    memo[id(value)] = value  # a function may refer to itself
    cells = [_bind_cell(cell, memo) for cell in value.__closure__ or ()]
    defaults = [_bind_to_copies(default, memo) for default in value.__defaults__ or ()]
    changed = [a for a, b in zip(cells, value.__closure__ or (), strict=True) if a is not b]
    changed += [a for a, b in zip(defaults, value.__defaults__ or (), strict=True) if a is not b]
    if changed:
        name, arguments = value.__name__, tuple(defaults) or None
        new = types.FunctionType(value.__code__, value.__globals__, name, arguments, tuple(cells) or None)
        new.__kwdefaults__, new.__dict__ = value.__kwdefaults__, dict(vars(value))
        memo[id(value)] = new
    return memo[id(value)]


def _bind_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    content = _read_cell(cell)
    bound = [_bind_to_copies(value, memo) for value in content]
    return types.CellType(bound[0]) if bound and bound[0] is not content[0] else cell


def _read_cell(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


# ---- what a module holds -------------------------------------------------------------------------


def _parts(value: Any) -> Iterable[Any]:
    """Return the objects that a container, function or object holds; () if it is none of these."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, types.FunctionType):
        return [x for cell in value.__closure__ or () for x in _read_cell(cell)]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    root = type(value).__module__.partition(".")[0]
    is_users = root != "torch" and root not in sys.stdlib_module_names
    has_attributes = isinstance(value, nn.Module) or (is_users and hasattr(value, "__dict__"))
    return [vars(value)] if has_attributes else ()


def _reach(module: nn.Module, skipped: Any = ()) -> list[Any]:
    """Return the objects that a module holds, directly or not: tensors, containers, functions, layers.

    `skipped` are classes whose objects are not looked into.
    """
    stack: list[Any] = [module]
    by_id: dict[int, Any] = {}
    while stack:
        value = stack.pop()
        if id(value) not in by_id:
            by_id[id(value)] = value
            stack += () if isinstance(value, (_OPAQUE, skipped)) else _parts(value)
    return [value for value in by_id.values() if isinstance(value, Tensor) or not isinstance(value, _OPAQUE)]


def find_holders(module: nn.Module, skipped: Any = ()) -> list[Any]:
    """Return the dictionaries, lists and sets that a module holds, its layers' attributes among them."""
    return [value for value in _reach(module, skipped) if type(value) in _CONTAINERS]


def find_aliases(module: nn.Module, names: dict[int, str]) -> list[Alias]:
    """Return the other places where a module keeps its parameters and buffers.

    `names` are those of the tensors, by `id`. Raises UnfitError for a place that cannot be written to.
    """
    layers = [part for layer in module.modules() for part in (layer._parameters, layer._buffers)]
    regular = {id(part) for part in layers}
    places = []
    for value in _reach(module):
        parts = () if isinstance(value, Tensor) or id(value) in regular else _parts(value)
        if not any(id(part) in names for part in parts):
            continue
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            places += [(value, key, names[id(part)]) for key, part in pairs if id(part) in names]
        else:
            text = ", ".join(names[id(part)] for part in parts if id(part) in names)
            raise UnfitError(
                f"a {type(value).__name__} keeps {text}, which the inner loop cannot replace there"
            )
    return places


def find_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module holds in any way."""
    return [value for value in _reach(module) if isinstance(value, Tensor)]


def count_hidden_parameters(module: nn.Module) -> int:
    """Return how many parameters a module keeps where PyTorch does not look, as in a plain list of layers."""
    ids = {id(parameter) for parameter in module.parameters()}
    hidden = [t for t in find_tensors(module) if isinstance(t, nn.Parameter) and id(t) not in ids]
    return sum(parameter.requires_grad for parameter in hidden)


@contextmanager
def restore_containers(holders: list[Any]) -> Iterator[None]:
    """Put back on exit what the containers hold now."""
    before = [(holder, holder.copy()) for holder in holders]
    try:
        yield
    finally:
        for holder, content in before:
            holder.clear()
            (holder.update if isinstance(holder, dict | set) else holder.extend)(content)

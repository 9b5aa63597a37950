"""Why a learner cannot be meta-learned: which of its layers fails, and at what.

Called after a failure, whose message would name an operation of PyTorch but no layer of the user's.

    finding = culprit(learner, weights, (support_x,))     # Finding(layer="encoder.norm", kind="Norm", ...)
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

from learners.elementary import Elementary

Weights = dict[str, Tensor]

TASKS = 2  # that a layer is tried with


@dataclass(frozen=True)
class Finding:
    layer: str  # its name in the learner; "" is the learner itself
    kind: str  # its class
    problem: str  # at what it fails: "vectorise", "second derivative" or "forward mode"
    reason: str  # first line of the error, at most 120 characters


@dataclass
class _Call:
    """A layer's first call in a forward pass."""

    name: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]


def culprit(
    module: nn.Module, weights: Weights, inputs: tuple[Any, ...], keys: Tensor | None = None
) -> Finding | None:
    """The innermost layer, the first that returns, that fails when it is tried by itself; None: none does.

    Each layer is called with what it is given in a forward pass of the whole: vectorised over tasks, then
    differentiated twice in reverse, then in reverse over forward mode. A layer whose own layers all pass is
    named for what its own `forward` does. The module stays as it is: a copy of it is tried.

    Arguments:
        weights: the module's parameters by name, and any of its buffers.
        inputs: the arguments of its forward pass, of one task.
        keys: see `Elementary`.
    """
    module = copy.deepcopy(module)
    calls: list[_Call] = []
    running: list[str] = []
    try:
        with torch.no_grad(), _recorded(module, calls, running):
            _call(module, weights, inputs, {}, keys)
    except Exception as error:  # in the plainest of forward passes: the layer that has not returned
        name = running[-1] if running else ""
        return _finding(module, name, "vectorise", error)
    for call in calls:
        layer = module.get_submodule(call.name)
        prefix = f"{call.name}." if call.name else ""
        own = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        for problem, attempt in _ATTEMPTS.items():
            try:
                attempt(*_as_function(layer, own, call, keys))
            except Exception as error:
                return _finding(module, call.name, problem, error)
    return None


def _finding(module: nn.Module, name: str, problem: str, error: Exception) -> Finding:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Finding(
        name,
        type(module.get_submodule(name)).__name__,
        problem,
        textwrap.shorten(lines[0], 120, placeholder=" ..."),
    )


def _call(
    layer: nn.Module, weights: Weights, arguments: tuple[Any, ...], named: dict[str, Any], keys: Tensor | None
) -> Any:
    with Elementary(keys, next((t for t in pytree.tree_leaves((arguments, named)) if _real(t)), None)):
        return functional_call(layer, weights, arguments, named)


@contextmanager
def _recorded(module: nn.Module, calls: list[_Call], running: list[str]) -> Iterator[None]:
    """Appends to `calls` as layers return, those inside before those around them.

    `running` has the names of those that have not returned.
    """
    begun: list[_Call] = []

    def before(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            running.append(name)
            begun.append(_Call(name, *_copied((arguments, named))))

        return hook

    def after(layer: nn.Module, arguments: Any, named: Any, output: Any) -> None:
        running.pop()
        call = begun.pop()
        if all(call.name != other.name for other in calls):
            calls.append(call)

    handles = []
    for name, layer in module.named_modules():
        handles.append(layer.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(values: Any) -> Any:
    """With tensors of its own: a layer may write to what it is given."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), values)


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# ---- a layer as a function ------------------------------------------------------------------

Pass = Callable[[Weights, list[Tensor]], list[Tensor]]  # variables, constants -> outputs


def _as_function(
    layer: nn.Module, weights: Weights, call: _Call, keys: Tensor | None
) -> tuple[Pass, Weights, list[Tensor]]:
    """A layer of one task; its arguments for `TASKS` tasks: what to differentiate in, and the rest."""
    values, structure = pytree.tree_flatten((call.arguments, call.named))
    reals = {f"input {i}": v for i, v in enumerate(values) if _real(v)}
    others = {i: v for i, v in enumerate(values) if isinstance(v, Tensor) and not _real(v)}
    own = {name: w.detach() for name, w in weights.items() if _real(w)}
    held = {name: w.detach() for name, w in weights.items() if not _real(w)}

    def run(variables: Weights, constants: list[Tensor]) -> list[Tensor]:
        given = list(values)
        rest = iter(constants)
        for i, value in enumerate(values):
            if f"input {i}" in reals:
                given[i] = variables[f"input {i}"].clone()
            elif isinstance(value, Tensor):
                given[i] = next(rest)
        arguments, named = pytree.tree_unflatten(given, structure)
        mine = held | {name: variables[name] for name in own}
        output = _call(layer, mine, arguments, named, next(rest, None))
        return [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]

    constants = [*others.values(), *([] if keys is None else [keys])]
    return run, _for_tasks(own | reals), [_of_tasks(value) for value in constants]


def _of_tasks(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach()] * TASKS)


def _for_tasks(tensors: Weights) -> Weights:
    return {name: _of_tasks(tensor) for name, tensor in tensors.items()}


def _loss(run: Pass) -> Callable[[Weights, list[Tensor]], Tensor]:
    """A number that depends on all outputs, and whose gradient does so, too."""

    def loss(variables: Weights, constants: list[Tensor]) -> Tensor:
        outputs = [output for output in run(variables, constants) if _real(output)]
        return sum(((output + output**2).sum() for output in outputs), torch.zeros(()))

    return loss


def _vectorised(run: Pass, variables: Weights, constants: list[Tensor]) -> None:
    vmap(run)(variables, constants)


def _differentiated_twice(run: Pass, variables: Weights, constants: list[Tensor]) -> None:
    if variables:
        leaves = {name: tensor.requires_grad_() for name, tensor in variables.items()}
        gradients = vmap(grad(_loss(run)))(leaves, constants)
        total = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
        if total.requires_grad:
            torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        elif total > 0:
            raise RuntimeError("its backward pass cannot be differentiated (once_differentiable?)")


def _differentiated_in_forward_mode(run: Pass, variables: Weights, constants: list[Tensor]) -> None:
    def slope(variables: Weights, direction: Weights, constants: list[Tensor]) -> Tensor:
        return jvp(lambda variables: _loss(run)(variables, constants), (variables,), (direction,))[1]

    if variables:
        direction = {name: torch.ones_like(tensor) for name, tensor in variables.items()}
        grad(lambda variables: vmap(slope)(variables, direction, constants).sum())(variables)


_ATTEMPTS: dict[str, Callable[[Pass, Weights, list[Tensor]], None]] = {
    "vectorise": _vectorised,
    "second derivative": _differentiated_twice,
    "forward mode": _differentiated_in_forward_mode,
}

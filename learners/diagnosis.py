"""Find the layer because of which a learner cannot be meta-learned, and what it lacks.

Called after a failure, whose message names an operation of PyTorch but no layer of the user's.

    finding = find_failing_layer(learner, weights, (support_x,))  # Finding("encoder.norm", "Norm", ...)
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

from learners.elementary import Elementary

Weights = dict[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, and by name


@dataclass(frozen=True)
class Finding:
    """A layer that fails, and at what."""

    layer: str  # its name in the learner; "": the learner itself
    kind: str  # its class
    problem: str  # "vectorise", "second derivative" or "forward mode"
    reason: str  # first line of the error, at most 120 characters


def find_failing_layer(
    module: nn.Module, weights: Weights, inputs: tuple[Any, ...], keys: Tensor | None = None
) -> Finding | None:
    """Return the innermost layer that fails when it is tried by itself; None: every layer passes.

    A forward pass of the module shows with what each layer is called. With these arguments each layer is
    vectorised over tasks, then differentiated twice in reverse, then in reverse over forward mode. Layers
    are tried before those around them, so a layer whose children pass fails in its own `forward`. The
    module is copied, not changed.

    Args:
        weights: the module's parameters by name, and any of its buffers.
        inputs: the arguments of its forward pass, of one task.
        keys: int64 `[2]`; see `Elementary`.
    """
    module = copy.deepcopy(module)
    calls = _record_calls(module, weights, inputs, keys)
    for name in sorted(calls, key=lambda name: -len(name.split(".")) if name else 0):  # the deepest first
        layer = module.get_submodule(name)
        prefix = f"{name}." if name else ""
        layer_weights = {n[len(prefix) :]: w for n, w in weights.items() if n.startswith(prefix)}
        for problem, attempt in _ATTEMPTS.items():
            try:
                attempt(*_as_loss(layer, layer_weights, calls[name], keys))
            except Exception as error:  # an operator may fail in any way
                first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                reason = textwrap.shorten(first_line, 120, placeholder=" ...")
                return Finding(name, type(layer).__name__, problem, reason)
    return None


def _record_calls(
    module: nn.Module, weights: Weights, inputs: tuple[Any, ...], keys: Tensor | None
) -> dict[str, Arguments]:
    """Return the arguments of each layer's first call in a pass, by name, as far as the pass gets."""
    calls: dict[str, Arguments] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, *arguments: Any) -> None:
            # copied: a layer may write to its inputs
            copies = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), arguments)
            calls.setdefault(name, copies)

        return hook

    handles = [
        layer.register_forward_pre_hook(record(name), with_kwargs=True, prepend=True)
        for name, layer in module.named_modules()
    ]
    with torch.no_grad(), suppress(Exception):
        _call(module, weights, (inputs, {}), keys)
    for handle in handles:
        handle.remove()
    return calls


def _call(layer: nn.Module, weights: Weights, arguments: Arguments, keys: Tensor | None) -> Any:
    like = next((leaf for leaf in pytree.tree_leaves(arguments) if _is_real(leaf)), None)
    with Elementary(keys, like):
        return functional_call(layer, weights, *arguments)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# ---- a layer as a function ------------------------------------------------------------------

Tensors = dict[Any, Tensor]  # by ("weight", name), ("input", position) or "keys"
Loss = Callable[[Tensors, Tensors], Tensor]  # of variables and constants of one task


def _as_loss(
    layer: nn.Module, weights: Weights, arguments: Arguments, keys: Tensor | None
) -> tuple[Loss, Tensors, Tensors]:
    """Return a number that depends on all outputs, as does its gradient, and its arguments for two tasks."""
    leaves, structure = pytree.tree_flatten(arguments)
    tensors: Tensors = {("weight", name): weight for name, weight in weights.items()}
    tensors |= {("input", i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    tensors |= {} if keys is None else {"keys": keys}

    def loss(variables: Tensors, constants: Tensors) -> Tensor:
        values = variables | constants
        inputs = [
            values["input", i].clone() if ("input", i) in values else leaf for i, leaf in enumerate(leaves)
        ]
        substitutes = {name: values["weight", name] for name in weights}
        output = _call(layer, substitutes, pytree.tree_unflatten(inputs, structure), values.get("keys"))
        reals = [leaf for leaf in pytree.tree_leaves(output) if _is_real(leaf)]
        return sum(((real + real**2).sum() for real in reals), torch.zeros(()))

    of_tasks = {key: torch.stack([tensor.detach()] * 2) for key, tensor in tensors.items()}
    variables = {key: tensor for key, tensor in of_tasks.items() if _is_real(tensor)}
    return loss, variables, {key: tensor for key, tensor in of_tasks.items() if key not in variables}


def _vectorise(loss: Loss, variables: Tensors, constants: Tensors) -> None:
    with torch.no_grad():  # one task first: its error is the plainest
        loss(*({key: tensor[0] for key, tensor in tensors.items()} for tensors in (variables, constants)))
    vmap(loss)(variables, constants)


def _differentiate_twice(loss: Loss, variables: Tensors, constants: Tensors) -> None:
    if not variables:
        return
    leaves = {key: tensor.requires_grad_() for key, tensor in variables.items()}
    gradients = vmap(grad(loss))(leaves, constants)
    total = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
    if total.requires_grad:
        torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    elif total > 0:
        raise RuntimeError("its backward pass cannot be differentiated (once_differentiable?)")


def _differentiate_in_forward_mode(loss: Loss, variables: Tensors, constants: Tensors) -> None:
    def slope(variables: Tensors, direction: Tensors, constants: Tensors) -> Tensor:
        return jvp(lambda variables: loss(variables, constants), (variables,), (direction,))[1]

    if variables:
        direction = {key: torch.ones_like(tensor) for key, tensor in variables.items()}
        grad(lambda variables: vmap(slope)(variables, direction, constants).sum())(variables)


_ATTEMPTS: dict[str, Callable[[Loss, Tensors, Tensors], None]] = {
    "vectorise": _vectorise,
    "second derivative": _differentiate_twice,
    "forward mode": _differentiate_in_forward_mode,
}

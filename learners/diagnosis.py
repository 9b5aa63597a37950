"""Find out why a learner cannot be meta-learned: what it lacks, and which layer fails."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

from common.batch import first_tensor
from common.errors import one_line
from common.optimizers import Weights
from learners.elementary import Elementary
from learners.functional import call_with

Loss = Callable[[Weights, Any], Tensor]  # of the weights, and the inputs and keys of one task


class Finding(NamedTuple):
    """A layer that fails, and at what."""

    problem: str  # "vectorise", "second derivative" or "forward mode"
    layer: str  # name of the innermost layer whose forward fails; "": the learner as a whole
    kind: str  # its class
    reason: str  # the error, at most 120 characters


def find_failure(
    module: nn.Module, weights: Weights, inputs: tuple[Any, ...], keys: Tensor | None = None
) -> Finding | None:
    """Return what the learner lacks; None: nothing.

    `inputs` are one task's arguments of a forward pass, `keys` as in `Elementary`.
    """
    module = copy.deepcopy(module)  # its hooks tell which layer's forward pass fails
    running: list[str] = []  # layers whose forward has not returned

    def pop(*_: Any) -> None:
        running.pop()

    for name, layer in module.named_modules():
        layer.register_forward_pre_hook(lambda *_, name=name: running.append(name), prepend=True)
        layer.register_forward_hook(pop)

    def loss(weights: Weights, task: Any) -> Tensor:
        """Return a number that depends on all outputs, as does its gradient."""
        inputs, keys = pytree.tree_map_only(Tensor, Tensor.clone, task)  # a layer may write to its inputs
        with Elementary(keys[0] if keys else None, first_tensor(inputs)):
            output, _ = call_with(module, weights, inputs)
        reals = [leaf for leaf in pytree.tree_leaves(output) if leaf.is_floating_point()]
        return sum(((real + real**2).sum() for real in reals), torch.zeros(()))

    weights = {name: weight.detach() for name, weight in weights.items()}
    task = (inputs, [] if keys is None else [keys])
    tasks = pytree.tree_map_only(Tensor, lambda tensor: torch.stack([tensor.detach()] * 2), task)
    for problem, attempt in _ATTEMPTS.items():
        running.clear()
        try:
            attempt(loss, weights, tasks)
        except Exception as error:  # an operator may fail in any way
            layer_name = running[-1] if running else ""
            reason = textwrap.shorten(one_line(error), 120, placeholder=" ...")
            return Finding(problem, layer_name, type(module.get_submodule(layer_name)).__name__, reason)
    return None


def _vectorise(loss: Loss, weights: Weights, tasks: Any) -> None:
    with torch.no_grad():  # one task first: its error is the plainest
        loss(weights, pytree.tree_map_only(Tensor, lambda tensor: tensor[0], tasks))
    vmap(loss, (None, 0))(weights, tasks)


def _differentiate_twice(loss: Loss, weights: Weights, tasks: Any) -> None:
    variables = {name: w.clone().requires_grad_() for name, w in weights.items()}
    gradients = vmap(grad(loss), (None, 0))(variables, tasks)
    total = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
    if total.requires_grad:
        torch.autograd.grad(total, list(variables.values()), allow_unused=True)
    elif total > 0:
        raise RuntimeError("its backward pass cannot be differentiated (once_differentiable?)")


def _differentiate_in_forward_mode(loss: Loss, weights: Weights, tasks: Any) -> None:
    ones = {name: torch.ones_like(w) for name, w in weights.items()}

    def slope(weights: Weights, task: Any) -> Tensor:
        return jvp(lambda weights: loss(weights, task), (weights,), (ones,))[1]

    grad(lambda weights: vmap(slope, (None, 0))(weights, tasks).sum())(weights)


_ATTEMPTS = {
    "vectorise": _vectorise,
    "second derivative": _differentiate_twice,
    "forward mode": _differentiate_in_forward_mode,
}

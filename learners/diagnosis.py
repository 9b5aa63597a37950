"""Find out why a learner cannot be meta-learned: what it lacks, and which layer fails or is wrong.

Called after a failure, whose message names an operation of PyTorch but no layer of the user's, or after a
gradient check that failed (training/gradient_check.py).
"""

from __future__ import annotations

import sysconfig
import textwrap
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import get_total_norm
from torch.utils import _pytree as pytree

from common.batch import Tree, cast_tree, first_tensor, index_tree, tree_map
from common.errors import fold_message
from common.optimizers import Weights
from common.task import Extras, Task
from learners.batch_norm import join_names
from learners.copies import Notes, copy_module, describe_layer
from learners.elementary import Elementary
from learners.functional import FunctionalLearner, call_with
from learners.modules import convert_type
from learners.spectral_norm import vector_names

Loss = Callable[[Weights, Any], Tensor]  # of the weights, and the inputs and extras of one task
OverTasks = Callable[..., Callable[..., Any]]  # `vmap`, or a loop


_OF_MODULES = vars(nn.Module()).keys()
NO_CHECKPOINT = (
    "torch.utils.checkpoint does not work here: call the layer itself; --tasks-at-once saves memory"
)


class Finding(NamedTuple):
    """A layer that fails, and at what."""

    problem: str  # a key of `ATTEMPTS`, or "wrong derivative"
    layer: str  # name of the innermost layer whose forward fails; "": the learner as a whole
    kind: str  # its class
    reason: str  # place in the code and error, at most 160 characters; or how far a derivative is off

    @property
    def place(self) -> str:
        return describe_layer(self.layer, self.kind)


def find_failure(
    call: FunctionalLearner,
    x: Tree,
    keys: Tensor | None,
    over_tasks: OverTasks,
    problems: Sequence[str] | None = None,
) -> Finding | None:
    """Return what the learner lacks; None: nothing.

    Args:
        x: one task's inputs.
        keys: as in `Elementary`.
        over_tasks: makes a function of tasks of one of a task.
        problems: those of `ATTEMPTS` to look for; None: all.
    """
    module = copy_module(call.module)  # its hooks tell which layer's forward pass fails
    running = Notes()
    watch(module, running)

    def loss(weights: Weights, task: tuple[Tree, Extras]) -> Tensor:
        """Return a number that depends on all outputs, as does its gradient."""
        x, extras = pytree.tree_map_only(Tensor, Tensor.clone, task)  # a layer may write to its inputs
        output = call(weights, x, extras, module=module)
        reals = [leaf for leaf in pytree.tree_leaves(output) if leaf.is_floating_point()]
        return sum(((real + real**2).sum() for real in reals), torch.zeros((), device=first_tensor(x).device))

    two_keys = None if keys is None else torch.stack([keys, keys])
    tasks = tree_map(lambda t: torch.stack([t.detach()] * 2), x), call.extras(2, two_keys)
    for problem in problems or ATTEMPTS:
        running.clear()
        try:
            ATTEMPTS[problem](loss, call.parameters, tasks, over_tasks)
        except Exception as error:  # an operator may fail in any way
            layer_name = running[-1] if running else ""
            frames = traceback.extract_tb(error.__traceback__)
            checkpoints = any(
                Path(frame.filename).parts[-2:] == ("utils", "checkpoint.py") for frame in frames
            )
            text = f"{locate_error(error)}{NO_CHECKPOINT if checkpoints else fold_message(error)}"
            reason = textwrap.shorten(text, 160, placeholder=" ...")
            return Finding(problem, layer_name, type(module.get_submodule(layer_name)).__name__, reason)
    return None


@torch.no_grad()
def find_followers(call: FunctionalLearner, x: Tree, keys: Tensor) -> list[str]:
    """Return the buffers that a pass changes by the weights alone, as a power iteration does.

    Those of converted spectral norms follow any weights, and are left out.
    """

    def after(weights: Weights, x: Tree) -> Weights:
        changed: Weights = {}
        call(weights, x, Extras(keys), changed=changed)
        return changed

    alike = tree_map(lambda t: t[:1].expand_as(t) * (0.5 if t.is_floating_point() else 1), x)
    of_x, of_others = after(call.parameters, x), after(call.parameters, alike)
    of_weights = after({n: w + 0.5 * w.roll(1, 0) if w.dim() else w for n, w in call.parameters.items()}, x)
    names = call.buffers.keys() - vector_names(call.module)
    equal = torch.equal
    return sorted(n for n in names if equal(of_x[n], of_others[n]) and not equal(of_x[n], of_weights[n]))


@torch.no_grad()
def find_carried(call: FunctionalLearner, x: Tree, keys: Tensor) -> list[str]:
    """Return the attributes by which a pass would change the next one, if they were not put back after it.

    Numbers, such as a counter, are among them whether or not they are read at once.
    """
    module, notes = copy_module(call.module), Notes()
    before = {name: _read_attributes(layer) for name, layer in module.named_modules()}

    def compare(*_: Any) -> None:
        for name, layer in module.named_modules():
            for key, value in _read_attributes(layer).items():
                old = before.get(name, {}).get(key, getattr(type(layer), key, None))
                if value != old if isinstance(value, int | float) else not _is_same(value, old):
                    notes.append((name, key, value))

    def repeat(changes: list[tuple[str, str, Any]]) -> bool:
        again = copy_module(call.module)
        for name, key, value in changes:
            vars(again.get_submodule(name))[key] = value
        leaves = map(pytree.tree_leaves, (call(call.parameters, x, Extras(keys), module=again), outputs))
        return all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*leaves, strict=True))

    module.register_forward_hook(compare)
    outputs = call(call.parameters, x, Extras(keys), module=module)
    numbers = [change for change in notes if isinstance(change[2], int | float)]
    others = [change for change in notes if not isinstance(change[2], int | float)]
    read = [] if repeat(others) else [change for change in others if not repeat([change])] or others
    return [join_names(name, key) for name, key, _ in numbers + read]


@torch.no_grad()
def mixes_examples(call: FunctionalLearner, task: Task) -> bool:
    """Return whether the last query example changes the outputs of the others in an inductive pass."""
    count = len(first_tensor(task.query_x))
    changed = tree_map(lambda t: torch.cat([t[:-1], t[:1]]), task.query_x)
    with suppress(Exception):  # the learner may not take so large a set
        pairs = (call.query(call.parameters, t, "inductive") for t in (task, replace(task, query_x=changed)))
        leaves = zip(*map(pytree.tree_leaves, pairs), strict=True)
        others = [(a[:-1], b[:-1]) for a, b in leaves if a.shape[:1] == (count,) and count > 1]
        return not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max())) for a, b in others)
    return False


def _read_attributes(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's own attributes, containers as they are now."""
    kinds = list | dict | set | deque
    attributes = {key: value for key, value in vars(layer).items() if key not in _OF_MODULES}
    return {key: value.copy() if isinstance(value, kinds) else value for key, value in attributes.items()}


def _is_same(value: Any, old: Any) -> bool:
    if type(value) is not type(old) or not isinstance(value, list | dict | set | deque):
        return value is old
    parts, olds = ([*v, *v.values()] if isinstance(v, dict) else [*v] for v in (value, old))
    return len(parts) == len(olds) and all(a is b for a, b in zip(parts, olds, strict=True))


def watch(module: nn.Module, running: Notes) -> None:
    """Let the list name the layers whose forward pass has not returned."""

    def pop(*_: Any) -> None:
        running.pop()

    for name, layer in module.named_modules():
        layer.register_forward_pre_hook(lambda *_, name=name: running.append(name), prepend=True)
        layer.register_forward_hook(pop)


@contextmanager
def blame_layer(module: nn.Module) -> Iterator[None]:
    """Let an error in the block say in which layer's forward pass it happened."""
    running = Notes()
    watch(module, running)
    try:
        yield
    except Exception as error:
        if running and running[-1]:
            layer = describe_layer(running[-1], module.get_submodule(running[-1]))
            raise ValueError(f"{fold_message(error)}, in {layer}") from error
        raise


def locate_error(error: BaseException) -> str:
    """Return the innermost place in code that is neither PyTorch's nor this tool's: "file.py:12: ", or ""."""
    ours, packages = Path(__file__).parents[1], Path(torch.__file__).parents[1]
    not_theirs = [ours / wing for wing in ("commands", "common", "evaluation", "learners", "training")]
    not_theirs += [ours / "maml.py", packages / "torch"]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        is_pythons = file.is_relative_to(sysconfig.get_path("stdlib")) and not file.is_relative_to(packages)
        if not is_pythons and not any(file.is_relative_to(path) for path in not_theirs):
            return f"{file.name}:{frame.lineno}: "
    return ""


def _call_once(loss: Loss, weights: Weights, tasks: Any, over_tasks: OverTasks) -> None:
    with torch.no_grad():
        loss(weights, index_tree(tasks, 0))


def _differentiate(loss: Loss, weights: Weights, tasks: Any, over_tasks: OverTasks) -> None:
    grad(loss)(weights, index_tree(tasks, 0))


def _vectorise(loss: Loss, weights: Weights, tasks: Any, over_tasks: OverTasks) -> None:
    over_tasks(loss, (None, 0))(weights, tasks)
    over_tasks(grad(loss), (None, 0))(weights, tasks)


def _differentiate_twice(loss: Loss, weights: Weights, tasks: Any, over_tasks: OverTasks) -> None:
    variables = {name: w.clone().requires_grad_() for name, w in weights.items()}
    gradients = over_tasks(grad(loss), (None, 0))(variables, tasks)
    total = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
    if total.requires_grad:
        torch.autograd.grad(total, list(variables.values()), allow_unused=True)
    elif total > 0:
        raise RuntimeError("its backward pass cannot be differentiated (once_differentiable?)")


def _differentiate_in_forward_mode(loss: Loss, weights: Weights, tasks: Any, over_tasks: OverTasks) -> None:
    ones = {name: torch.ones_like(w) for name, w in weights.items()}

    def slope(weights: Weights, task: Any) -> Tensor:
        return jvp(lambda weights: loss(weights, task), (weights,), (ones,))[1]

    grad(lambda weights: over_tasks(slope, (None, 0))(weights, tasks).sum())(weights)


# In this order: each needs what those before it do.
ATTEMPTS = {
    "forward pass": _call_once,
    "derivative": _differentiate,
    "vectorise": _vectorise,
    "second derivative": _differentiate_twice,
    "forward mode": _differentiate_in_forward_mode,
}


# ---- wrong second derivatives --------------------------------------------------------------------

# Distance of a central difference of gradients, and the relative error that is tolerated.
RESOLUTION = {torch.float64: (1e-6, 1e-4), torch.float32: (1e-2, 2e-2)}


def find_wrong_layer(
    module: nn.Module, weights: Weights, x: Tree, keys: Tensor | None = None
) -> Finding | None:
    """Return the first innermost layer whose second derivatives disagree with differences of its gradient.

    `module` has not run; `weights` are its own, `x` one task's inputs, both in float64, or in float32 for a
    module that does not run in float64. None: each layer by itself is right.
    """
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []  # in the order in which they end
    clean, module = dict(module.named_modules()), copy_module(module)
    for name, layer in module.named_modules():
        layer.register_forward_hook(
            lambda layer, args, options, _, name=name: calls.append((name, layer, args, options)),
            with_kwargs=True,
        )
    with torch.no_grad(), Elementary(keys, first_tensor(x)):
        call_with(module, weights, x)
    of_float64 = next(iter(weights.values())).dtype == torch.float64
    for name, layer, args, options in calls:
        prefix, problem = f"{name}." if name else "", None
        inner = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        # in float32, a difference crosses too many kinks of a whole network
        kinds = (torch.float64,) if of_float64 or any(layer.children()) else (torch.float64, torch.float32)
        for dtype in kinds:
            with suppress(Exception):  # what is no function of tensors alone cannot be wrong by itself
                copied = convert_type(copy_module(clean[name]), dtype)
                call = pytree.tree_map_only(Tensor, partial(cast_tree, dtype=dtype), (args, options))
                error = _find_wrong_order(copied, cast_tree(inner, dtype), call, keys)
                problem = error and (problem or error)  # the more precise one, if both are wrong
                if error is None:
                    break
        if problem:
            return Finding("wrong derivative", name, type(clean[name]).__name__, problem)
    return None


def _find_wrong_order(layer: nn.Module, weights: Weights, call: Any, keys: Tensor | None) -> str | None:
    """Return which of the two orders of differentiation is wrong for a layer called so, and how far off."""
    leaves, structure = pytree.tree_flatten((weights, call))
    real = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    # off the kink at 0 of what dropout or a ReLU has left
    start = [leaf + 1e-3 * draw(leaf) for leaf, chosen in zip(leaves, real, strict=True) if chosen]
    v = [draw(x) for x in start]

    def value(variables: list[Tensor]) -> Tensor:
        rest = iter([x.clone() for x in variables])  # a layer may write to its inputs
        parts = [next(rest) if chosen else leaf for leaf, chosen in zip(leaves, real, strict=True)]
        weights, (args, options) = pytree.tree_unflatten(parts, structure)
        with Elementary(keys, variables[0]):
            outputs = functional_call(layer, weights, args, options)
        reals = [leaf for leaf in pytree.tree_leaves(outputs) if leaf.is_floating_point()]
        return sum(((real.sin() + real**2).sum() for real in reals), torch.zeros(()))

    def differences(distance: float) -> list[Tensor]:
        ends = [
            grad(value)([x + d * u for x, u in zip(start, v, strict=True)]) for d in (distance, -distance)
        ]
        return [(ahead - behind) / (2 * distance) for ahead, behind in zip(*ends, strict=True)]

    def product(x: list[Tensor], v: list[Tensor]) -> Tensor:
        return torch.stack([(g * u).sum() for g, u in zip(grad(value)(x), v, strict=True)]).sum()

    def slope(x: list[Tensor], v: list[Tensor]) -> Tensor:
        return jvp(value, (x,), (v,))[1]

    orders = {"forward mode": grad(slope), "reverse mode": grad(product)}
    distance, tolerance = RESOLUTION[start[0].dtype]
    references = [differences(distance), differences(distance / 100)]
    two = [torch.stack([u, u]) for u in v]
    for name, order in orders.items():
        with suppress(Exception):  # an order may fail where the other one is wrong
            second = [part[0] for part in vmap(order, (None, 0))(start, two)]
            error = min(_relative_error(second, reference) for reference in references)
            if error > tolerance:
                return f"{error:.1%} off in {name}"
            if isnan(error) and all(part.isfinite().all() for part in references[0]):
                return f"not finite in {name}"
    return None


def _relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    difference = get_total_norm([x - y for x, y in zip(a, b, strict=True)])
    return (difference / get_total_norm(b).clamp(min=1e-12)).item()

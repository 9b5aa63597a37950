"""Ways to the meta-gradient of all tasks at once. Each takes a `MAML` and gives sums over a chunk of tasks.

    unrolled   exact or first order; differentiates through the whole inner loop
    adjoint    the same numbers; walks back through the inner loop, one step in memory at a time
    implicit   iMAML: from the end of the inner loop alone, by conjugate gradients
    reptile    how far the inner loop has moved, on support and query together
    joint      no inner loop: the gradient on support and query together, as in pretraining

The functions that they are made of go through `accelerate` one by one, which may compile them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from common.batch import Tree, append_axes, first_tensor, index_tree, tree_map
from common.choices import ENGINES, check_choice
from common.optimizers import Weights
from common.task import MetaGradient, Task, sum_over_tasks
from maml import MAML, MASS, SQUARE, Way
from training.adjoint import (
    SAME,
    TASKS,
    Accelerate,
    Walk,
    adjoint,
    gradient_of_slopes,
    query_gradient,
    run_as_is,
)


def make_meta_gradient(
    maml: MAML, *, engine: str = "unrolled", accelerate: Accelerate = run_as_is, in_transform: bool = False
) -> Callable[..., MetaGradient]:
    """Return the meta-gradient of the algorithm's choices, to be called like `MAML.meta_gradient`.

    With Reptile, `order` is of support and query together.

    Args:
        engine: how an exact or first-order one is computed, to the same numbers: "unrolled" or "adjoint".
        accelerate: makes a faster function of a vectorised function of tensors (see compiler.py).
        in_transform: it will be called inside a transform of `torch.func`, such as `vmap` over runs.
    """
    check_choice("engine", engine, ENGINES)
    ways = {"reptile": reptile, "implicit": implicit, "joint": joint}
    make = ways.get(maml.choices.meta_gradient)
    if make is None and (engine == "unrolled" or not maml.steps):
        way = unrolled(maml, accelerate, in_transform=in_transform)
    else:
        way = (make or adjoint)(maml, accelerate)
    return partial(maml.meta_gradient, way=way)


def unrolled(maml: MAML, accelerate: Accelerate, *, in_transform: bool) -> Way:
    """Reverse over reverse: the derivative of the whole inner loop."""

    def by_autograd(parameters: Weights, tasks: Task, *step_weights: Tensor) -> tuple[Any, ...]:
        # `MAML.unrolled`; autograd spends less on an operation than `torch.func`: a quarter of a small
        # network's time
        leaves = {name: w.detach().requires_grad_() for name, w in parameters.items()}
        total, outcome = maml.total_loss(leaves, tasks, *step_weights)
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        loss, outputs, statistics = tree_map(Tensor.detach, tuple(outcome))
        return dict(zip(leaves, gradients, strict=True)), loss, outputs, sum_over_tasks(statistics)

    gradient = accelerate(maml.unrolled if in_transform else by_autograd)
    # None is no tensor, which a compiled function could take
    return lambda *arguments: MetaGradient(*gradient(*(part for part in arguments if part is not None)))


# ---- without unrolling ---------------------------------------------------------------------------


def implicit(maml: MAML, accelerate: Accelerate) -> Way:
    """iMAML (Rajeswaran et al. 2019): the inner loop has found the minimum of L + lambda / 2 |w - start|^2.

    With v the gradient of the query loss Q and H the Hessian of the support loss L, both at the end, the
    meta-gradient is the solution x of (I + H / lambda) x = v, which conjugate gradients find. Weights s that
    are not adapted have dQ/ds - (d2L/ds dw) x / lambda. `cg_steps` 0 is first order; `cg_damping` is added to
    I, as the authors do, and 0 is exact.
    """
    choices, strength = maml.choices, maml.optimizer.proximal
    walk = Walk(maml, accelerate)
    query_of = accelerate(maml.over_tasks(query_gradient(maml), (TASKS, SAME, TASKS)))
    slopes = accelerate(gradient_of_slopes(maml, TASKS))

    @torch.no_grad()
    def way(parameters: Weights, tasks: Task, step_weights: Tensor | None) -> MetaGradient:
        _, last, shared = walk.to_end(parameters, tasks)
        extras = replace(last.query.extras, mask=tasks.support_mask)
        support = (tasks.support_x, tasks.support_y, extras)
        (v, u), (losses, (outputs, _)) = query_of(last.after.fast, shared.weights, last.query)

        def product(x: Weights) -> Weights:
            second, _ = slopes(last.after.fast, shared.weights, x, *support)
            return {n: (1 + choices.cg_damping) * x[n] + second[n] / strength for n in x}

        gradients, x = sum_over_tasks(u), v
        if choices.cg_steps:
            x = conjugate_gradients(product, v, choices.cg_steps)
            _, mixed = slopes(last.after.fast, shared.weights, x, *support)
            gradients = {n: g - mixed[n] / strength for n, g in gradients.items()}
        return MetaGradient(_fill_gradients(parameters, gradients | sum_over_tasks(x)), losses, outputs, {})

    return way


def conjugate_gradients(product: Callable[[Weights], Weights], b: Weights, steps: int) -> Weights:
    """Solve A x = b approximately for each task, starting at x = b; `b` is `[tasks, ...]` by name.

    `product` maps x to A x, and A is symmetric. A task stops where its residual vanishes, or where it meets a
    direction in which A is not positive: A is positive definite at a minimum, and only there is the
    system meaningful.
    """

    def dot(a: Weights, b: Weights) -> Tensor:
        return torch.stack([(a[n] * b[n]).flatten(1).sum(1) for n in a]).sum(0)

    def move(a: Weights, length: Tensor, b: Weights) -> Weights:
        return {n: a[n] + append_axes(length, a[n].dim()) * b[n] for n in a}

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)

    x = b
    residual = {n: b[n] - p for n, p in product(x).items()}
    direction = residual
    size = dot(residual, residual)
    going = size > 0
    for _ in range(steps):
        mapped = product(direction)
        curvature = dot(direction, mapped)
        going = going & (curvature > 0)
        length = torch.where(going, ratio(size, curvature), 0.0)
        x = move(x, length, direction)
        residual = move(residual, -length, mapped)
        new_size = dot(residual, residual)
        direction = move(residual, ratio(new_size, size), direction)
        size = new_size
    return x


def reptile(maml: MAML, accelerate: Accelerate) -> Way:
    """Nichol, Achiam and Schulman (2018): start minus adapted weights, instead of a gradient.

    A task's support and query together are what its inner loop learns from; its query loss is measured on a
    part of that.
    """
    walk = Walk(maml, accelerate)
    query_loss = accelerate(maml.over_tasks(maml.query_loss, (TASKS, SAME, TASKS)))

    @torch.no_grad()
    def way(parameters: Weights, tasks: Task, step_weights: Tensor | None) -> MetaGradient:
        start, last, shared = walk.to_end(parameters, tasks.pooled(axis=1))
        state, query = last.after, replace(tasks, order=None, extras=last.query.extras)
        losses, (outputs, _) = query_loss(state.fast, shared.weights, query)
        moved = {name: (w - state.fast[name]).sum(0) for name, w in start.fast.items()}
        if maml.optimizer.is_carried:
            squares, mass = start.slots["square"], start.slots["count"]["mass"]
            moved |= {SQUARE + n: (s - state.slots["square"][n]).sum(0) for n, s in squares.items()}
            moved[MASS] = (mass - state.slots["count"]["mass"]).sum(0)
        return MetaGradient(_fill_gradients(parameters, moved), losses, outputs, {})

    return way


def joint(maml: MAML, accelerate: Accelerate) -> Way:
    """The gradient of the mean loss on support and query together, nothing adapted: pretraining."""

    def one_task(parameters: Weights, task: Task) -> tuple[Weights, Tensor, Tree]:
        gradients, outputs = grad(partial(pooled_loss, maml), has_aux=True)(parameters, task)
        queries = len(first_tensor(task.query_y))
        outputs = index_tree(outputs, slice(-queries, None))
        return gradients, maml.loss(outputs, task.query_y, task.for_query(0).extras), outputs

    gradient = accelerate(maml.over_tasks(one_task, (SAME, TASKS)))

    def way(parameters: Weights, tasks: Task, step_weights: Tensor | None) -> MetaGradient:
        gradients, losses, outputs = gradient(parameters, tasks)
        return MetaGradient(_fill_gradients(parameters, sum_over_tasks(gradients)), losses, outputs, {})

    return way


def pooled_loss(maml: MAML, parameters: Weights, task: Task) -> tuple[Tensor, Tree]:
    """Return the loss of a task's support and query together, with nothing adapted, and the outputs."""
    pool = task.pooled()
    extras = task.extras.for_pass("query", mask=pool.support_mask)
    outputs = maml.call(maml.start(parameters).fast | parameters, pool.support_x, extras)
    return maml.loss(outputs, pool.support_y, extras), outputs


def _fill_gradients(parameters: Weights, gradients: Weights) -> Weights:
    """Return gradients of all meta-parameters, zero for those without one."""
    return {name: gradients.get(name, torch.zeros_like(w)) for name, w in parameters.items()}

"""Ways to the meta-gradient: functions of meta-parameters and a chunk of tasks, all tasks at once.

Each takes `(parameters, schedule, task)`, the task being the four tensors of a `TaskBatch` and the tasks'
extras (see inner_loop.py), and gives sums over the tasks of the chunk. The functions that they are made of
are vectorised, and go through `accelerate` one by one.

    Unrolled   exact or first order; differentiates through the whole inner loop
    Adjoint    the same numbers; walks back through the inner loop, one step in memory at a time
    Implicit   iMAML: from the end of the inner loop alone, by conjugate gradients
    Reptile    how far the inner loop has moved, on support and query together
    Joint      no inner loop: the gradient on support and query together, as in pretraining
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp

from common.batch import Tree, first_tensor, tree_map
from common.optimizers import InnerState, Weights
from inner_loop import MASS, SQUARE, InnerLoop, Passed, Shared, mean_of_both, minibatch, pass_around, stacked

Accelerate = Callable[..., Callable[..., Any]]  # of a function, and Inductor's options for it

PER_TASK, SAME = 0, None  # axes for vmap
TASK = 5 * [PER_TASK]  # of support, query and extras


class Sums(NamedTuple):
    """Over the tasks of a chunk."""

    gradients: Weights  # by meta-parameter, summed over tasks
    losses: Tensor  # [tasks], query loss after the last inner step
    outputs: Tree  # [tasks, query examples, ...]
    statistics: Weights  # [steps, 2, channels] by layer, summed over tasks; empty where not recorded


class Unrolled:
    """Reverse over reverse: the derivative of the whole inner loop."""

    def __init__(self, loop: InnerLoop, accelerate: Accelerate, *, in_transform: bool = False) -> None:
        self.loop = loop
        # autograd has less to do for an operation than a transform, a quarter of the time of a small network
        self.gradient = accelerate(self._by_transform if in_transform else self._by_autograd)

    def __call__(self, parameters: Weights, schedule: Weights, *task: Any) -> Sums:
        return Sums(*self.gradient(parameters, schedule, *task))

    def _total(self, parameters: Weights, schedule: Weights, *task: Any) -> tuple[Tensor, Passed]:
        objective = self.loop.over_tasks(lambda *one: self.loop.objective(parameters, schedule, *one))
        totals, passed = objective(*task)
        return totals.sum(), passed

    def _by_transform(self, *arguments: Any) -> tuple[Any, ...]:
        gradients, passed = grad(self._total, has_aux=True)(*arguments)
        return gradients, passed.loss, passed.outputs, _sum_over_tasks(passed.statistics)

    def _by_autograd(self, parameters: Weights, *others: Any) -> tuple[Any, ...]:
        leaves = {name: w.detach().requires_grad_() for name, w in parameters.items()}
        total, passed = self._total(leaves, *others)
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        named = dict(zip(leaves, gradients, strict=True))
        outputs = tree_map(Tensor.detach, passed.outputs)
        return named, passed.loss.detach(), outputs, _sum_over_tasks(passed.statistics)


class InnerSteps:
    """The inner loop of all tasks, a step at a time.

    Before the first step all tasks have the same weights, unless they start apart: that step, and what is
    derived from it, has functions of its own, in which they are shared.
    """

    def __init__(self, loop: InnerLoop, accelerate: Accelerate) -> None:
        self.loop = loop
        optimizer = loop.optimizer
        self.keeps_gradients = not optimizer.linear or loop.inner_rates != "fixed"
        self.first = accelerate(loop.over_tasks(self._step, (SAME, SAME, PER_TASK, PER_TASK, PER_TASK)))
        self.next = accelerate(loop.over_tasks(self._step, (PER_TASK, SAME, PER_TASK, PER_TASK, PER_TASK)))

    def _step(self, *arguments: Any) -> tuple[InnerState, Weights, Weights, Weights]:
        state, gradients, statistics, buffers = self.loop.inner_step(*arguments)
        return state, gradients if self.keeps_gradients else {}, statistics, buffers

    def start(self, parameters: Weights, task: tuple[Any, ...]) -> InnerState:
        """The state of all tasks, or of each, before the first step."""
        if not self.loop.starts_apart:
            return self.loop.start(parameters)
        of_task = self.loop.over_tasks(self.loop.start, (SAME, PER_TASK, PER_TASK, PER_TASK))
        # each task's of its own: forward mode refuses tensors that share their memory
        return tree_map(Tensor.contiguous, of_task(parameters, task[0], task[1], task[4]))

    def apart(self, step: int) -> bool:
        """Whether tasks have weights of their own before that step."""
        return step > 0 or self.loop.starts_apart

    def take(self, step: int, *arguments: Any) -> tuple[InnerState, Weights, Weights, Weights]:
        return (self.next if self.apart(step) else self.first)(*arguments)


class Adjoint:
    """Reverse over forward, one inner step at a time.

    An inner step is state' = update(state, g, shared) with g the gradient of the support loss L at
    (w, s): the fast weights and the weights that all tasks share. Given the cotangents of state', those of
    state, g and shared come from the update rule, which is elementwise. The cotangent of g, call it c, goes
    on to w and s as (d2L/dw dw) c and (d2L/ds dw) c: the gradient, in w and s, of one number, the slope of L
    along c. First order leaves it out.
    """

    def __init__(self, loop: InnerLoop, accelerate: Accelerate) -> None:
        self.loop = loop
        self.steps = InnerSteps(loop, accelerate)
        self.query = accelerate(loop.over_tasks(loop.query_gradient, (PER_TASK, SAME, *TASK)))
        self.back_in_next = accelerate(self._back(PER_TASK))
        self.back_in_first = accelerate(self._back(SAME))

    @torch.no_grad()
    def __call__(self, parameters: Weights, schedule: Weights, *task: Any) -> Sums:
        loop, weights = self.loop, schedule.get("step_weights")
        (start, shared), pull, *_ = vjp(lambda parameters: self._prepared(parameters, task), parameters)
        state, seen = start, []
        path: list[Any] = []  # the state before each step, where it is looked at again
        looks_back = weights is not None or not self.passes_through
        for step in range(loop.steps):
            examples = _minibatches(loop, task, step)
            before = state if looks_back else None
            state, gradients, statistics, buffers = self.steps.take(step, state, shared[step], *examples)
            task = _with_buffers(task, buffers)
            path.append((before, gradients, examples, _query_of(task, step + 1)))
            seen.append(statistics)

        of_shared: list[Shared] = []
        cotangent: InnerState | None = None
        for step in reversed(range(loop.steps)):
            last = step == loop.steps - 1
            direct: Weights = {}
            *before_step, query = path.pop()
            if last or weights is not None:
                (v, u), found = self.query(state.fast, shared[step].weights, *query)
                if last:
                    losses, outputs, _ = found
                seen[step] = mean_of_both(seen[step], found[2])
                u = _sum_over_tasks(u)
                if weights is not None:
                    v, u = ({n: weights[step] * x for n, x in part.items()} for part in (v, u))
                cotangent = _with(cotangent, v, state)
                direct = u
            assert cotangent is not None
            state, gradients, examples = before_step
            apart = self.steps.apart(step)
            back = self.back_in_next if apart else self.back_in_first
            if self.passes_through:
                of = Shared({n: torch.zeros_like(w) for n, w in shared[step].weights.items()}, {}, {})
                cotangent = cotangent if apart else InnerState(_sum_over_tasks(cotangent.fast), {})
            else:
                cotangent, of = back(state, shared[step], gradients, cotangent, *examples)
            of_shared.append(of._replace(weights=_plus(of.weights, direct)))
        assert cotangent is not None
        (summed,) = pull((cotangent, of_shared[::-1]))
        return Sums(summed, losses, outputs, _sum_over_steps(seen))

    @property
    def passes_through(self) -> bool:
        """Whether a step back changes nothing: first order, and w - lr * gradient."""
        return self.loop.first_order and self.loop.optimizer.plain and self.loop.inner_rates == "fixed"

    def _prepared(self, parameters: Weights, task: tuple[Any, ...]) -> tuple[InnerState, list[Shared]]:
        loop = self.loop
        shared = [loop.shared_at(parameters, step) for step in range(loop.steps)]
        return self.steps.start(parameters, task), shared

    def _back(self, axis: int | None) -> Callable[..., tuple[InnerState, Shared]]:
        """Cotangents of the state before a step, and of what is shared, from those of the state after.

        `axis` is the tasks' in the state; what tasks share receives the sum over them.
        """

        def of_update(
            state: InnerState, gradients: Weights, shared: Shared, cotangent: InnerState
        ) -> tuple[InnerState, Weights, Weights, Weights]:
            update = self.loop.optimizer.update
            return vjp(update, state, gradients, shared.rates, shared.anchor)[1](cotangent)

        def back(
            state: InnerState, shared: Shared, gradients: Weights, cotangent: InnerState, *examples: Any
        ) -> tuple[InnerState, Shared]:
            at = gradients or cotangent.fast  # of a linear function: any place will do
            axes = (axis, PER_TASK, SAME, PER_TASK)
            of_state, c, *of_others = self.loop.over_tasks(of_update, axes)(state, at, shared, cotangent)
            of_rates, of_anchor = map(_sum_over_tasks, of_others)
            if axis is SAME:
                of_state = InnerState(*_tree_sum_over_tasks(of_state))
            of_weights = {name: torch.zeros_like(w) for name, w in shared.weights.items()}
            if not self.loop.first_order:
                second, of_weights = _gradient_of_slopes(self.loop, axis)(
                    state.fast, shared.weights, c, *examples
                )
                of_state = of_state._replace(fast=_plus(of_state.fast, second))
            return of_state, Shared(of_weights, of_rates, of_anchor)

        return back


def _gradient_of_slopes(loop: InnerLoop, axis: int | None) -> Callable[..., tuple[Weights, Weights]]:
    """Of the sum of the tasks' slopes along `v`, in the fast weights (`axis` is that of tasks) and in `s`.

    Tasks do not touch each other's fast weights, so that the sum keeps their gradients apart; what
    they share receives the sum, and the summing over tasks is left to the matrix products.
    """
    slopes = loop.over_tasks(loop.slope, (axis, SAME, PER_TASK, PER_TASK, PER_TASK, PER_TASK))

    def total(fast: Weights, shared: Weights, v: Weights, x: Tree, y: Tree, around: Weights) -> Tensor:
        return slopes(fast, shared, v, x, y, around).sum()

    return grad(total, (0, 1))


class Implicit:
    """Rajeswaran et al. (2019): the inner loop has found the minimum of L + lambda / 2 |w - start|^2.

    L is the support loss, weight decay included. Then the meta-gradient is x, the solution of
    (I + H / lambda) x = v, with v the gradient of the query loss and H the Hessian of L, both at the end;
    conjugate gradients find it. With s the weights
    that are not adapted, theirs is dQ/ds - (d2L/ds dw) x / lambda.

    Arguments:
        cg_steps: of conjugate gradients, which begin at v: none of them gives the first order.
        damping: added to I, as the authors do; 0 is exact.
    """

    def __init__(self, loop: InnerLoop, accelerate: Accelerate, *, cg_steps: int, damping: float) -> None:
        self.loop = loop
        self.steps = InnerSteps(loop, accelerate)
        self.query = accelerate(loop.over_tasks(loop.query_gradient, (PER_TASK, SAME, *TASK)))
        self.slopes = accelerate(_gradient_of_slopes(loop, PER_TASK))
        self.cg_steps = cg_steps
        self.damping = damping

    @torch.no_grad()
    def __call__(self, parameters: Weights, schedule: Weights, *task: Any) -> Sums:
        loop, strength = self.loop, self.loop.optimizer.proximal
        state, shared = loop.start(parameters), loop.shared_at(parameters, 0)
        for step in range(loop.steps):
            state, _, _, buffers = self.steps.take(step, state, shared, *_minibatches(loop, task, step))
            task = _with_buffers(task, buffers)
        query = _query_of(task, loop.steps)
        support = (*task[:2], query[4])
        (v, u), (losses, outputs, _) = self.query(state.fast, shared.weights, *query)
        scale = 1 + self.damping + loop.optimizer.weight_decay / strength

        def product(x: Weights) -> Weights:
            second, _ = self.slopes(state.fast, shared.weights, x, *support)
            return {n: scale * x[n] + second[n] / strength for n in x}

        gradients = _sum_over_tasks(u)
        x = v
        if self.cg_steps:
            x = conjugate_gradients(product, v, self.cg_steps)
            _, mixed = self.slopes(state.fast, shared.weights, x, *support)
            gradients = {n: g - mixed[n] / strength for n, g in gradients.items()}
        return Sums(_of_parameters(parameters, gradients | _sum_over_tasks(x)), losses, outputs, {})


def conjugate_gradients(product: Callable[[Weights], Weights], b: Weights, steps: int) -> Weights:
    """An approximate solution of A x = b for each task, from x = b on; `b` is `[tasks, ...]` by name.

    A is symmetric. A task whose residual has come to nothing, or that meets a direction in which A is not
    positive, stays where it is from there on: A is positive definite at a minimum, and only there is the
    system meaningful.
    """

    def dot(a: Weights, b: Weights) -> Tensor:
        return torch.stack([(a[n] * b[n]).flatten(1).sum(1) for n in a]).sum(0)

    def moved(a: Weights, by: Tensor, b: Weights) -> Weights:
        return {n: a[n] + by.view(-1, *(1,) * (a[n].dim() - 1)) * b[n] for n in a}

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        """0 where `b` is not above 0."""
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
        x = moved(x, length, direction)
        residual = moved(residual, -length, mapped)
        new_size = dot(residual, residual)
        direction = moved(residual, ratio(new_size, size), direction)
        size = new_size
    return x


class Reptile:
    """Nichol, Achiam and Schulman (2018): start minus the adapted weights, in the place of a gradient.

    A task's support and query together are what its inner loop learns from; its query loss is measured on a
    part of that.
    """

    def __init__(self, loop: InnerLoop, accelerate: Accelerate) -> None:
        self.loop = loop
        self.steps = InnerSteps(loop, accelerate)
        self.query = accelerate(loop.over_tasks(loop.query_loss, (PER_TASK, SAME, *TASK)))

    @torch.no_grad()
    def __call__(self, parameters: Weights, schedule: Weights, *task: Any) -> Sums:
        loop = self.loop
        pool = (*_together(task), *task[2:])
        start, shared = self.steps.start(parameters, pool), loop.shared_at(parameters, 0)
        state = start
        for step in range(loop.steps):
            state, _, _, buffers = self.steps.take(step, state, shared, *_minibatches(loop, pool, step))
            pool = _with_buffers(pool, buffers)
        query = (*task[:4], _query_of(pool, loop.steps)[4])
        losses, (outputs, _) = self.query(state.fast, shared.weights, *query)
        moved = {name: (w - state.fast[name]).sum(0) for name, w in start.fast.items()}
        if loop.optimizer.carried:
            squares, mass = start.slots["square"], start.slots["count"]["mass"]
            moved |= {SQUARE + n: (s - state.slots["square"][n]).sum(0) for n, s in squares.items()}
            moved[MASS] = (mass - state.slots["count"]["mass"]).sum(0)
        return Sums(_of_parameters(parameters, moved), losses, outputs, {})


class Joint:
    """The gradient of the mean loss on support and query together, nothing adapted: pretraining."""

    def __init__(self, loop: InnerLoop, accelerate: Accelerate) -> None:
        self.loop = loop
        self.gradient = accelerate(loop.over_tasks(self._gradient, (SAME, *4 * [PER_TASK])))

    def __call__(self, parameters: Weights, schedule: Weights, *task: Any) -> Sums:
        gradients, losses, outputs = self.gradient(
            parameters, *_together(task), task[3], pass_around(task[4], "query")
        )
        return Sums(_of_parameters(parameters, _sum_over_tasks(gradients)), losses, outputs, {})

    def _gradient(
        self, parameters: Weights, x: Tree, y: Tree, query_y: Tree, around: Weights
    ) -> tuple[Weights, Tensor, Tree]:
        def loss(parameters: Weights) -> tuple[Tensor, Tree]:
            outputs = self.loop.forward(self.loop.start(parameters).fast | parameters, x, around)
            return self.loop.loss(outputs, y), outputs

        gradients, outputs = grad(loss, has_aux=True)(parameters)
        queries = len(first_tensor(query_y))
        outputs = tree_map(lambda part: part[-queries:], outputs)
        return gradients, self.loop.loss(outputs, query_y), outputs


# ---- a chunk of tasks -----------------------------------------------------------------------


def _minibatches(loop: InnerLoop, task: tuple[Any, ...], step: int) -> tuple[Tree, Tree, Weights]:
    """The support examples of all tasks in one inner step, `[tasks, batch, ...]`, and what surrounds it."""
    x, y, _, _, extras = task
    around = pass_around(extras, "support", step)
    if "order" not in extras:
        return x, y, around
    return *loop.over_tasks(lambda x, y, order: minibatch(x, y, order, step))(x, y, extras["order"]), around


def _query_of(task: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
    """The tasks as their query after so many steps needs them."""
    return *task[:4], pass_around(task[4], "query", steps)


def _with_buffers(task: tuple[Any, ...], buffers: Weights) -> tuple[Any, ...]:
    return (*task[:4], task[4] | buffers) if buffers else task


def _together(task: tuple[Any, ...]) -> tuple[Tree, Tree]:
    """Support and query as one set: `[tasks, examples, ...]`."""
    x, y = (tree_map(lambda *two: torch.cat(two, 1), task[i], task[i + 2]) for i in (0, 1))
    return x, y


# ---- dictionaries of tensors ----------------------------------------------------------------


def _of_parameters(parameters: Weights, gradients: Weights) -> Weights:
    """The gradients of all meta-parameters: zero where there is none."""
    return {name: gradients.get(name, torch.zeros_like(w)) for name, w in parameters.items()}


def _sum_over_tasks(weights: Weights) -> Weights:
    return {name: w.sum(0) for name, w in weights.items()}


def _tree_sum_over_tasks(state: InnerState) -> tuple[Weights, dict[str, Weights]]:
    slots = {purpose: _sum_over_tasks(slot) for purpose, slot in state.slots.items()}
    return _sum_over_tasks(state.fast), slots


def _sum_over_steps(seen: list[Weights]) -> Weights:
    return stacked([_sum_over_tasks(step) for step in seen])


def _plus(a: Weights, b: Weights) -> Weights:
    return {name: w + b[name] if name in b else w for name, w in a.items()}


def _with(cotangent: InnerState | None, v: Weights, state: InnerState) -> InnerState:
    """The cotangent of the state, with the fast weights' increased by `v`."""
    if cotangent is None:
        slots = {p: {n: torch.zeros_like(w) for n, w in s.items()} for p, s in state.slots.items()}
        return InnerState(v, slots)
    return cotangent._replace(fast=_plus(cotangent.fast, v))

"""The adjoint meta-gradient: forward through the inner loop, then backward, one step in memory at a time.

    path, end, outcome = forward(...)     each inner step leaves a way back
    cotangents = backward(path, end)      of the first state, and of what tasks share in each step

The cotangent of a quantity is the derivative of the outer loss in it. What is computed in each step is a
function for all tasks at once, which may be compiled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp

from common.batch import Tree, first_tensor, tree_map
from common.optimizers import InnerState, Weights
from common.task import (
    Extras,
    MetaGradient,
    Outcome,
    Shared,
    Task,
    mean_statistics,
    stack_steps,
    sum_over_tasks,
)
from learners.elementary import NoGradHolds
from maml import MAML, Way

Accelerate = Callable[..., Callable[..., Any]]  # of a function, and Inductor's options for it

TASKS, SAME = 0, None  # axes for vmap: of tasks, or shared by them
EXAMPLES = (TASKS, TASKS, TASKS)  # inputs, targets and extras of an inner step


def run_as_is(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Accelerate nothing."""
    return function


# ---- the inner loop of all tasks -----------------------------------------------------------------


class InnerStep(NamedTuple):
    """One inner step of all tasks."""

    # of tasks in `before`; None while all share one state, as in the first step they may
    axis: int | None
    before: InnerState
    gradients: Weights  # of the support loss; empty: no way back needs them
    examples: tuple[Tree, Tree, Extras]
    after: InnerState
    query: Task  # the tasks as their query after the step needs them
    statistics: Weights  # that batch norm saw


class Walk:
    """The inner steps of all tasks.

    Tasks start from one state unless they compute their heads, or steps are accelerated one by one: the first
    of several would then be a function of its own, forward and backward, which a compiler builds for minutes.
    """

    def __init__(self, maml: MAML, accelerate: Accelerate) -> None:
        keeps_gradients = not maml.optimizer.is_linear or maml.choices.inner_rates != "fixed"

        def one_step(*arguments: Any) -> tuple[InnerState, Weights, Weights, Weights]:
            state, gradients, statistics, buffers = maml.inner_step(*arguments)
            return state, gradients if keeps_gradients else {}, statistics, buffers

        self.maml = maml
        self.starts_apart = maml.starts_apart or (accelerate is not run_as_is and maml.steps > 1)
        self.take_step = {
            axis: accelerate(maml.over_tasks(one_step, (axis, SAME, *EXAMPLES))) for axis in (SAME, TASKS)
        }

    def start(self, parameters: Weights, tasks: Task) -> InnerState:
        """Return the state before the first step: of all tasks, or of each if they start apart."""
        maml, count = self.maml, len(first_tensor(tasks.support_x))
        if maml.starts_apart:
            state = maml.over_tasks(maml.start, (SAME, TASKS))(parameters, tasks)
        else:
            state = maml.start(parameters)
            if self.starts_apart:
                state = tree_map(lambda t: t.expand(count, *t.shape), state)
        # forward mode refuses tensors that share their memory
        return tree_map(Tensor.contiguous, state)

    def __call__(self, before: InnerState, shared: Sequence[Shared], tasks: Task) -> Iterator[InnerStep]:
        """Yield the inner steps; `shared` has one entry per step."""
        for step in range(self.maml.steps):
            axis = TASKS if step > 0 or self.starts_apart else SAME
            at_step = partial(Task.at_step, step=step)
            examples = at_step(tasks) if tasks.order is None else self.maml.over_tasks(at_step)(tasks)
            after, gradients, statistics, buffers = self.take_step[axis](before, shared[step], *examples)
            tasks = tasks.with_buffers(buffers)
            yield InnerStep(axis, before, gradients, examples, after, tasks.for_query(step + 1), statistics)
            before = after

    def to_end(self, parameters: Weights, tasks: Task) -> tuple[InnerState, InnerStep, Shared]:
        """Return the first state, the last inner step, and what tasks share."""
        start, shared = self.start(parameters, tasks), self.maml.shared_at(parameters, 0)
        return start, deque(self(start, [shared] * self.maml.steps, tasks), maxlen=1).pop(), shared


# ---- forward and backward ------------------------------------------------------------------------


class PathStep(NamedTuple):
    """An inner step as the way back needs it."""

    # from the cotangent of the state after the step to those of the state before it and of what tasks share
    pull_back: Callable[[InnerState], tuple[InnerState, Shared]]
    fast_cotangent: Weights  # that the query loss after the step gives; empty where that does not count
    weights_cotangent: Weights  # of the weights that tasks share, by the same query loss


def adjoint(maml: MAML, accelerate: Accelerate) -> Way:
    """Reverse over forward, one inner step at a time (MixFlow-MG, Kemaev et al. 2025)."""
    walk = Walk(maml, accelerate)
    step_back = {axis: accelerate(make_step_back(maml, axis)) for axis in (SAME, TASKS)}
    # first order and w - lr * gradient: a step back changes nothing, and no state need be kept for it
    is_plain = maml.first_order and maml.optimizer.is_plain and maml.choices.inner_rates == "fixed"
    query = accelerate(maml.over_tasks(query_gradient(maml), (TASKS, SAME, TASKS)))

    def forward(
        start: InnerState, shared: Sequence[Shared], tasks: Task, step_weights: Tensor | None
    ) -> tuple[list[PathStep], InnerState, Outcome]:
        path: list[PathStep] = []
        statistics: list[Weights] = []
        for number, step in enumerate(walk(start, shared, tasks)):
            cotangents: tuple[Weights, Weights] = {}, {}
            query_statistics: Weights = {}
            if step_weights is not None or number == maml.steps - 1:
                (fast_cotangent, weights_cotangent), (loss, (outputs, query_statistics)) = query(
                    step.after.fast, shared[number].weights, step.query
                )
                cotangents = fast_cotangent, sum_over_tasks(weights_cotangent)
            if step_weights is not None:
                cotangents = tree_map(partial(torch.mul, step_weights[number]), cotangents)
            statistics.append(sum_over_tasks(mean_statistics(step.statistics, query_statistics)))
            pull_back = partial(
                step_back[step.axis], step.before, shared[number], step.gradients, step.examples
            )
            if is_plain:
                pull_back = partial(pass_back, step.axis, shared[number])
            path.append(PathStep(pull_back, *cotangents))
        return path, step.after, Outcome(loss, outputs, stack_steps(statistics))

    @torch.no_grad()
    def way(parameters: Weights, tasks: Task, step_weights: Tensor | None) -> MetaGradient:
        def prepare(parameters: Weights) -> tuple[InnerState, list[Shared]]:
            shared = [maml.shared_at(parameters, step) for step in range(maml.steps)]
            return walk.start(parameters, tasks), shared

        (start, shared), pull_to_parameters, *_ = vjp(prepare, parameters)
        path, end, outcome = forward(start, shared, tasks, step_weights)
        (gradients,) = pull_to_parameters(backward(path, end))
        return MetaGradient(gradients, outcome.loss, outcome.outputs, outcome.statistics)

    return way


def backward(path: list[PathStep], end: InnerState) -> tuple[InnerState, list[Shared]]:
    """Return the cotangents of the first state, and of what tasks share in each step.

    Steps are popped, which frees what they hold.
    """
    state_cotangent = InnerState({}, tree_map(torch.zeros_like, end.slots))
    shared_cotangents: list[Shared] = []
    while path:
        step = path.pop()
        fast_cotangent = add(state_cotangent.fast, step.fast_cotangent)
        state_cotangent, shared_cotangent = step.pull_back(state_cotangent._replace(fast=fast_cotangent))
        weights_cotangent = add(shared_cotangent.weights, step.weights_cotangent)
        shared_cotangents.append(shared_cotangent._replace(weights=weights_cotangent))
    return state_cotangent, shared_cotangents[::-1]


def add(a: Weights, b: Weights) -> Weights:
    return a | {name: a[name] + w if name in a else w for name, w in b.items()}


# ---- one step back -------------------------------------------------------------------------------


def pass_back(axis: int | None, shared: Shared, cotangent: InnerState) -> tuple[InnerState, Shared]:
    """Take cotangents through a plain step of first order."""
    fast = cotangent.fast if axis is TASKS else sum_over_tasks(cotangent.fast)
    return InnerState(fast, {}), Shared(tree_map(torch.zeros_like, shared.weights), {}, {})


def make_step_back(maml: MAML, axis: int | None) -> Callable[..., tuple[InnerState, Shared]]:
    """Return a function that takes cotangents back through an inner step; `axis` as in `InnerStep`.

    The step is state' = update(state, g, shared), with g the gradient of the support loss L at (w, s): the
    fast weights, and the weights that all tasks share. Given the cotangents of state', those of state, g and
    shared come from the update rule, which is elementwise. The cotangent c of g goes on to w and s as
    (d2L/dw dw) c and (d2L/ds dw) c: the gradient, in w and s, of the slope of L along c. First order leaves
    it out. Whatever tasks share receives the sum over them.
    """

    def pull_through_update(
        state: InnerState, gradients: Weights, shared: Shared, cotangent: InnerState
    ) -> tuple[InnerState, Weights, Weights, Weights]:
        return vjp(maml.optimizer.update, state, gradients, shared.rates, shared.anchor)[1](cotangent)

    def step_back(
        state: InnerState, shared: Shared, gradients: Weights, examples: Any, cotangent: InnerState
    ) -> tuple[InnerState, Shared]:
        gradients = gradients or cotangent.fast  # a linear update has the same derivative everywhere
        pull = maml.over_tasks(pull_through_update, (axis, TASKS, SAME, TASKS))
        state_cotangent, gradient_cotangent, rates_cotangent, anchor_cotangent = pull(
            state, gradients, shared, cotangent
        )
        if axis is SAME:
            state_cotangent = tree_map(partial(torch.sum, dim=0), state_cotangent)
        weights_cotangent = tree_map(torch.zeros_like, shared.weights)
        if not maml.first_order:
            through_gradient, weights_cotangent = gradient_of_slopes(maml, axis)(
                state.fast, shared.weights, gradient_cotangent, *examples
            )
            fast_cotangent = add(state_cotangent.fast, through_gradient)
            state_cotangent = state_cotangent._replace(fast=fast_cotangent)
        rates_and_anchor = sum_over_tasks(rates_cotangent), sum_over_tasks(anchor_cotangent)
        return state_cotangent, Shared(weights_cotangent, *rates_and_anchor)

    return step_back


def query_gradient(maml: MAML) -> Callable[..., Any]:
    """Return the gradient of one task's query loss in adapted and shared weights, with what that gives."""
    return grad_and_value(maml.query_loss, (0, 1), has_aux=True)


def gradient_of_slopes(maml: MAML, axis: int | None) -> Callable[..., tuple[Weights, Weights]]:
    """Return the gradient, in fast and in shared weights, of the tasks' slopes of the support loss.

    A task's slope is along a direction of its own. Tasks do not touch each other's fast weights (`axis` is
    theirs), so that the slopes' sum keeps their gradients apart; what tasks share receives the sum, whose
    terms the matrix products add up.
    """

    def slope(fast: Weights, shared: Weights, along: Weights, x: Tree, y: Tree, extras: Extras) -> Tensor:
        def loss(fast: Weights) -> Tensor:
            with NoGradHolds():
                return maml.loss(maml.call(fast | shared, x, extras), y, extras)

        return jvp(loss, (fast,), (along,))[1]

    slopes = maml.over_tasks(slope, (axis, SAME, TASKS, *EXAMPLES))
    return grad(lambda *arguments: slopes(*arguments).sum(), (0, 1))

"""The adjoint meta-gradient, and its parts: the inner loop of all tasks, one step at a time.

Memory hardly grows with the number of steps: the way back sees the activations of one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from common.batch import Tree, tree_map
from common.optimizers import InnerState, Weights
from common.task import Extras, Task, mean_statistics, stack_steps, sum_over_tasks
from learners.elementary import NoGradHolds
from maml import MAML, MetaGradient, Outcome, Shared

Accelerate = Callable[..., Callable[..., Any]]  # of a function, and Inductor's options for it

TASKS, SAME = 0, None  # axes for vmap: of tasks, or shared by them
EXAMPLES = (TASKS, TASKS, TASKS)  # inputs, targets and extras of an inner step


class PathStep(NamedTuple):
    """One inner step of all tasks, as a way back needs it."""

    gradients: Weights  # of the support loss; empty: not needed
    examples: tuple[Tree, Tree, Extras]
    query: Task  # the tasks as their query after the step needs them
    statistics: Weights  # that batch norm saw


class InnerSteps:
    """The inner loop of all tasks, one step at a time.

    Before the first step all tasks have the same weights, unless they start apart (prototypes): that step
    and what is derived from it are functions in which the weights are shared.
    """

    def __init__(self, maml: MAML, accelerate: Accelerate) -> None:
        self.maml = maml
        self.keeps_gradients = not maml.optimizer.is_linear or maml.choices.inner_rates != "fixed"
        self.first = accelerate(maml.over_tasks(self._step, (SAME, SAME, *EXAMPLES)))
        self.next = accelerate(maml.over_tasks(self._step, (TASKS, SAME, *EXAMPLES)))

    def _step(self, *arguments: Any) -> tuple[InnerState, Weights, Weights, Weights]:
        state, gradients, statistics, buffers = self.maml.inner_step(*arguments)
        return state, gradients if self.keeps_gradients else {}, statistics, buffers

    def start(self, parameters: Weights, tasks: Task) -> InnerState:
        """Return the state of all tasks, or of each if they start apart, before the first step."""
        if not self.maml.starts_apart:
            return self.maml.start(parameters)
        state = self.maml.over_tasks(self.maml.start, (SAME, TASKS))(parameters, tasks)
        # forward mode refuses tensors that share their memory
        return tree_map(Tensor.contiguous, state)

    def are_apart(self, step: int) -> bool:
        """Return whether tasks have weights of their own before that step."""
        return step > 0 or self.maml.starts_apart

    def examples(self, tasks: Task, step: int) -> tuple[Tree, Tree, Extras]:
        """Return inputs and targets `[tasks, batch, ...]` of an inner step, and the extras of its pass."""
        if tasks.order is None:
            return tasks.at_step(step)
        return self.maml.over_tasks(lambda task: task.at_step(step))(tasks)

    def walk(
        self, state: InnerState, shared: Sequence[Shared], tasks: Task
    ) -> Iterator[tuple[InnerState, PathStep]]:
        """Yield the state after each inner step, with the step itself; `shared` has one entry per step."""
        for step in range(self.maml.steps):
            examples = self.examples(tasks, step)
            take_step = self.next if self.are_apart(step) else self.first
            state, gradients, statistics, buffers = take_step(state, shared[step], *examples)
            tasks = tasks.with_buffers(buffers)
            yield state, PathStep(gradients, examples, tasks.for_query(step + 1), statistics)

    def run(self, parameters: Weights, tasks: Task) -> tuple[InnerState, InnerState, Shared, Task]:
        """Take all steps. Returns first and last state, what tasks share, and the tasks for their query."""
        start, shared = self.start(parameters, tasks), self.maml.shared_at(parameters, 0)
        for state, step in self.walk(start, [shared] * self.maml.steps, tasks):
            end, query = state, step.query
        return start, end, shared, query


class Adjoint:
    """Reverse over forward, one inner step at a time (MixFlow-MG, Kemaev et al. 2025).

    An inner step is state' = update(state, g, shared), with g the gradient of the support loss L at (w, s):
    the fast weights, and the weights that all tasks share. Given the cotangents of state', those of state, g
    and shared come from the update rule, which is elementwise. The cotangent c of g goes on to w and s as
    (d2L/dw dw) c and (d2L/ds dw) c: the gradient, in w and s, of the slope of L along c. First order leaves
    it out.
    """

    def __init__(self, maml: MAML, accelerate: Accelerate) -> None:
        self.maml = maml
        self.steps = InnerSteps(maml, accelerate)
        self.query = accelerate(maml.over_tasks(query_gradient(maml), (TASKS, SAME, TASKS)))
        # first order and w - lr * gradient: a step back changes nothing
        plain = maml.optimizer.is_plain and maml.choices.inner_rates == "fixed"
        self.passes_through = maml.first_order and plain
        make = self._pass_through if self.passes_through else lambda axis: accelerate(self._back(axis))
        self.back = {apart: make(TASKS if apart else SAME) for apart in (True, False)}

    @torch.no_grad()
    def __call__(self, parameters: Weights, tasks: Task, step_weights: Tensor | None) -> MetaGradient:
        maml = self.maml

        def prepare(parameters: Weights) -> tuple[InnerState, list[Shared]]:
            shared = [maml.shared_at(parameters, step) for step in range(maml.steps)]
            return self.steps.start(parameters, tasks), shared

        (start, shared), pull_back, *_ = vjp(prepare, parameters)
        states, path = self._forward(start, shared, tasks, keep_all=step_weights is not None)
        cotangents, outcome = self._backward(states, path, shared, step_weights)
        (gradients,) = pull_back(cotangents)
        return MetaGradient(gradients, outcome.loss, outcome.outputs, outcome.statistics)

    def _forward(
        self, state: InnerState, shared: list[Shared], tasks: Task, *, keep_all: bool
    ) -> tuple[list[InnerState], list[PathStep]]:
        """Walk through the inner loop. Returns the states that the way back needs, and its steps."""
        states, path = [], []
        for after, step in self.steps.walk(state, shared, tasks):
            if keep_all or not self.passes_through:
                states.append(state)
            state = after
            path.append(step)
        return [*states, state], path

    def _backward(
        self,
        states: list[InnerState],
        path: list[PathStep],
        shared: list[Shared],
        step_weights: Tensor | None,
    ) -> tuple[tuple[InnerState, list[Shared]], Outcome]:
        """Walk back to the cotangents of the first state and of what tasks share in each step.

        States and steps are popped, which frees what the way back has passed.
        """
        state = states.pop()
        cotangent: InnerState | None = None
        of_shared: list[Shared] = []
        seen: list[Weights] = []
        for step in reversed(range(len(path))):
            gradients, examples, query, statistics = path.pop()
            last = step == self.maml.steps - 1
            direct: Weights = {}
            if last or step_weights is not None:
                (v, u), (loss, outputs, of_query) = self.query(state.fast, shared[step].weights, query)
                if last:
                    final_loss, final_outputs = loss, outputs
                statistics = mean_statistics(statistics, of_query)
                direct = sum_over_tasks(u)
                if step_weights is not None:
                    v, direct = ({n: step_weights[step] * x for n, x in w.items()} for w in (v, direct))
                cotangent = _add_to_fast(cotangent, v, state)
            seen.append(statistics)
            assert cotangent is not None
            state = states.pop() if states else state  # from the one after the step to the one before
            back = self.back[self.steps.are_apart(step)]
            cotangent, of_step = back(state, shared[step], gradients, cotangent, *examples)
            of_shared.append(of_step._replace(weights=_plus(of_step.weights, direct)))
        assert cotangent is not None
        statistics = stack_steps([sum_over_tasks(step) for step in reversed(seen)])
        return (cotangent, of_shared[::-1]), Outcome(final_loss, final_outputs, statistics)

    def _pass_through(self, axis: int | None) -> Callable[..., tuple[InnerState, Shared]]:
        """Make the function of a step back that changes nothing."""

        def back(
            state: InnerState, shared: Shared, gradients: Weights, cotangent: InnerState, *examples: Any
        ) -> tuple[InnerState, Shared]:
            fast = cotangent.fast if axis is TASKS else sum_over_tasks(cotangent.fast)
            zeros = {n: torch.zeros_like(w) for n, w in shared.weights.items()}
            return InnerState(fast, {}), Shared(zeros, {}, {})

        return back

    def _back(self, axis: int | None) -> Callable[..., tuple[InnerState, Shared]]:
        """Make the function of one step back; `axis` is the tasks' in the state before the step.

        Whatever tasks share receives the sum over them.
        """
        maml = self.maml

        def pull_through_update(
            state: InnerState, gradients: Weights, shared: Shared, cotangent: InnerState
        ) -> tuple[InnerState, Weights, Weights, Weights]:
            return vjp(maml.optimizer.update, state, gradients, shared.rates, shared.anchor)[1](cotangent)

        def back(
            state: InnerState, shared: Shared, gradients: Weights, cotangent: InnerState, *examples: Any
        ) -> tuple[InnerState, Shared]:
            at = gradients or cotangent.fast  # a linear update has the same derivative everywhere
            pull = maml.over_tasks(pull_through_update, (axis, TASKS, SAME, TASKS))
            of_state, c, of_rates, of_anchor = pull(state, at, shared, cotangent)
            if axis is SAME:
                slots = {purpose: sum_over_tasks(slot) for purpose, slot in of_state.slots.items()}
                of_state = InnerState(sum_over_tasks(of_state.fast), slots)
            of_weights = {name: torch.zeros_like(w) for name, w in shared.weights.items()}
            if not maml.first_order:
                second = gradient_of_slopes(maml, axis)
                of_fast, of_weights = second(state.fast, shared.weights, c, *examples)
                of_state = of_state._replace(fast=_plus(of_state.fast, of_fast))
            return of_state, Shared(of_weights, sum_over_tasks(of_rates), sum_over_tasks(of_anchor))

        return back


def query_gradient(maml: MAML) -> Callable[..., Any]:
    """Return the gradient of one task's query loss in adapted and shared weights, with what it saw."""

    def loss(fast: Weights, shared: Weights, task: Task) -> tuple[Tensor, tuple[Tensor, Tree, Weights]]:
        value, (outputs, statistics) = maml.query_loss(fast, shared, task)
        return value, (value, outputs, statistics)

    return grad(loss, (0, 1), has_aux=True)


def gradient_of_slopes(maml: MAML, axis: int | None) -> Callable[..., tuple[Weights, Weights]]:
    """Return the gradient, in fast and in shared weights, of the tasks' slopes of the support loss along `v`.

    Tasks do not touch each other's fast weights (`axis` is theirs), so that the slopes' sum keeps their
    gradients apart; what tasks share receives the sum, whose terms the matrix products add up.
    """

    def slope(fast: Weights, shared: Weights, v: Weights, x: Tree, y: Tree, extras: Extras) -> Tensor:
        def loss(fast: Weights) -> Tensor:
            with NoGradHolds():
                return maml.loss(maml.call(fast | shared, x, extras), y)

        return jvp(loss, (fast,), (v,))[1]

    slopes = maml.over_tasks(slope, (axis, SAME, TASKS, *EXAMPLES))

    def total(fast: Weights, shared: Weights, v: Weights, x: Tree, y: Tree, extras: Extras) -> Tensor:
        return slopes(fast, shared, v, x, y, extras).sum()

    return grad(total, (0, 1))


def _plus(a: Weights, b: Weights) -> Weights:
    return {name: w + b[name] if name in b else w for name, w in a.items()}


def _add_to_fast(cotangent: InnerState | None, v: Weights, state: InnerState) -> InnerState:
    """Add `v` to the fast weights' cotangent; without a cotangent, start one for the state."""
    if cotangent is not None:
        return cotangent._replace(fast=_plus(cotangent.fast, v))
    slots = {p: {n: torch.zeros_like(w) for n, w in slot.items()} for p, slot in state.slots.items()}
    return InnerState(v, slots)

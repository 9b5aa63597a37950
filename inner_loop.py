"""The inner loop, for one task: a function of meta-parameters and of the task's tensors.

Meta-parameters are a dictionary by name: the learner's weights and, where they are learned, the inner
rates (`inner_lr/` and the name of the weight). What belongs to an inner step has the steps as its first
axis: rates per layer and step `[steps]`, per-step batch norm `[steps, channels]`. A step beyond the ones
that are trained uses the last one's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from choices import CONVOLUTIONS, INNER_RATES, NORMALISATIONS, check_choice
from convolution import convert_convolutions
from normalisation import (
    BatchNorm,
    convert_batch_norm,
    fresh_statistics,
    given_statistics,
    norm_parameter_names,
    recorded_statistics,
    statistics_from_first,
)
from optimizers import InnerOptimizer, InnerState, Weights
from partition import adapted_names, context_names

Loss = Callable[[Tensor, Tensor], Tensor]

RATE = "inner_lr/"  # before the name of the weight whose rate it is


class Shared(NamedTuple):
    """What all tasks share in an inner step."""

    weights: Weights  # those that are not adapted
    rates: Weights  # learned inner rates; empty: the optimizer's own
    anchor: Weights  # where the proximal term pulls to; empty: there is none


class Step(NamedTuple):
    """The result of an inner step."""

    state: InnerState
    gradients: Weights  # of the support loss, before the step
    statistics: Weights  # that batch norm has seen, where they are recorded


class Passed(NamedTuple):
    """What is seen on the way through the inner loop and the query."""

    loss: Tensor  # query loss after the last step
    outputs: Tensor  # [query examples, ...], the learner's, behind it
    statistics: Weights  # [steps, 2, channels] by layer, where they are recorded


class InnerLoop:
    """A learner, a loss, and the choices that concern one task; see `MAML` for the arguments."""

    def __init__(
        self,
        learner: nn.Module,
        loss: Loss,
        optimizer: InnerOptimizer,
        *,
        steps: int,
        adapt: str,
        head: str | None,
        inner_rates: str,
        inner_lr_max: float | None,
        first_order: bool,
        normalisation: str,
        norm_per_step: bool,
        adapt_norm: bool,
        convolution: str,
        compute_dtype: torch.dtype | None,
    ) -> None:
        check_choice("inner_rates", inner_rates, INNER_RATES)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        check_choice("convolution", convolution, CONVOLUTIONS)
        self.learner = convert_batch_norm(copy.deepcopy(learner))
        everything = {
            name: parameter.detach().clone()
            for name, parameter in self.learner.named_parameters()
            if parameter.requires_grad
        }
        contexts = context_names(self.learner)
        self._initial = {name: w for name, w in everything.items() if name not in contexts}
        norms = norm_parameter_names(self.learner)
        self.per_step = norms if norm_per_step else frozenset()
        chosen = adapted_names(self.learner, adapt, head)
        self.adapted = frozenset(chosen if adapt_norm and not self.per_step else chosen - norms)
        if not self.adapted:
            raise ValueError(f"adapting {adapt} leaves nothing to adapt beside batch norm")
        self._contexts = {name: everything[name] for name in sorted(contexts)}
        if convolution == "im2col":
            convert_convolutions(self.learner)
        self._statistics = fresh_statistics(self.learner) if normalisation == "per-step" else {}
        if compute_dtype is not None:
            self.learner.to(compute_dtype)
        self.loss = loss
        self.optimizer = optimizer
        self.steps = steps
        self.inner_rates = inner_rates
        self.inner_lr_max = inner_lr_max
        self.first_order = first_order
        self.normalisation = "transductive" if normalisation == "per-step" else normalisation
        self.compute_dtype = compute_dtype

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(layer, BatchNorm) for layer in self.learner.modules())

    @property
    def not_adapted(self) -> frozenset[str]:
        """Names of the learner's weights that all tasks share."""
        return frozenset(self._initial) - self.adapted

    def initial_parameters(self, seed: int = 0) -> Weights:
        """Fresh meta-parameters: the learner's own weights, and the initial inner rates.

        The seed is that of rates which begin at random.
        """
        parameters = {name: weight.clone() for name, weight in self._initial.items()}
        for name in self.per_step:
            parameters[name] = parameters[name].expand(self.steps, -1).clone()
        generator = torch.Generator().manual_seed(seed)
        adapted = {name: w for name, w in (self._initial | self._contexts).items() if name in self.adapted}
        for name, weight in adapted.items() if self.inner_rates != "fixed" else ():
            shape = (self.steps,) if self.inner_rates == "layer-step" else weight.shape
            rate = torch.full(shape, self.optimizer.lr, dtype=weight.dtype)
            if self.inner_lr_max is not None:
                rate += (self.inner_lr_max - self.optimizer.lr) * torch.rand(
                    shape, generator=generator, dtype=weight.dtype
                )
            parameters[RATE + name] = rate.to(weight.device)
        return parameters

    def initial_statistics(self) -> Weights:
        """Running statistics of per-step batch norm, `[steps, 2, channels]` by layer; else empty."""
        return {name: s.expand(self.steps, -1, -1).clone() for name, s in self._statistics.items()}

    # ---- the learner ------------------------------------------------------------------------

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """The learner's outputs under these weights; batch norm uses the statistics of `x`."""
        if self.compute_dtype is None:
            return functional_call(self.learner, weights, (x,))
        narrow = {
            name: w if name in self._statistics else w.to(self.compute_dtype) for name, w in weights.items()
        }
        x = x.to(self.compute_dtype) if x.is_floating_point() else x
        return functional_call(self.learner, narrow, (x,)).to(next(iter(weights.values())).dtype)

    def query_outputs(
        self, weights: Weights, query_x: Tensor, support_x: Tensor, normalisation: str
    ) -> Tensor:
        """Outputs on a query set; "inductive": with the support set's statistics under these weights."""
        if normalisation != "inductive":
            return self.forward(weights, query_x)
        shots = len(support_x)
        with statistics_from_first(shots, self.learner):
            return self.forward(weights, torch.cat([support_x, query_x]))[shots:]

    def support_loss(self, fast: Weights, shared: Weights, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.forward(fast | shared, x), y)

    def query_loss(
        self, fast: Weights, shared: Weights, *task: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Weights]]:
        """Loss on one task's query set under adapted weights; outputs, and statistics where recorded."""
        support_x, _, query_x, query_y, *_ = task
        with self._recorded() as statistics:
            outputs = self.query_outputs(fast | shared, query_x, support_x, self.normalisation)
        return self.loss(outputs, query_y), (outputs, statistics or {})

    def _recorded(self) -> Any:
        return recorded_statistics(self.learner) if self._statistics else nullcontext()

    # ---- the loop ---------------------------------------------------------------------------

    def start(self, parameters: Weights) -> InnerState:
        """The state before the first step; a context begins at zero."""
        fast = {name: parameters[name] for name in parameters if name in self.adapted}
        context = {n: torch.zeros_like(w) for n, w in self._contexts.items() if n in self.adapted}
        return self.optimizer.start(fast | context)

    def shared_at(self, parameters: Weights, step: int, statistics: Weights | None = None) -> Shared:
        """What the tasks share in the inner step of that number, from 0; running statistics join the
        weights where they are given."""
        row = min(step, self.steps - 1)

        def at(name: str) -> Tensor:
            return parameters[name][row] if name in self.per_step else parameters[name]

        weights = {name: at(name) for name in self._initial if name not in self.adapted}
        weights |= {name: s[row] for name, s in (statistics or {}).items()}
        rates = {name[len(RATE) :]: rate for name, rate in parameters.items() if name.startswith(RATE)}
        if self.inner_rates == "layer-step":
            rates = {name: rate[row] for name, rate in rates.items()}
        return Shared(weights, rates, self.start(parameters).fast if self.optimizer.proximal else {})

    def shared_by_query(self, parameters: Weights, steps: int, statistics: Weights | None = None) -> Shared:
        """The same for the query after that many steps: that of the last one, or of the first to come."""
        return self.shared_at(parameters, max(steps - 1, 0), statistics)

    def inner_step(self, state: InnerState, shared: Shared, x: Tensor, y: Tensor) -> Step:
        """A step along the gradient of the support loss, which `first_order` takes for a constant."""
        fast, weights = state.fast, shared.weights
        if self.first_order:
            fast, weights = _detached(fast), _detached(weights)

        def loss(fast: Weights) -> tuple[Tensor, Weights]:
            with self._recorded() as statistics:
                value = self.support_loss(fast, weights, x, y)
            return value, statistics or {}

        gradients, statistics = grad(loss, has_aux=True)(fast)
        state = self.optimizer.update(state, gradients, shared.rates, shared.anchor)
        return Step(state, gradients, statistics)

    def trajectory(
        self,
        parameters: Weights,
        support_x: Tensor,
        support_y: Tensor,
        order: Tensor | None = None,
        *,
        steps: int,
        statistics: Weights | None = None,
    ) -> Iterator[Weights]:
        """The task's weights after 0, 1, ... `steps` inner steps, as its query is to use them."""
        state = self.start(parameters)
        yield state.fast | self.shared_by_query(parameters, 0, statistics).weights
        for step in range(steps):
            shared = self.shared_at(parameters, step, statistics)
            state = self.inner_step(state, shared, *minibatch(support_x, support_y, order, step)).state
            yield state.fast | shared.weights

    def adapt(self, parameters: Weights, support_x: Tensor, support_y: Tensor, steps: int) -> Weights:
        """The weights adapted to one task: `support_x` is `[examples, ...]`."""
        *_, adapted = self.trajectory(parameters, support_x, support_y, steps=steps)
        return adapted

    def objective(self, parameters: Weights, schedule: Weights, *task: Tensor) -> tuple[Tensor, Passed]:
        """What meta-training minimises, of one task: the query loss after the last inner step or, with
        `schedule["step_weights"]` `[steps]`, a weighted sum of those after each (Antoniou et al. 2019)."""
        support_x, support_y, _, _, order = *task[:4], task[4] if len(task) > 4 else None
        state = self.start(parameters)
        weights = schedule.get("step_weights")
        losses, seen = [], []
        for step in range(self.steps):
            shared = self.shared_at(parameters, step)
            taken = self.inner_step(state, shared, *minibatch(support_x, support_y, order, step))
            state = taken.state
            of_query: Weights = {}
            if weights is not None or step == self.steps - 1:
                loss, (outputs, of_query) = self.query_loss(state.fast, shared.weights, *task)
                losses.append(loss)
            seen.append(mean_of_both(taken.statistics, of_query))
        total = losses[-1] if weights is None else (weights * torch.stack(losses)).sum()
        return total, Passed(losses[-1], outputs, stacked(seen))

    # ---- derivatives of one step ------------------------------------------------------------

    def query_gradient(
        self, fast: Weights, shared: Weights, *task: Tensor
    ) -> tuple[tuple[Weights, Weights], tuple[Tensor, Tensor, Weights]]:
        """Of the query loss, in adapted and in shared weights; the loss, the outputs, the statistics."""

        def loss(fast: Weights, shared: Weights) -> tuple[Tensor, tuple[Tensor, Tensor, Weights]]:
            value, (outputs, statistics) = self.query_loss(fast, shared, *task)
            return value, (value, outputs, statistics)

        return grad(loss, (0, 1), has_aux=True)(fast, shared)

    def slope(self, fast: Weights, shared: Weights, v: Weights, x: Tensor, y: Tensor) -> Tensor:
        """The derivative of the support loss when the fast weights move along `v`."""
        return jvp(lambda fast: self.support_loss(fast, shared, x, y), (fast,), (v,))[1]

    def running(self) -> Any:
        """Within it, batch norm normalises with the statistics that come with the weights."""
        return given_statistics(self.learner)


def minibatch(x: Tensor, y: Tensor, order: Tensor | None = None, step: int = 0) -> tuple[Tensor, Tensor]:
    """The examples of one inner step of one task: all, or those that `order` `[steps, batch]` names."""
    return (x, y) if order is None else (x[order[step]], y[order[step]])


def mean_of_both(of_support: Weights, of_query: Weights) -> Weights:
    """Statistics of a step: the mean of support's and query's, where the query has passed."""
    if not of_query:
        return of_support
    return {name: (of_support[name] + of_query[name]) / 2 for name in of_support}


def stacked(steps: list[Weights]) -> Weights:
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}


def _detached(weights: Weights) -> Weights:
    return {name: w.detach() for name, w in weights.items()}

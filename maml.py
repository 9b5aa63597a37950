"""Model-agnostic meta-learning (Finn, Abbeel and Levine 2017), vectorised over tasks.

Everything here is a function of tensors: meta-parameters and a `TaskBatch` in, meta-gradients or
predictions out. The inner loop is written for one task and `torch.func.vmap` runs it for all of them
at once; no flags, files, datasets or logging.

    maml = MAML(learner, torch.nn.functional.mse_loss, inner_lr=0.01)
    parameters = maml.initial_parameters()
    step = maml.meta_gradient(parameters, batch)          # step.gradients, step.losses
    outputs = maml.predictions(parameters, batch, steps=10)["transductive"]  # after 0, 1, ... 10
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from convolution import convert_convolutions
from normalisation import (
    BatchNorm,
    convert_batch_norm,
    norm_parameter_names,
    statistics_from_first,
)
from tasks import TaskBatch

Weights = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Accelerate = Callable[..., Callable[..., Any]]  # of a function, and Inductor's options for it


class MetaGradient(NamedTuple):
    gradients: Weights  # of the mean query loss over tasks, by meta-parameter
    losses: Tensor  # [tasks], query loss after the last inner step
    outputs: Tensor  # [tasks, query examples, ...], the learner's outputs behind it


def as_it_is(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Accelerates nothing."""
    return function


class MAML:
    """A learner, a loss and the options of the inner loop, as functions of meta-parameters and tasks.

    Arguments:
        learner: any `nn.Module` that maps `[examples, ...]` to outputs; it is copied, not changed.
            PyTorch's batch norm layers in it normalise with the batch at hand (see normalisation.py).
        loss: maps (outputs, targets) of one task to a scalar; a mean over examples.
        inner_lr: learning rate of the inner loop, on that loss.
        steps: inner gradient steps while meta-training.
        first_order: treat the inner gradients as constants; otherwise the meta-gradient is exact.
        normalisation: whose statistics batch norm uses for the query while meta-training: its own
            ("transductive"), or the support set's under the adapted weights ("inductive").
        adapt_norm: adapt the parameters of batch norm layers in the inner loop too; if not, they are
            meta-learned and shared by all tasks.
        engine: how the exact meta-gradient is computed; both give the same to rounding.
            "unrolled" differentiates through the whole inner loop; "adjoint" keeps the fast weights of
            each step and walks back through them, one step's activations in memory at a time.
        convolution: how `nn.Conv2d` is computed, "grouped" or "im2col" (see convolution.py).
        compute_dtype: type that the learner computes in (float16's and bfloat16's batch statistics,
            losses, gradients and fast weights stay in the meta-parameters' type); None: theirs.
        tasks_at_once: bounds memory: tasks are taken in chunks of that size. The result is the same
            to rounding.
        accelerate: makes a faster function of each vectorised function of tensors that the
            meta-gradient is made of (see compiler.py).
    """

    def __init__(
        self,
        learner: nn.Module,
        loss: Loss,
        *,
        inner_lr: float,
        steps: int = 1,
        first_order: bool = False,
        normalisation: str = "transductive",
        adapt_norm: bool = True,
        engine: str = "unrolled",
        convolution: str = "grouped",
        compute_dtype: torch.dtype | None = None,
        tasks_at_once: int | None = None,
        accelerate: Accelerate = as_it_is,
    ) -> None:
        self.learner = convert_batch_norm(copy.deepcopy(learner))
        self._initial = {
            name: parameter.detach().clone()
            for name, parameter in self.learner.named_parameters()
            if parameter.requires_grad
        }
        if convolution == "im2col":
            convert_convolutions(self.learner)
        if compute_dtype is not None:
            self.learner.to(compute_dtype)
        self.loss = loss
        self.inner_lr = inner_lr
        self.steps = steps
        self.first_order = first_order
        self.normalisation = normalisation
        self.not_adapted = frozenset() if adapt_norm else norm_parameter_names(self.learner)
        self.engine = {"unrolled": self._unrolled, "adjoint": self._adjoint}[engine]
        self.compute_dtype = compute_dtype
        self.tasks_at_once = tasks_at_once

        in_chunk = (0, 0, 0, 0)  # the axes of a TaskBatch that are tasks
        per_task, same = 0, None
        self._gradient_through_loop = accelerate(self._unrolled_gradient)
        self._first_step = accelerate(vmap(self.inner_step, (same, same, 0, 0)))
        self._next_step = accelerate(vmap(self.inner_step, (per_task, same, 0, 0)))
        self._query_gradient = accelerate(vmap(self.query_gradient, (per_task, same, *in_chunk)))
        self._slopes_in_next = accelerate(self._gradient_of_slopes(per_task))
        self._slopes_in_first = accelerate(self._gradient_of_slopes(same))

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(layer, BatchNorm) for layer in self.learner.modules())

    def initial_parameters(self) -> Weights:
        """The learner's own weights, as fresh meta-parameters."""
        return {name: weight.clone() for name, weight in self._initial.items()}

    # ---- one task --------------------------------------------------------------------------------

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """The learner's outputs under these weights; batch norm uses the statistics of `x`."""
        if self.compute_dtype is None:
            return functional_call(self.learner, weights, (x,))
        narrow = {name: w.to(self.compute_dtype) for name, w in weights.items()}
        x = x.to(self.compute_dtype) if x.is_floating_point() else x
        return functional_call(self.learner, narrow, (x,)).to(next(iter(weights.values())).dtype)

    def query_outputs(
        self, weights: Weights, query_x: Tensor, support_x: Tensor, normalisation: str
    ) -> Tensor:
        """Outputs on a query set; "inductive": with the support set's statistics under these weights."""
        if normalisation == "transductive":
            return self.forward(weights, query_x)
        shots = len(support_x)
        with statistics_from_first(shots, self.learner):
            return self.forward(weights, torch.cat([support_x, query_x]))[shots:]

    def support_loss(self, fast: Weights, shared: Weights, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.forward(fast | shared, x), y)

    def query_loss(self, fast: Weights, shared: Weights, *task: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and outputs on one task's query set, under weights that are adapted already."""
        support_x, _, query_x, query_y = task
        outputs = self.query_outputs(fast | shared, query_x, support_x, self.normalisation)
        return self.loss(outputs, query_y), outputs

    def inner_step(self, fast: Weights, shared: Weights, x: Tensor, y: Tensor) -> Weights:
        """fast weights <- fast weights - inner_lr * gradient of the support loss."""
        at = (_detached(fast), _detached(shared)) if self.first_order else (fast, shared)
        return self._moved(fast, grad(self.support_loss)(*at, x, y))

    def _moved(self, weights: Weights, gradients: Weights) -> Weights:
        return {name: weights[name] - self.inner_lr * gradients[name] for name in weights}

    def split(self, parameters: Weights) -> tuple[Weights, Weights]:
        """The meta-parameters that the inner loop adapts, and those that all tasks share."""
        fast = {name: w for name, w in parameters.items() if name not in self.not_adapted}
        return fast, {name: w for name, w in parameters.items() if name in self.not_adapted}

    def trajectory(
        self, parameters: Weights, support_x: Tensor, support_y: Tensor, steps: int
    ) -> Iterator[Weights]:
        """The task's weights after 0, 1, ... `steps` inner steps on its support set."""
        fast, shared = self.split(parameters)
        yield fast | shared
        for _ in range(steps):
            fast = self.inner_step(fast, shared, support_x, support_y)
            yield fast | shared

    def adapt(self, parameters: Weights, support_x: Tensor, support_y: Tensor, steps: int) -> Weights:
        """The weights adapted to one task: `support_x` is `[examples, ...]`."""
        *_, adapted = self.trajectory(parameters, support_x, support_y, steps)
        return adapted

    def adapted_query_loss(self, parameters: Weights, *task: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and outputs on one task's query set after the inner loop."""
        adapted = self.adapt(parameters, task[0], task[1], self.steps)
        return self.query_loss(*self.split(adapted), *task)

    # The adjoint engine. With L the support loss, Q the query loss and lr the inner rate, the inner loop
    # is w[t+1] = w[t] - lr dL/dw(w[t], s), where s are the meta-parameters that are not adapted. Begin
    # with v = dQ/dw and u = dQ/ds at the last weights. A step back is
    #     v <- v - lr (d2L/dw dw) v        u <- u - lr (d2L/ds dw) v
    # and both products are the gradient, in w and s, of one number: the slope of L along v. Before the
    # first step all tasks have the same w: from there on, v too is wanted as a sum over tasks only.

    def query_gradient(
        self, fast: Weights, shared: Weights, *task: Tensor
    ) -> tuple[tuple[Weights, Weights], Tensor, Tensor]:
        """Of the query loss, in adapted and in shared weights; the loss; the outputs."""

        def loss(fast: Weights, shared: Weights) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, outputs = self.query_loss(fast, shared, *task)
            return value, (value, outputs)

        cotangents, (value, outputs) = grad(loss, (0, 1), has_aux=True)(fast, shared)
        return cotangents, value, outputs

    def slope(self, fast: Weights, shared: Weights, v: Weights, x: Tensor, y: Tensor) -> Tensor:
        """The derivative of the support loss when the fast weights move along `v`."""
        return jvp(lambda fast: self.support_loss(fast, shared, x, y), (fast,), (v,))[1]

    # ---- all tasks -------------------------------------------------------------------------------

    def meta_gradient(self, parameters: Weights, batch: TaskBatch) -> MetaGradient:
        """The gradient of the query loss, averaged over tasks, in the meta-parameters."""
        parts = [self.engine(parameters, chunk) for chunk in batch.chunks(self.tasks_at_once)]
        tasks = len(batch.support_x)
        sums, losses, outputs = zip(*parts, strict=True)
        return MetaGradient(
            {name: sum(part[name] for part in sums) / tasks for name in parameters},
            torch.cat(losses),
            torch.cat(outputs),
        )

    def _unrolled(self, parameters: Weights, chunk: TaskBatch) -> MetaGradient:
        return MetaGradient(*self._gradient_through_loop(parameters, *chunk))

    def _unrolled_gradient(self, parameters: Weights, *chunk: Tensor) -> tuple[Weights, Tensor, Tensor]:
        leaves = {name: w.detach().requires_grad_() for name, w in parameters.items()}
        losses, outputs = vmap(lambda *task: self.adapted_query_loss(leaves, *task))(*chunk)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True)), losses.detach(), outputs.detach()

    @torch.no_grad()
    def _adjoint(self, parameters: Weights, chunk: TaskBatch) -> MetaGradient:
        support = chunk.support_x, chunk.support_y
        start, shared = self.split(parameters)
        fast = self._first_step(start, shared, *support)
        path = []  # the weights before the second, third, ... step
        for _ in range(1, self.steps):
            if not self.first_order:
                path.append(fast)
            fast = self._next_step(fast, shared, *support)
        (v, u), losses, outputs = self._query_gradient(fast, shared, *chunk)
        u = _sum_over_tasks(u)
        if self.first_order:
            return MetaGradient(_sum_over_tasks(v) | u, losses, outputs)
        while path:
            second, mixed = self._slopes_in_next(path.pop(), shared, v, *support)
            v, u = self._moved(v, second), self._moved(u, mixed)
        second, mixed = self._slopes_in_first(start, shared, v, *support)
        gradients = self._moved(_sum_over_tasks(v), second) | self._moved(u, mixed)
        return MetaGradient(gradients, losses, outputs)

    def _gradient_of_slopes(self, fast_axis: int | None) -> Callable[..., tuple[Weights, Weights]]:
        """Of the sum of the tasks' slopes, in the fast weights (their axis of tasks is given) and in `s`.

        Tasks do not touch each other's fast weights, so that the sum keeps their gradients apart; what
        they share receives the sum, and the summing over tasks is left to the matrix products.
        """
        slopes = vmap(self.slope, (fast_axis, None, 0, 0, 0))

        def total(fast: Weights, shared: Weights, v: Weights, x: Tensor, y: Tensor) -> Tensor:
            return slopes(fast, shared, v, x, y).sum()

        return grad(total, (0, 1))

    @torch.no_grad()
    def predictions(
        self,
        parameters: Weights,
        batch: TaskBatch,
        steps: int,
        normalisations: tuple[str, ...] = ("transductive",),
    ) -> dict[str, Tensor]:
        """Outputs on the query sets after 0, 1, ... `steps` inner steps.

        For each of the `normalisations` ("transductive", "inductive"): `[tasks, steps + 1, query
        examples, ...]`. The inner loop is the same for both.
        """

        def per_step(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> dict[str, Tensor]:
            outputs: dict[str, list[Tensor]] = {name: [] for name in normalisations}
            for weights in self.trajectory(parameters, support_x, support_y, steps):
                for name in normalisations:
                    outputs[name].append(self.query_outputs(weights, query_x, support_x, name))
            return {name: torch.stack(steps) for name, steps in outputs.items()}

        parts = [vmap(per_step)(*chunk[:3]) for chunk in batch.chunks(self.tasks_at_once)]
        return {name: torch.cat([part[name] for part in parts]) for name in normalisations}


def _sum_over_tasks(weights: Weights) -> Weights:
    return {name: w.sum(0) for name, w in weights.items()}


def _detached(weights: Weights) -> Weights:
    return {name: w.detach() for name, w in weights.items()}

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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from normalisation import (
    BatchNorm,
    convert_batch_norm,
    norm_parameter_names,
    statistics_from_first,
)
from tasks import TaskBatch

Weights = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class MetaGradient(NamedTuple):
    gradients: Weights  # of the mean query loss over tasks, by meta-parameter
    losses: Tensor  # [tasks], query loss after the last inner step
    outputs: Tensor  # [tasks, query examples, ...], the learner's outputs behind it


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
        tasks_at_once: bounds memory: tasks are taken in chunks of that size. The result is the same
            to rounding.
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
        tasks_at_once: int | None = None,
    ) -> None:
        self.learner = convert_batch_norm(copy.deepcopy(learner))
        self.loss = loss
        self.inner_lr = inner_lr
        self.steps = steps
        self.first_order = first_order
        self.normalisation = normalisation
        self.not_adapted = frozenset() if adapt_norm else norm_parameter_names(self.learner)
        self.tasks_at_once = tasks_at_once

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(layer, BatchNorm) for layer in self.learner.modules())

    def initial_parameters(self) -> Weights:
        """The learner's own weights, as fresh meta-parameters."""
        return {
            name: parameter.detach().clone()
            for name, parameter in self.learner.named_parameters()
            if parameter.requires_grad
        }

    # ---- one task --------------------------------------------------------------------------------

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """The learner's outputs under these weights; batch norm uses the statistics of `x`."""
        return functional_call(self.learner, weights, (x,))

    def query_outputs(
        self, weights: Weights, query_x: Tensor, support_x: Tensor, normalisation: str
    ) -> Tensor:
        """Outputs on a query set; "inductive": with the support set's statistics under these weights."""
        if normalisation == "transductive":
            return self.forward(weights, query_x)
        shots = len(support_x)
        with statistics_from_first(shots, self.learner):
            return self.forward(weights, torch.cat([support_x, query_x]))[shots:]

    def inner_step(self, fast: Weights, shared: Weights, x: Tensor, y: Tensor) -> Weights:
        """fast weights <- fast weights - inner_lr * gradient of the support loss."""

        def support_loss(fast: Weights, shared: Weights) -> Tensor:
            return self.loss(self.forward(fast | shared, x), y)

        if self.first_order:
            gradients = grad(support_loss)(_detached(fast), _detached(shared))
        else:
            gradients = grad(support_loss)(fast, shared)
        return {name: fast[name] - self.inner_lr * gradients[name] for name in fast}

    def trajectory(
        self, parameters: Weights, support_x: Tensor, support_y: Tensor, steps: int
    ) -> Iterator[Weights]:
        """The task's weights after 0, 1, ... `steps` inner steps on its support set."""
        shared = {name: w for name, w in parameters.items() if name in self.not_adapted}
        fast = {name: w for name, w in parameters.items() if name not in self.not_adapted}
        yield fast | shared
        for _ in range(steps):
            fast = self.inner_step(fast, shared, support_x, support_y)
            yield fast | shared

    def adapt(self, parameters: Weights, support_x: Tensor, support_y: Tensor, steps: int) -> Weights:
        """The weights adapted to one task: `support_x` is `[examples, ...]`."""
        *_, adapted = self.trajectory(parameters, support_x, support_y, steps)
        return adapted

    def query_loss(self, parameters: Weights, task: TaskBatch) -> tuple[Tensor, Tensor]:
        """Loss and outputs on one task's query set after the inner loop."""
        adapted = self.adapt(parameters, task.support_x, task.support_y, self.steps)
        outputs = self.query_outputs(adapted, task.query_x, task.support_x, self.normalisation)
        return self.loss(outputs, task.query_y), outputs

    # ---- all tasks -------------------------------------------------------------------------------

    def meta_gradient(self, parameters: Weights, batch: TaskBatch) -> MetaGradient:
        """The gradient of the query loss, averaged over tasks, in the meta-parameters."""
        leaves = {name: w.detach().requires_grad_() for name, w in parameters.items()}
        tasks = len(batch.support_x)
        parts = []
        for chunk in batch.chunks(self.tasks_at_once):
            losses, outputs = vmap(lambda *task: self.query_loss(leaves, TaskBatch(*task)))(*chunk)
            gradients = torch.autograd.grad(
                losses.sum() / tasks, list(leaves.values()), materialize_grads=True
            )
            parts.append((gradients, losses.detach(), outputs.detach()))
        gradients_by_chunk, losses_by_chunk, outputs_by_chunk = zip(*parts, strict=True)
        totals = [sum(tensors[1:], tensors[0]) for tensors in zip(*gradients_by_chunk, strict=True)]
        return MetaGradient(
            dict(zip(leaves, totals, strict=True)),
            torch.cat(losses_by_chunk),
            torch.cat(outputs_by_chunk),
        )

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


def _detached(weights: Weights) -> Weights:
    return {name: w.detach() for name, w in weights.items()}

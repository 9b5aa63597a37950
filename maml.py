"""Gradient-based meta-learning (Finn, Abbeel and Levine 2017, and its family), vectorised over tasks.

Everything here is a function of tensors: meta-parameters and a `TaskBatch` in, meta-gradients or
predictions out; no flags, files, datasets or logging. The inner loop is written for one task
(inner_loop.py), the ways to the meta-gradient take all tasks at once (meta_gradients.py).

    maml = MAML(learner, torch.nn.functional.mse_loss, inner_lr=0.01)
    parameters = maml.initial_parameters()
    step = maml.meta_gradient(parameters, batch)          # step.gradients, step.losses
    outputs = maml.predictions(parameters, batch, steps=10)["transductive"]  # after 0, 1, ... 10
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from choices import ENGINES, META_GRADIENTS, check_choice
from inner_loop import InnerLoop, Loss
from meta_gradients import Accelerate, Adjoint, Implicit, Joint, Reptile, Unrolled
from optimizers import InnerOptimizer, Weights
from tasks import TaskBatch


class MetaGradient(NamedTuple):
    gradients: Weights  # of the objective's mean over tasks, by meta-parameter
    losses: Tensor  # [tasks], query loss after the last inner step
    outputs: Tensor  # [tasks, query examples, ...], the learner's outputs behind it
    statistics: Weights  # [steps, 2, channels] by layer: what per-step batch norm has seen, mean over tasks


def as_it_is(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Accelerates nothing."""
    return function


class MAML(InnerLoop):
    """A learner, a loss and five choices, as functions of meta-parameters and tasks.

    Arguments:
        learner: any `nn.Module` that maps `[examples, ...]` to outputs; it is copied, not changed.
            PyTorch's batch norm layers in it normalise with the batch at hand (see normalisation.py).
        loss: maps (outputs, targets) of one task to a scalar; a mean over examples.
        inner_lr: learning rate of the inner loop, on that loss; where rates are learned, their start.
        steps: inner gradient steps while meta-training.
        adapt: which parameters the inner loop adapts: "all" (MAML), "head" (ANIL), "body" (BOIL), or a
            "context" vector (CAVIA; the learner has one from `partition.add_context`).
        head: the head's modules or parameters by name, with commas between; None: by rule
            (`partition.head_names`).
        inner_rates: "fixed"; "layer-step": one learned rate for each weight tensor and step (MAML++);
            "element": one for each element (Meta-SGD).
        inner_lr_max: learned rates begin uniformly between `inner_lr` and this; None: all at `inner_lr`.
        meta_gradient: "exact"; "first-order": the inner gradients count as constants; "reptile"; "implicit"
            (iMAML); "joint": no inner loop at all (pretraining).
        first_order: the same as `meta_gradient="first-order"`.
        normalisation: whose statistics batch norm uses for the query while meta-training: its own
            ("transductive"), or the support set's under the adapted weights ("inductive"). "per-step":
            its own, and `meta_gradient` tells the statistics of each step, for running ones (MAML++).
        norm_per_step: shift and scale of batch norm for each inner step (MAML++).
        adapt_norm: adapt the parameters of batch norm layers in the inner loop too; if not, they are
            meta-learned and shared by all tasks. Per-step ones never are adapted.
        optimizer: the inner update rule, whose rate `inner_lr` replaces; None: gradient descent.
        cg_steps, cg_damping: of the implicit meta-gradient (see meta_gradients.py).
        engine: how the exact or first-order meta-gradient is computed; both give the same to rounding.
            "unrolled" differentiates through the whole inner loop; "adjoint" keeps the fast weights of
            each step and walks back through them, one step's activations in memory at a time.
        convolution: how `nn.Conv2d` is computed, "grouped" or "im2col" (see convolution.py).
        compute_dtype: type that the learner computes in (float16's and bfloat16's batch statistics,
            losses, gradients and fast weights stay in the meta-parameters' type); None: theirs.
        tasks_at_once: bounds memory: tasks are taken in chunks of that size. The result is the same
            to rounding.
        accelerate: makes a faster function of each vectorised function of tensors that the
            meta-gradient is made of (see compiler.py).

    Raises ValueError for a choice or a head that there is not, for choices that do not go together, and where
    there is nothing to adapt.
    """

    def __init__(
        self,
        learner: nn.Module,
        loss: Loss,
        *,
        inner_lr: float,
        steps: int = 1,
        adapt: str = "all",
        head: str | None = None,
        inner_rates: str = "fixed",
        inner_lr_max: float | None = None,
        meta_gradient: str = "exact",
        first_order: bool = False,
        normalisation: str = "transductive",
        norm_per_step: bool = False,
        adapt_norm: bool = True,
        optimizer: InnerOptimizer | None = None,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        engine: str = "unrolled",
        convolution: str = "grouped",
        compute_dtype: torch.dtype | None = None,
        tasks_at_once: int | None = None,
        accelerate: Accelerate = as_it_is,
    ) -> None:
        self._options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_choice("meta_gradient", meta_gradient, META_GRADIENTS)
        check_choice("engine", engine, ENGINES)
        other = meta_gradient not in ("exact", "first-order")
        if other and (first_order or inner_rates != "fixed"):
            raise ValueError(
                f"meta_gradient {meta_gradient!r} goes with neither first_order nor learned rates"
            )
        super().__init__(
            learner,
            loss,
            replace(optimizer, lr=inner_lr) if optimizer else InnerOptimizer(inner_lr),
            steps=steps,
            adapt=adapt,
            head=head,
            inner_rates=inner_rates,
            inner_lr_max=inner_lr_max,
            first_order=first_order or meta_gradient == "first-order",
            normalisation=normalisation,
            norm_per_step=norm_per_step,
            adapt_norm=adapt_norm,
            convolution=convolution,
            compute_dtype=compute_dtype,
        )
        self.tasks_at_once = tasks_at_once
        self.way: Callable[..., Any]
        if meta_gradient == "implicit":
            if not self.optimizer.proximal:
                raise ValueError("the implicit meta-gradient needs a proximal term above 0")
            self.way = Implicit(self, accelerate, cg_steps=cg_steps, damping=cg_damping)
        elif meta_gradient in ("reptile", "joint"):
            self.way = (Reptile if meta_gradient == "reptile" else Joint)(self, accelerate)
        else:
            self.way = (Adjoint if engine == "adjoint" else Unrolled)(self, accelerate)

    def training_examples(self, batch: TaskBatch) -> int:
        """Examples of a task that the inner loop learns from while meta-training."""
        queries = batch.query_x.shape[1] if isinstance(self.way, Reptile) else 0
        return batch.support_x.shape[1] + queries

    def with_options(self, **changes: Any) -> MAML:
        """The same with other arguments."""
        return MAML(**self._options | changes)

    def meta_gradient(
        self,
        parameters: Weights,
        batch: TaskBatch,
        *,
        order: Tensor | None = None,
        step_weights: Tensor | None = None,
    ) -> MetaGradient:
        """The gradient of the objective, averaged over tasks, in the meta-parameters.

        Arguments:
            order: the examples of the minibatch of each inner step, int64 `[tasks, steps, batch]`, as
                positions in the support set (Reptile: in support and query together); None: all of them.
            step_weights: `[steps]`, of the query losses after each inner step; None: the last alone counts.
        """
        schedule = {} if step_weights is None else {"step_weights": step_weights}
        parts = [
            self.way(parameters, schedule, *chunk) for chunk in _chunks(batch, order, self.tasks_at_once)
        ]
        tasks = len(batch.support_x)
        sums, losses, outputs, statistics = zip(*parts, strict=True)
        return MetaGradient(
            {name: sum(part[name] for part in sums) / tasks for name in parameters},
            torch.cat(losses),
            torch.cat(outputs),
            {name: sum(part[name] for part in statistics) / tasks for name in statistics[0]},
        )

    @torch.no_grad()
    def predictions(
        self,
        parameters: Weights,
        batch: TaskBatch,
        steps: int,
        normalisations: tuple[str, ...] = ("transductive",),
        *,
        order: Tensor | None = None,
        statistics: Weights | None = None,
    ) -> dict[str, Tensor]:
        """Outputs on the query sets after 0, 1, ... `steps` inner steps.

        For each of the `normalisations`: `[tasks, steps + 1, query examples, ...]`. The inner loop is the
        same for "transductive" and "inductive"; with "per-step" it uses the running `statistics`
        `[trained steps, 2, channels]` in support and query passes. `order` as in `meta_gradient`.
        """

        def per_step(support_x: Tensor, support_y: Tensor, query_x: Tensor, *order: Tensor) -> Any:
            outputs: dict[str, list[Tensor]] = {name: [] for name in normalisations}
            task = support_x, support_y, *order
            for running in (False, True):
                names = [name for name in normalisations if (name == "per-step") == running]
                if not names:
                    continue
                given = statistics if running else None
                with self.running() if running else nullcontext():
                    for weights in self.trajectory(parameters, *task, steps=steps, statistics=given):
                        for name in names:
                            outputs[name].append(self.query_outputs(weights, query_x, support_x, name))
            return {name: torch.stack(steps) for name, steps in outputs.items()}

        parts = [
            vmap(per_step)(*chunk[:3], *chunk[4:]) for chunk in _chunks(batch, order, self.tasks_at_once)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in normalisations}


def _chunks(batch: TaskBatch, order: Tensor | None, size: int | None) -> list[tuple[Tensor, ...]]:
    """The tensors of at most `size` tasks at a time, their order of examples behind them where given."""
    tensors = batch if order is None else (*batch, order)
    return list(zip(*(tensor.split(size or len(tensor)) for tensor in tensors), strict=True))

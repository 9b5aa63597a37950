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

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.batch import TaskBatch, Tree, arguments_of, first_tensor, in_type, joined, stacked_trees, tree_map
from common.choices import ENGINES, META_GRADIENTS, check_choice
from common.optimizers import InnerOptimizer, Weights
from inner_loop import InnerLoop, Loss
from learners.elementary import Elementary
from training.meta_gradients import Accelerate, Adjoint, Implicit, Joint, Reptile, Unrolled


class MetaGradient(NamedTuple):
    gradients: Weights  # of the objective's mean over tasks, by meta-parameter
    losses: Tensor  # [tasks], query loss after the last inner step
    outputs: Tree  # [tasks, query examples, ...], the learner's outputs behind it
    statistics: Weights  # [steps, 2, channels] by layer: what per-step batch norm has seen, mean over tasks


def as_it_is(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Accelerates nothing."""
    return function


class MAML(InnerLoop):
    """A learner, a loss and five choices, as functions of meta-parameters and tasks.

    Arguments:
        learner: any `nn.Module` that maps `[examples, ...]` to outputs; it is copied, not changed.
            PyTorch's batch norm layers in it normalise with the batch at hand (see normalisation.py);
            recurrent layers, attention and dropout are carried out as elementary.py has them. Several inputs
            are a tuple, or a dictionary by name. Parameters that require no gradient stay as they are.
        loss: maps (outputs, targets) of one task to a scalar; a mean over examples.
        inner_lr: learning rate of the inner loop, on that loss; where rates are learned, their start.
        steps: inner gradient steps while meta-training.
        fast_weights: which parameters the inner loop adapts: "all" (MAML), "head" (ANIL), "body" (BOIL), or a
            "context" vector (CAVIA; the learner has one from `partition.add_context`).
        head: the head's modules or parameters by name, with commas between; None: by rule
            (`partition.head_names`).
        head_init: the head before the first step: "learned"; "zero"; or from the support set, by the means of
            its classes: "prototype" (Proto-MAML, Triantafillou et al. 2020). The latter two are no
            meta-parameters, so that the weights serve any number of classes; they ask for a linear head.
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
        example: one task's inputs `[examples, ...]`, on which a pass shows which buffers the learner changes;
            only for learners with buffers, which are all copied for each task without.
        vectorised: run tasks at once by `vmap`; else one after another, for learners that cannot be.
        in_transform: the meta-gradient itself is to be called within a transform of `torch.func`, such as the
            `vmap` of several runs at once.
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
        fast_weights: str = "all",
        head: str | None = None,
        head_init: str = "learned",
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
        example: Tree | None = None,
        vectorised: bool = True,
        in_transform: bool = False,
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
            fast_weights=fast_weights,
            head=head,
            head_init=head_init,
            inner_rates=inner_rates,
            inner_lr_max=inner_lr_max,
            first_order=first_order or meta_gradient == "first-order",
            normalisation=normalisation,
            norm_per_step=norm_per_step,
            adapt_norm=adapt_norm,
            convolution=convolution,
            compute_dtype=compute_dtype,
            example=example,
            vectorised=vectorised,
        )
        if self.optimizer.carried and (
            meta_gradient != "reptile" or self.optimizer.name != "adam" or head_init != "learned"
        ):
            raise ValueError("carried second moments go with Adam, 'reptile' and a learned head")
        if meta_gradient == "joint" and head_init != "learned":
            raise ValueError(
                f"head_init {head_init!r}: without an inner loop the head would never be adapted"
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
            unrolled = partial(Unrolled, in_transform=in_transform)
            self.way = (Adjoint if engine == "adjoint" else unrolled)(self, accelerate)

    def training_examples(self, batch: TaskBatch) -> int:
        """Examples of a task that the inner loop learns from while meta-training."""
        queries = first_tensor(batch.query_x).shape[1] if isinstance(self.way, Reptile) else 0
        return first_tensor(batch.support_x).shape[1] + queries

    @contextmanager
    def at_rate(self, lr: Tensor | float | None) -> Iterator[None]:
        """Within it, the learning rate of the inner loop; None: as it is."""
        if lr is None:
            yield
            return
        before = self.optimizer
        self.optimizer = replace(before, lr=lr)
        try:
            yield
        finally:
            self.optimizer = before

    def with_options(self, **changes: Any) -> MAML:
        """The same with other arguments."""
        return MAML(**self._options | changes)

    def draws(self, x: Tree) -> bool:
        """Whether the learner draws random numbers while it trains on one task's inputs, as dropout does:
        then it needs keys."""
        keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(x).device)
        weights = self.whole_weights(self.initial_parameters())
        if self.compute_dtype is not None:
            weights, x = in_type(weights, self.compute_dtype), in_type(x, self.compute_dtype)
        with torch.no_grad(), Elementary(keys, first_tensor(x)) as counted:
            functional_call(copy.deepcopy(self.learner), weights, *arguments_of(x))
        return counted.draws > 0

    def whole_weights(self, parameters: Weights) -> Weights:
        """The learner's weights before the first step, all that one task needs; a computed head as built."""
        adapted = {name: w for name, w in parameters.items() if name in self.adapted}
        return self._contexts | self._head_weights | self.shared_at(parameters, 0).weights | adapted

    def meta_gradient(
        self,
        parameters: Weights,
        batch: TaskBatch,
        *,
        order: Tensor | None = None,
        keys: Tensor | None = None,
        step_weights: Tensor | None = None,
        tasks: int | None = None,
    ) -> MetaGradient:
        """The gradient of the objective, averaged over tasks, in the meta-parameters.

        Arguments:
            tasks: of the meta-batch, where `batch` is but a part of it: the gradients, and statistics, of all
                parts add up to the mean; None: those of the batch.
            order: the examples of the minibatch of each inner step, int64 `[tasks, steps, batch]`, as
                positions in the support set (Reptile: in support and query together); None: all of them.
            keys: of the learner's random numbers, 32-bit words in int64 `[tasks, 2]`; each task, step and
                pass draws other ones. Only for learners that draw.
            step_weights: `[steps]`, of the query losses after each inner step; None: the last alone counts.
        """
        schedule = {} if step_weights is None else {"step_weights": step_weights}
        parts = [self.way(parameters, schedule, *chunk) for chunk in self._chunks(batch, order, keys)]
        tasks = tasks or _tasks(batch)
        sums, losses, outputs, statistics = zip(*parts, strict=True)
        return MetaGradient(
            {name: sum(part[name] for part in sums) / tasks for name in parameters},
            torch.cat(losses),
            joined(list(outputs)),
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
        keys: Tensor | None = None,
        statistics: Weights | None = None,
    ) -> dict[str, Tree]:
        """Outputs on the query sets after 0, 1, ... `steps` inner steps.

        For each of the `normalisations`: `[tasks, steps + 1, query examples, ...]`. The inner loop is the
        same for "transductive" and "inductive"; with "per-step" it uses the running `statistics`
        `[trained steps, 2, channels]` in support and query passes. The inner loop trains, and the query is
        predicted, as `nn.Module.train` and `eval` have it: dropout drops nothing in the query. `order` and
        `keys` as in `meta_gradient`. Raises ValueError for "per-step" without the statistics that it needs.
        """
        self.check_statistics(normalisations, statistics)

        def per_step(
            support_x: Tree, support_y: Tree, query_x: Tree, query_y: Tree, extras: Weights
        ) -> dict[str, Tree]:
            outputs: dict[str, list[Tree]] = {name: [] for name in normalisations}
            for running in (False, True):
                names = [name for name in normalisations if (name == "per-step") == running]
                if not names:
                    continue
                given = statistics if running else None
                with self.running() if running else nullcontext():
                    for weights, around in self.trajectory(
                        parameters, support_x, support_y, extras, steps=steps, statistics=given
                    ):
                        for name in names:
                            with self.predicting():
                                found = self.query_outputs(weights, query_x, support_x, name, around)
                            outputs[name].append(found)
            return {name: stacked_trees(found) for name, found in outputs.items()}

        of_tasks = self.over_tasks(per_step)
        parts = [of_tasks(*chunk) for chunk in self._chunks(batch, order, keys)]
        return {name: joined([part[name] for part in parts]) for name in normalisations}

    def _chunks(self, batch: TaskBatch, order: Tensor | None, keys: Tensor | None) -> list[tuple[Any, ...]]:
        """The tensors of at most `tasks_at_once` tasks at a time, and these tasks' extras."""
        tasks = _tasks(batch)
        extras = self.buffers_of(tasks)
        extras |= {name: t for name, t in (("order", order), ("keys", keys)) if t is not None}
        size = self.tasks_at_once or tasks
        if size >= tasks:
            return [(*batch, extras)]
        return [
            tree_map(lambda t, first=first: t[first : first + size], (*batch, extras))
            for first in range(0, tasks, size)
        ]


def _tasks(batch: TaskBatch) -> int:
    return len(first_tensor(batch.support_x))

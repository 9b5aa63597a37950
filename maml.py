"""MAML (Finn, Abbeel and Levine 2017) and its family: inner loop, outer loss, meta-gradient, predictions.

    maml = MAML(learner, torch.nn.functional.mse_loss, Choices(inner_lr=0.01, steps=5))
    parameters = maml.initial_parameters()
    result = maml.meta_gradient(parameters, batch)               # result.gradients, result.losses
    outputs = maml.predictions(parameters, batch, steps=10)["transductive"]   # after 0, 1, ... 10 steps

Everything is a function of tensors: meta-parameters and tasks in, gradients or predictions out. The inner
loop is written for one task; `torch.func.vmap` takes it to all tasks of a batch at once.

Meta-parameters are a dictionary by name: the learner's weights and, if they are learned, the inner rates
(`inner_lr/` and the name of the weight) and the two numbers of a ridge head (`ridge/`). What belongs to an
inner step has the steps as its first axis: rates per layer and step `[steps]`, per-step batch norm `[steps,
channels]`. A step beyond the trained ones uses the last one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from common.batch import TaskBatch, Tree, cast_tree, concatenate_trees, first_tensor, stack_trees, tree_map
from common.choices import Choices
from common.optimizers import InnerOptimizer, InnerState, Weights, initial_rates
from common.task import (
    Adapted,
    Extras,
    MetaGradient,
    Outcome,
    Shared,
    Task,
    loop_over_tasks,
    mean_statistics,
    stack_steps,
    sum_over_tasks,
)
from learners.batch_norm import norm_parameter_names, record_statistics, set_norms
from learners.computed_heads import RIDGE, compute_head, initial_ridge
from learners.copies import copy_module
from learners.functional import FunctionalLearner
from learners.heads import adapted_names, context_names, head_names, remove_head
from learners.losses import TaskLoss
from learners.modules import convert_type, in_evaluation_mode
from learners.reading import Reading, main_tensor

Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) of one task -> mean over its examples

# Prefixes of a weight's name, for the meta-parameters that are not weights.
RATE = "inner_lr/"  # its learned inner rate
SQUARE = "inner_square/"  # its second moment, carried from task to task
MASS = SQUARE + "mass/"  # a whole name: the number that all carried moments are divided by
OWN = (RATE, SQUARE, RIDGE)  # of all meta-parameters that are not weights

# How the meta-gradient of a chunk of tasks is computed: (parameters, tasks, step_weights) -> sums over tasks.
Way = Callable[[Weights, Task, Tensor | None], MetaGradient]


class MAML:
    """A learner, a loss and an algorithm's choices, as functions of meta-parameters and tasks.

    Args:
        learner: any `nn.Module` that maps `[examples, ...]` to outputs; it is copied, not changed.
        loss: maps (outputs, targets) of one task to a scalar, a mean over examples.
        choices: the algorithm; each field is described by its flag's help text.
        convolution, compute_dtype, example: see `FunctionalLearner`.
        tasks_at_once: take tasks in chunks of that size, which bounds memory; None: all at once.
        vectorise: run tasks at once by `vmap`; else one after another. `reading`: what outputs mean.
        accelerate: makes a faster function of one of tensors, for `predictions` (training/compiler.py).

    Raises ValueError if a choice or the head is unknown, or if choices contradict each other.
    """

    def __init__(
        self,
        learner: nn.Module,
        loss: Loss,
        choices: Choices,
        *,
        convolution: str = "grouped",
        compute_dtype: torch.dtype | None = None,
        example: Tree | None = None,
        tasks_at_once: int | None = None,
        vectorise: bool = True,
        reading: Reading | None = None,
        accelerate: Callable[..., Any] | None = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        self.choices, self.steps, self.reading = choices, choices.steps, reading
        self.loss = TaskLoss(loss, unpads=not vectorise)
        self.call = FunctionalLearner(
            learner,
            convolution=convolution,
            compute_dtype=compute_dtype,
            example=example,
            unpads=not vectorise,
        )
        self.learner = self.call.module  # the converted copy
        choices.check(has_batch_norm=self.has_batch_norm)
        self.tasks_at_once, self.accelerate = tasks_at_once, accelerate
        self._fast: dict[Any, Callable[..., Any]] = {}  # accelerated functions
        self.over_tasks: Callable[..., Callable[..., Any]] = vmap if vectorise else loop_over_tasks
        self.optimizer = InnerOptimizer.of(choices)
        self.first_order = choices.meta_gradient == "first-order"
        self._partition()

    def _partition(self) -> None:
        """Divide the learner's weights: adapted or shared, learned or computed, per step or not."""
        choices, learner, parameters = self.choices, self.learner, self.call.parameters
        self.body, heads = learner, frozenset[str]()
        if choices.head_init != "learned":
            self.body, heads = remove_head(learner, choices.head), head_names(learner, choices.head)
        norms, contexts = norm_parameter_names(learner), context_names(learner)
        self.contexts = {name: parameters[name] for name in sorted(contexts)}
        self.head_weights = {name: w for name, w in parameters.items() if name in heads}  # computed heads
        self.initial = {n: w for n, w in parameters.items() if n not in contexts and n not in heads}
        self.starts_apart = choices.starts_apart
        self.per_step = norms if choices.norm_per_step else frozenset()
        adapted = adapted_names(learner, choices.fast_weights, choices.head)
        self.adapted = frozenset(adapted if choices.adapt_norm and not self.per_step else adapted - norms)
        if not self.adapted:
            raise ValueError(f"adapting {choices.fast_weights} leaves nothing to adapt but batch norm")
        if self.starts_apart and self.reading and self.reading.kind not in ("classes", "numbers"):
            raise ValueError(f"a computed head gives no outputs that are read as {self.reading.kind}")

    def with_options(self, **changes: Any) -> MAML:
        """Return the algorithm with other choices or other arguments of the constructor, by name."""
        names = {choice.name for choice in fields(self.choices)}
        choices = replace(self.choices, **{n: v for n, v in changes.items() if n in names})
        others = {n: v for n, v in changes.items() if n not in names}
        return MAML(**self._arguments | {"choices": choices} | others)

    def in_precision(self, dtype: torch.dtype) -> MAML:
        """Return the algorithm in another type of arithmetic."""
        learner = convert_type(copy_module(self._arguments["learner"]), dtype)
        example = self._arguments["example"]
        example = None if example is None else cast_tree(example, dtype)
        return self.with_options(learner=learner, example=example, compute_dtype=None)

    @contextmanager
    def use_rate(self, lr: Tensor | float | None) -> Iterator[None]:
        """Use this inner learning rate inside the context; None: the algorithm's own."""
        before = self.optimizer
        self.optimizer = before if lr is None else replace(before, lr=lr)
        try:
            yield
        finally:
            self.optimizer = before

    @property
    def has_batch_norm(self) -> bool:
        return bool(self.call.statistics)

    # ---- meta-parameters --------------------------------------------------------------------

    def initial_parameters(self, seed: int = 0) -> Weights:
        """Return fresh meta-parameters; the seed is that of inner rates that start at random."""
        parameters = {name: weight.clone() for name, weight in self.initial.items()}
        for name in self.per_step:
            parameters[name] = parameters[name].expand(self.steps, -1).clone()
        everything = self.initial | self.contexts | self.head_weights
        adapted = {name: w for name, w in everything.items() if name in self.adapted}
        if self.choices.inner_rates != "fixed":
            parameters |= {RATE + n: r for n, r in initial_rates(self.choices, adapted, seed).items()}
        if self.choices.head_init == "ridge":
            like = next(iter(self.head_weights.values()))
            parameters |= initial_ridge(self.choices.ridge_lambda, self.choices.ridge_scale, like)
        if self.optimizer.is_carried:
            parameters |= {SQUARE + name: torch.zeros_like(w) for name, w in adapted.items()}
            parameters[MASS] = torch.zeros_like(next(iter(adapted.values())).flatten()[0])
        return parameters

    def initial_statistics(self) -> Weights:
        """Return fresh running statistics of per-step batch norm, `[steps, 2, channels]` by layer."""
        if self.choices.batch_norm != "per-step":
            return {}
        return {name: s.expand(self.steps, -1, -1).clone() for name, s in self.call.statistics.items()}

    # ---- the inner loop, for one task -------------------------------------------------------

    def start(
        self, parameters: Weights, task: Task | None = None, statistics: Weights | None = None
    ) -> InnerState:
        """Return the state before the first step: the initialisation, and the optimizer's empty memory.

        A context and a "zero" head start at zero; a "prototype" or "ridge" head is computed from the support
        set of `task`, with running `statistics` if batch norm uses them.
        """
        fast = {name: parameters[name] for name in parameters if name in self.adapted}
        fast |= {n: torch.zeros_like(w) for n, w in self.contexts.items() if n in self.adapted}
        if task is not None and self.starts_apart:
            fast |= self._compute_head(parameters, task, statistics)
        else:
            fast |= {name: torch.zeros_like(w) for name, w in self.head_weights.items()}
        if not self.optimizer.is_carried:
            return self.optimizer.start(fast)
        squares = {name: parameters[SQUARE + name] for name in fast}
        return self.optimizer.start(fast, squares, parameters[MASS])

    def _compute_head(self, parameters: Weights, task: Task, statistics: Weights | None) -> Weights:
        weights = {name: parameters[name] for name in self.initial if name in self.adapted}
        weights |= self.shared_at(parameters, 0, statistics).weights
        extras = task.extras.for_pass("prototypes", mask=task.support_mask)
        embeddings = main_tensor(self.call(weights, task.support_x, extras, module=self.body))
        targets, kind = first_tensor(task.support_y), self.choices.head_init
        return compute_head(kind, embeddings, targets, self.head_weights, parameters, extras)

    def shared_at(self, parameters: Weights, step: int, statistics: Weights | None = None) -> Shared:
        """Return what tasks share in this inner step, counted from 0; running statistics join the weights."""
        row = min(step, self.steps - 1)
        names = (name for name in self.initial if name not in self.adapted)
        weights = {n: parameters[n][row] if n in self.per_step else parameters[n] for n in names}
        weights |= {name: s[row] for name, s in (statistics or {}).items()}
        rates = {name[len(RATE) :]: rate for name, rate in parameters.items() if name.startswith(RATE)}
        if self.choices.inner_rates == "layer-step":
            rates = {name: rate[row] for name, rate in rates.items()}
        return Shared(weights, rates, self.start(parameters).fast if self.optimizer.proximal else {})

    def inner_step(
        self, state: InnerState, shared: Shared, x: Tree, y: Tree, extras: Extras
    ) -> tuple[InnerState, Weights, Weights, Weights]:
        """Take one step against the gradient of the support loss on (x, y).

        Returns the next state, the gradient, the statistics that batch norm saw, and the changed buffers.
        """
        fast, weights = state.fast, shared.weights
        if self.first_order:  # the gradient is then a constant for the outer loss; `state` stays attached
            fast, weights, x = tree_map(Tensor.detach, (fast, weights, x))

        def loss(fast: Weights) -> tuple[Tensor, tuple[Weights, Weights]]:
            changed: Weights = {}
            with self._record_statistics() as statistics:
                outputs = self.call(fast | weights, x, extras, changed=changed)
            return self.loss(outputs, y, extras), (statistics, changed)

        gradient, (statistics, buffers) = grad(loss, has_aux=True)(fast)
        state = self.optimizer.update(state, gradient, shared.rates, shared.anchor)
        return state, gradient, statistics, buffers

    def inner_loop(
        self, parameters: Weights, task: Task, steps: int, statistics: Weights | None = None
    ) -> Iterator[Adapted]:
        """Yield the task's weights after 0, 1, ... `steps` inner steps."""
        state, shared = self.start(parameters, task, statistics), self.shared_at(parameters, 0, statistics)
        yield Adapted(state.fast, shared, task.for_query(0), {})
        for step in range(steps):
            shared = self.shared_at(parameters, step, statistics)
            state, _, recorded, buffers = self.inner_step(state, shared, *task.at_step(step))
            task = task.with_buffers(buffers)
            yield Adapted(state.fast, shared, task.for_query(step + 1), recorded)

    def adapt(
        self,
        parameters: Weights,
        support_x: Tree,
        support_y: Tree,
        steps: int,
        order: Tensor | None = None,
        keys: Tensor | None = None,
        statistics: Weights | None = None,
    ) -> Adapted:
        """Adapt to one task, whose `support_x` is `[examples, ...]`.

        `order`, `keys` and running `statistics`: see `predictions`; the former two without the axis of tasks.
        """
        task = Task(support_x, support_y, order=order, extras=Extras(keys, self.call.buffers))
        with self.use_running_statistics() if statistics else nullcontext():
            *_, adapted = self.inner_loop(parameters, task, steps, statistics)
        return adapted

    # ---- the outer loss, for one task -------------------------------------------------------

    def query_loss(self, fast: Weights, shared: Weights, task: Task) -> tuple[Tensor, tuple[Tree, Weights]]:
        """Return the query loss under these weights, with the outputs and recorded statistics."""
        with self._record_statistics() as statistics:
            outputs = self.call.query(fast | shared, task, self.choices.query_norm)
        return self.loss(outputs, task.query_y, task.extras), (outputs, statistics)

    def outer_loss(
        self, parameters: Weights, task: Task, step_weights: Tensor | None = None
    ) -> tuple[Tensor, Outcome]:
        """Return the query loss after the last inner step, which meta-training minimises.

        With `step_weights` `[steps]`: the weighted sum of those after each step (Antoniou et al. 2019).
        """
        losses, recorded = [], []
        for step, after in enumerate(self.inner_loop(parameters, task, self.steps)):
            of_query: Weights = {}
            if step == self.steps or (step and step_weights is not None):
                loss, (outputs, of_query) = self.query_loss(after.fast, after.shared.weights, after.task)
                losses.append(loss)
            if step:
                recorded.append(mean_statistics(after.statistics, of_query))
        total = losses[-1] if step_weights is None else (step_weights * torch.stack(losses)).sum()
        return total, Outcome(losses[-1], outputs, stack_steps(recorded))

    # ---- for all tasks ----------------------------------------------------------------------

    def total_loss(
        self, parameters: Weights, tasks: Task, step_weights: Tensor | None = None
    ) -> tuple[Tensor, Outcome]:
        """Return the sum of the tasks' outer losses, and their outcomes `[tasks, ...]`."""
        outer_loss = self.over_tasks(lambda task: self.outer_loss(parameters, task, step_weights))
        losses, outcomes = outer_loss(tasks)
        return losses.sum(), outcomes

    def unrolled(self, parameters: Weights, tasks: Task, step_weights: Tensor | None = None) -> MetaGradient:
        """Differentiate through the whole inner loop; gradients and statistics are sums over tasks."""
        if self.choices.meta_gradient not in ("exact", "first-order"):
            raise ValueError(f"{self.choices.meta_gradient}: see training.meta_gradients.make_meta_gradient")
        gradients, outcome = grad(self.total_loss, has_aux=True)(parameters, tasks, step_weights)
        return MetaGradient(gradients, outcome.loss, outcome.outputs, sum_over_tasks(outcome.statistics))

    def meta_gradient(
        self,
        parameters: Weights,
        batch: TaskBatch,
        *,
        order: Tensor | None = None,
        keys: Tensor | None = None,
        step_weights: Tensor | None = None,
        tasks: int | None = None,
        way: Way | None = None,
    ) -> MetaGradient:
        """Return the gradient of the mean outer loss in the meta-parameters.

        Args:
            order: the support examples of each inner step, int64 `[tasks, steps, batch]`; None: all.
            keys: random keys, for learners that draw: 32-bit words in int64 `[tasks, 2]`.
            step_weights: `[steps]`, weight of the query loss after each step; None: the last alone counts.
            tasks: size of the meta-batch, if `batch` is a part of it: the parts' results add up to the mean.
            way: how it is computed (see training/meta_gradients.py); None: `unrolled`.
        """
        way = way or self.unrolled
        parts = [way(parameters, chunk, step_weights) for chunk in self._split_batch(batch, order, keys)]
        tasks = tasks or len(first_tensor(batch.support_x))
        sums, losses, outputs, statistics = zip(*parts, strict=True)
        return MetaGradient(
            {name: sum(part[name] for part in sums) / tasks for name in parameters},
            torch.cat(losses),
            concatenate_trees(list(outputs)),
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
        """Return outputs on the query sets after 0, 1, ... `steps` inner steps, by normalisation.

        Each is `[tasks, steps + 1, query examples, ...]`. The inner loop runs in training mode, the query in
        evaluation mode: dropout drops nothing there. With "per-step", support and query use the running
        `statistics` `[trained steps, 2, channels]`: ValueError without. `order`, `keys`: see `meta_gradient`.
        """
        if "per-step" in normalisations and self.has_batch_norm and not statistics:
            raise ValueError('"per-step" normalises with running statistics: give `statistics`')
        running = tuple(name for name in normalisations if name == "per-step")
        batches = tuple(name for name in normalisations if name not in running)
        parts = []
        for tasks in self._split_batch(batch, order, keys):
            part = self._predict_each_step(parameters, tasks, steps, batches) if batches else {}
            if running:
                with self.use_running_statistics():
                    part |= self._predict_each_step(parameters, tasks, steps, running, statistics)
            parts.append(part)
        return concatenate_trees(parts)

    def _predict_each_step(
        self,
        parameters: Weights,
        tasks: Task,
        steps: int,
        normalisations: tuple[str, ...],
        statistics: Weights | None = None,
    ) -> dict[str, Tree]:
        """Return outputs on the query sets of all tasks after each step."""

        def adapt(state: InnerState, shared: Shared, *examples: Any) -> tuple[InnerState, Weights]:
            state, _, _, buffers = self.inner_step(state, shared, *examples)
            return state, buffers

        def predict(state: InnerState, shared: Shared, task: Task) -> dict[str, Tree]:
            adapted = Adapted(state.fast, shared, task, {})
            return {name: self.predict(adapted, name) for name in normalisations}

        for_all = partial(self._for_all, normalisations)
        axis = 0 if self.starts_apart or self.accelerate else None  # None: all tasks share the state
        state, outputs, count = self.start(parameters), [], len(first_tensor(tasks.support_x))
        if self.starts_apart:
            state = for_all(self.start, None, 0, None)(parameters, tasks, statistics or {})
        elif self.accelerate:  # one function for all steps
            state = tree_map(lambda t: t.expand(count, *t.shape), state)
        for step in range(steps + 1):
            shared = self.shared_at(parameters, max(0, step - 1), statistics)
            outputs.append(for_all(predict, axis, None, 0)(state, shared, tasks.for_query(step)))
            if step < steps:
                shared = self.shared_at(parameters, step, statistics)
                examples = self.over_tasks(lambda task, step=step: task.at_step(step))(tasks)
                state, buffers = for_all(adapt, axis, None, 0, 0, 0)(state, shared, *examples)
                axis, tasks = 0, tasks.with_buffers(buffers)
        return stack_trees(outputs, 1)

    def predict(self, adapted: Adapted, normalisation: str) -> Tree:
        """Return outputs on one task's query set, with the learner in evaluation mode."""
        with in_evaluation_mode(self.learner):
            return self.call.query(adapted.weights, adapted.task, normalisation)

    def _for_all(self, key: Any, function: Callable[..., Any], *axes: int | None) -> Callable[..., Any]:
        """Return a function of one task as one of all, accelerated; those of one name have keys of theirs."""
        if not self.accelerate:
            return self.over_tasks(function, axes)
        key = function.__name__, key, self.optimizer.lr
        if key not in self._fast:
            self._fast[key] = self.accelerate(self.over_tasks(function, axes))
        return self._fast[key]

    def _split_batch(self, batch: TaskBatch, order: Tensor | None, keys: Tensor | None) -> list[Task]:
        count = len(first_tensor(batch.support_x))
        return Task.of(batch, self.call.extras(count, keys), order).split(self.tasks_at_once or count)

    # ---- batch norm's statistics ------------------------------------------------------------

    def _record_statistics(self) -> AbstractContextManager[Weights]:
        """Record the statistics that batch norm sees in a pass, if it keeps them for each step."""
        per_step = self.choices.batch_norm == "per-step" and self.has_batch_norm
        return record_statistics(self.learner) if per_step else nullcontext({})

    @contextmanager
    def use_running_statistics(self) -> Iterator[None]:
        """Let batch norm normalise with the running statistics that come with the weights."""
        with set_norms(self.learner, uses_buffer=True), set_norms(self.body, uses_buffer=True):
            yield

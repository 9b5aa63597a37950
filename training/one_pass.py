"""The family where the inner loop adapts a linear head alone (ANIL): the body sees each example once.

    examples -> body, once -> embeddings -> MAML of the head, for all inner steps

The numbers are those of `MAML`, which passes through the body again in each step. Raghu et al. (2020) name
the saving: a body that is not adapted computes the same features in all steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from common.batch import Tree
from common.optimizers import Weights
from common.task import Outcome, Task
from learners.modules import in_evaluation_mode
from maml import MAML

PLAIN = "transductive"  # the reading of batch norm for a head, which has none


class OnePass(MAML):
    """`MAML` whose `unrolled` meta-gradient and predictions pass through a fixed body once.

    Takes what `MAML` takes; `example`, one task's inputs, shows whether the outputs are a linear head's on
    the body's. What is not so (another head, a body that draws or keeps its own statistics of each step,
    minibatches of the support set) goes the way of `MAML`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alone: MAML | None = None  # the algorithm on embeddings
        choices, example = self.choices, self._arguments["example"]
        per_step = choices.norm_per_step or choices.batch_norm == "per-step"
        if choices.fast_weights != "head" or per_step or example is None:
            return
        if parts := self.call.divide(choices.head, example):
            self.body, head = parts
            fixed = {"fast_weights": "all", "head": None, "batch_norm": PLAIN, "example": None}
            self.alone = self.with_options(learner=head, **fixed)

    @contextmanager
    def use_rate(self, lr: Tensor | float | None) -> Iterator[None]:
        with super().use_rate(lr), self.alone.use_rate(lr) if self.alone else nullcontext():
            yield

    def embed(
        self, parameters: Weights, task: Task, normalisations: tuple[str, ...], *, tests: bool
    ) -> tuple[Tree, dict[str, Tree]]:
        """Return the body's outputs on one task's support and, by normalisation, query.

        The query passes in training mode or, where it `tests`, in evaluation mode.
        """
        weights = {name: parameters[name] for name in self.initial if name not in self.adapted}
        extras = task.extras.for_pass("support", mask=task.support_mask)
        support = self.call(weights, task.support_x, extras, module=self.body)
        with in_evaluation_mode(self.body) if tests else nullcontext():
            query = partial(self.call.query, weights, task.for_query(0), module=self.body)
            return support, {name: query(normalisation=name) for name in normalisations}

    def total_loss(
        self, parameters: Weights, tasks: Task, step_weights: Tensor | None = None
    ) -> tuple[Tensor, Outcome]:
        repeats = self.steps + self.starts_apart > 1  # the support set's pass; without, nothing is saved
        if (alone := self.alone) is None or tasks.order is not None or not repeats:
            return super().total_loss(parameters, tasks, step_weights)
        norm = self.choices.query_norm

        def outer_loss(task: Task) -> tuple[Tensor, Outcome]:
            support, query = self.embed(parameters, task, (norm,), tests=False)
            return alone.outer_loss(parameters, task.with_inputs(support, query[norm]), step_weights)

        losses, outcomes = self.over_tasks(outer_loss)(tasks)
        return losses.sum(), outcomes

    def _predict_each_step(
        self,
        parameters: Weights,
        tasks: Task,
        steps: int,
        normalisations: tuple[str, ...],
        statistics: Weights | None = None,
    ) -> dict[str, Tree]:
        alone = self.alone
        if alone is None or tasks.order is not None or statistics:
            return super()._predict_each_step(parameters, tasks, steps, normalisations, statistics)

        def embed(parameters: Weights, task: Task) -> tuple[Tree, dict[str, Tree]]:
            return self.embed(parameters, task, normalisations, tests=True)

        support, queries = self._for_all(normalisations, embed, None, 0)(parameters, tasks)
        parts = {name: tasks.with_inputs(support, queries[name]) for name in normalisations}
        of_head = partial(alone._predict_each_step, parameters, steps=steps, normalisations=(PLAIN,))
        return {name: of_head(tasks=part)[PLAIN] for name, part in parts.items()}

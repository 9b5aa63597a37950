"""The family where the inner loop adapts the end of a network (ANIL, CAVIA): examples see its beginning once.

    examples -> what comes before the adapted weights, once -> MAML of the rest, for all inner steps

The numbers are those of `MAML`, which passes through the whole network in each step. Raghu et al. (2020) name
the saving for ANIL: a body that is not adapted computes the same features in all steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.batch import Tree
from common.optimizers import Weights
from common.task import Outcome, Task
from learners.heads import divide
from learners.modules import in_evaluation_mode
from maml import MAML


class OnePass(MAML):
    """`MAML` whose `unrolled` meta-gradient and predictions pass once through what is not adapted.

    Takes what `MAML` takes; `example`, one task's inputs, is tried in both ways. A network that cannot be
    divided, or that draws, changes buffers or has batch norm for each step, and minibatches of the support
    set go the way of `MAML`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rest: OnePass | None = None  # the algorithm on what `before` computes
        choices, learner, example = (self._arguments[name] for name in ("choices", "learner", "example"))
        per_step = choices.norm_per_step or choices.batch_norm == "per-step"
        if per_step or example is None or self.call.buffers or self.call.draws(example):
            return
        ours, theirs = (divide(module, self.adapted, choices.head) for module in (self.learner, learner))
        if ours and theirs:
            self.before = ours[0]
            rest = self.with_options(learner=theirs[1], example=None)
            self.rest = rest if self._agrees_with(rest, example) else None

    @torch.no_grad()
    def _agrees_with(self, rest: MAML, example: Tree) -> bool:
        weights = self.call.parameters
        outputs, computed = self.call(weights, example), self.call(weights, example, module=self.before)
        if not isinstance(outputs, Tensor) or not isinstance(computed, Tensor):
            return False
        return torch.equal(outputs, rest.call(weights, computed))

    @contextmanager
    def use_rate(self, lr: Tensor | float | None) -> Iterator[None]:
        with super().use_rate(lr), self.rest.use_rate(lr) if self.rest else nullcontext():
            yield

    def embed(
        self, parameters: Weights, task: Task, normalisations: tuple[str, ...], *, tests: bool
    ) -> tuple[Tree, dict[str, Tree]]:
        """Return what is computed before the adapted weights on one task's support and, by reading, query.

        The query passes in training mode or, where it `tests`, in evaluation mode.
        """
        weights = {name: parameters[name] for name in self.initial if name not in self.adapted}
        extras = task.extras.for_pass("support", mask=task.support_mask)
        support = self.call(weights, task.support_x, extras, module=self.before)
        with in_evaluation_mode(self.before) if tests else nullcontext():
            query = partial(self.call.query, weights, task.for_query(0), module=self.before)
            return support, {name: query(normalisation=name) for name in normalisations}

    def total_loss(
        self, parameters: Weights, tasks: Task, step_weights: Tensor | None = None
    ) -> tuple[Tensor, Outcome]:
        repeats = self.steps + self.starts_apart > 1  # the support set's pass; without, nothing is saved
        if (rest := self.rest) is None or tasks.order is not None or not repeats:
            return super().total_loss(parameters, tasks, step_weights)
        norm = self.choices.query_norm

        def outer_loss(task: Task) -> tuple[Tensor, Outcome]:
            support, query = self.embed(parameters, task, (norm,), tests=False)
            return rest.outer_loss(parameters, task.with_inputs(support, query[norm]), step_weights)

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
        rest = self.rest
        if rest is None or tasks.order is not None or statistics:
            return super()._predict_each_step(parameters, tasks, steps, normalisations, statistics)

        def embed(parameters: Weights, task: Task) -> tuple[Tree, dict[str, Tree]]:
            return self.embed(parameters, task, normalisations, tests=True)

        support, queries = self._for_all(normalisations, embed, None, 0)(parameters, tasks)
        outputs: dict[str, Tree] = {}
        for name in normalisations:
            part = tasks.with_inputs(support, queries[name])
            outputs |= rest._predict_each_step(parameters, part, steps, (name,))
        return outputs

"""The family where the inner loop adapts the end of a network (ANIL, CAVIA): examples see its beginning once.

    examples -> what comes before the adapted weights, once -> MAML of the rest, for all inner steps

The numbers are those of `MAML`, which passes through the whole network in each step: layers that are not
adapted compute the same features in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from common.batch import Tree
from common.optimizers import Weights
from common.task import Outcome, Task
from learners.heads import divide
from learners.modules import in_evaluation_mode
from maml import MAML


class OnePass(MAML):
    """`MAML` whose `unrolled` meta-gradient and predictions pass once through what is not adapted.

    Takes what `MAML` takes. Divided are sequences of PyTorch's plain layers, as the built-in learners are:
    whatever else might compute something of its own between their parts, in one mode or on some examples.
    Other networks, batch norm for each step and minibatches of the support set go the way of `MAML`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.before: nn.Module = self.learner
        self.rest: OnePass | None = None  # the algorithm on what `before` computes
        if not self.choices.passes_once or not self.call.is_elementary:
            return
        networks = self.learner, self._arguments["learner"]
        ours, theirs = (divide(network, self.adapted) for network in networks)
        if ours and theirs:
            self.before = ours[0]
            head = ",".join(sorted(self.adapted)) if self.choices.fast_weights == "head" else None
            self.rest = self.with_options(learner=theirs[1], head=head, example=None)

    def with_options(self, **changes: Any) -> OnePass:
        return OnePass(**super().with_options(**changes)._arguments)

    @contextmanager
    def use_rate(self, lr: Tensor | float | None) -> Iterator[None]:
        of_rest = self.rest.use_rate(lr) if self.rest else nullcontext()
        with super().use_rate(lr), of_rest:
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
        repeats = self.steps + self.starts_apart > 1  # else the support set passes only once anyway
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

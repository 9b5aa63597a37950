"""Meta-test: loss and accuracy on fixed tasks after each inner step, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from dataset import Regression, TaskDistribution, minibatch_order, task_stream
from inner_loop import Loss
from maml import MAML
from optimizers import Weights
from tasks import TaskBatch

# Evaluation tasks are the same for every checkpoint. Their splits have streams of their own, so this
# seed shares nothing with a training seed of the same number.
SEED = 0

# Examples of a chunk of tasks: some 1.5 GB at the most (20-way, `convnet`).
CHUNK_EXAMPLES = 2000

# A task has diverged when its query loss is not finite, or is more than this many times the loss before
# adaptation, its own and the median of all tasks.
DIVERGENCE = 10.0


@dataclass(frozen=True)
class Evaluation:
    """Per-task results `[tasks, steps + 1]` in float64, by normalisation ("transductive", ...)."""

    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]  # empty for regression

    def diverged(self, normalisation: str) -> Tensor:
        """Which tasks have diverged after which step: bool `[tasks, steps + 1]`."""
        losses = self.losses[normalisation]
        before = losses[:, :1]
        usual = before[before.isfinite()].nanmedian()  # NaN, and no bound, where none is finite
        return ~losses.isfinite() | (losses > DIVERGENCE * torch.fmax(before, usual))


def mean_and_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tasks (the first axis) and half width of its 95 % confidence interval."""
    return values.mean(0), 1.96 * values.std(0) / len(values) ** 0.5


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of right answers over the last axis of `targets`; `outputs` has classes behind it."""
    return (outputs.argmax(-1) == targets).float().mean(-1)


def _loss_per_step(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """`[tasks, steps + 1]`; one flat `vmap`, since a nested one of mse_loss fails in PyTorch 2.15."""
    targets = targets[:, None].expand(-1, outputs.shape[1], *targets.shape[1:])
    return vmap(loss)(outputs.flatten(0, 1), targets.flatten(0, 1)).view(outputs.shape[:2])


def evaluate(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    *,
    tasks: int,
    steps: int,
    normalisations: tuple[str, ...],
    statistics: Weights | None = None,
    inner_batch: int | None = None,
) -> Evaluation:
    """Adapts to each of the first `tasks` fixed tasks of a split, by 0, 1, ... `steps` steps.

    Arguments:
        statistics: what "per-step" normalises with (see `MAML.predictions`).
        inner_batch: support examples in the minibatch of an inner step; None: all of them.
    """
    classification = distribution.classification
    size = maml.tasks_at_once or max(1, CHUNK_EXAMPLES // distribution.examples)
    losses: dict[str, list[Tensor]] = {name: [] for name in normalisations}
    accuracies: dict[str, list[Tensor]] = {name: [] for name in normalisations if classification}
    for first in range(0, tasks, size):
        numbers = range(first, min(first + size, tasks))
        batch = distribution.sample(split, SEED, 0, numbers)
        order = _order(split, batch, numbers, inner_batch, steps)
        outputs = maml.predictions(
            parameters, batch, steps, normalisations, order=order, statistics=statistics
        )
        for name in normalisations:
            losses[name].append(_loss_per_step(maml.loss, outputs[name], batch.query_y))
            if classification:
                accuracies[name].append(accuracy(outputs[name], batch.query_y[:, None]))
    return Evaluation(
        {name: torch.cat(parts).cpu().double() for name, parts in losses.items()},
        {name: torch.cat(parts).cpu().double() for name, parts in accuracies.items()},
    )


def _order(
    split: str,
    batch: TaskBatch,
    numbers: range,
    inner_batch: int | None,
    steps: int,
) -> Tensor | None:
    stream = task_stream(split, SEED, 0, numbers, batch.support_x.device).at("minibatches")
    return minibatch_order(stream, batch.support_x.shape[1], inner_batch, steps)


def examples(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    *,
    tasks: int,
    steps: int,
    normalisation: str,
    inner_batch: int | None = None,
) -> tuple[TaskBatch, Tensor]:
    """A few of a split's tasks and the outputs on their queries `[tasks, steps + 1, ...]`, for pictures.

    Curves are asked on a dense grid.
    """
    if isinstance(distribution, Regression):
        batch = distribution.sample(split, SEED, 0, range(tasks), grid=200)
    else:
        batch = distribution.sample(split, SEED, 0, range(tasks))
    order = _order(split, batch, range(tasks), inner_batch, steps)
    outputs = maml.predictions(parameters, batch, steps, (normalisation,), order=order)[normalisation]
    return TaskBatch(*(tensor.cpu() for tensor in batch)), outputs.cpu()

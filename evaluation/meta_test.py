"""Meta-test: loss and accuracy on fixed tasks after each inner step, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.batch import TaskBatch, TaskDistribution, Tree, first_tensor, tree_map
from common.optimizers import Weights
from common.processes import ALONE, World
from common.random import keys_of, minibatch_order, task_stream
from dataset import Regression
from inner_loop import NoFeaturesError
from learners.losses import accuracy
from maml import MAML
from tasks.image_tasks import ImageTasks

# Evaluation tasks are the same for every checkpoint. Their splits have streams of their own, so this
# seed shares nothing with a training seed of the same number.
SEED = 0

# Examples, and numbers in the fast weights, of a chunk of tasks: some 1.5 GB at the most (20-way, `convnet`;
# ResNet-18).
CHUNK_EXAMPLES = 2000
CHUNKS = 8  # at least, of tasks whose evaluation takes long
CHUNK_WEIGHTS = 50_000_000

DIVERGENCE = 10.0  # times the loss before adaptation; see `diverged`


@dataclass(frozen=True)
class Evaluation:
    """Per-task results `[tasks, steps + 1]` in float64, by normalisation ("transductive", ...)."""

    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]  # empty for regression

    def diverged(self, normalisation: str) -> Tensor:
        """Which tasks have diverged after which step: bool `[tasks, steps + 1]`."""
        return diverged(self.losses[normalisation])


def diverged(losses: Tensor) -> Tensor:
    """Which tasks have diverged after which step, from query losses: both `[tasks, steps + 1]`.

    A loss that is not finite, or more than ten times the loss before adaptation, the task's own and the
    median over tasks. Losses that may be negative are measured by their size: from the larger of the two, it
    is a growth by nine times that of the larger in size.
    """
    before = losses[:, :1]
    finite = before[before.isfinite()]
    # medians of none are NaN, which bounds nothing
    base, size = torch.fmax(before, finite.nanmedian()), torch.fmax(before.abs(), finite.abs().nanmedian())
    return ~losses.isfinite() | (losses > base + (DIVERGENCE - 1) * size)


def mean_and_interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tasks (the first axis) and half width of its 95 % confidence interval."""
    spread = values.std(0) if len(values) > 1 else torch.full_like(values.sum(0), torch.nan)
    return values.mean(0), 1.96 * spread / len(values) ** 0.5


def loss_per_step(maml: MAML, outputs: Tree, targets: Tree) -> Tensor:
    """`[tasks, steps + 1]`; one flat `vmap`, since a nested one of mse_loss fails in PyTorch 2.15."""
    sizes = first_tensor(outputs).shape[:2]
    targets = tree_map(lambda t: t[:, None].expand(-1, sizes[1], *t.shape[1:]).flatten(0, 1), targets)
    outputs = tree_map(lambda t: t.flatten(0, 1), outputs)
    return maml.over_tasks(maml.loss)(outputs, targets).view(sizes)


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
    skipped: int = 0,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Adapts to each of `tasks` fixed tasks of a split, by 0, 1, ... `steps` steps.

    Arguments:
        skipped: the first tasks of the split, which are left out.
        statistics: what "per-step" normalises with (see `MAML.predictions`).
        inner_batch: support examples in the minibatch of an inner step; None: all of them.
        world: the processes that share the chunks of tasks; each gets the whole result, which is the same
            for any number of them.
        interrupted: asked before each chunk; raises InterruptedError where it says yes.
    """
    size = chunk_size(maml, parameters, distribution, tasks)
    kinds = ("loss", "accuracy") if distribution.classification else ("loss",)
    found = torch.zeros(len(kinds), len(normalisations), tasks, steps + 1, dtype=torch.float64)
    for first in range(0, tasks, size)[world.rank :: world.size]:
        if interrupted():
            raise InterruptedError
        numbers = range(skipped + first, skipped + min(first + size, tasks))
        batch = distribution.sample(split, SEED, 0, numbers)
        random = _random(split, batch, numbers, inner_batch, steps)
        outputs = maml.predictions(parameters, batch, steps, normalisations, **random, statistics=statistics)
        rows = slice(first, first + len(numbers))
        for of_norm, name in enumerate(normalisations):
            found[0, of_norm, rows] = loss_per_step(maml, outputs[name], batch.query_y).cpu().double()
            if distribution.classification:
                shares = accuracy(outputs[name], first_tensor(batch.query_y)[:, None])
                found[1, of_norm, rows] = shares.cpu().double()
    # each number is some process's, and zero in all others
    losses, *accuracies = (
        dict(zip(normalisations, kind, strict=True)) for kind in world.summed(found, patiently=True)()
    )
    return Evaluation(losses, accuracies[0] if accuracies else {})


def chunk_size(maml: MAML, parameters: Weights, distribution: TaskDistribution, tasks: int) -> int:
    """Tasks taken at a time. It does not depend on the number of processes, nor do then the results."""
    if maml.tasks_at_once:
        return maml.tasks_at_once
    numbers_adapted = sum(w.numel() for name, w in parameters.items() if name in maml.adapted)
    fitting = min(CHUNK_EXAMPLES // distribution.examples, CHUNK_WEIGHTS // max(1, numbers_adapted))
    if not distribution.computed:  # worth sharing
        fitting = min(fitting, -(-tasks // CHUNKS))
    return max(1, fitting)


def _random(
    split: str, batch: TaskBatch, numbers: range, inner_batch: int | None, steps: int
) -> dict[str, Any]:
    """What is random in adapting to these tasks: the order of the examples, and the learner's own keys."""
    support = first_tensor(batch.support_x)
    stream = task_stream(split, SEED, 0, numbers, support.device)
    order = minibatch_order(stream.at("minibatches"), support.shape[1], inner_batch, steps)
    return {"order": order, "keys": keys_of(stream)}


def can_be_drawn(distribution: TaskDistribution) -> bool:
    """Whether there is a picture of a task: of curves, and of images."""
    return isinstance(distribution, Regression | ImageTasks)


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
    batch = _shown_tasks(distribution, split, tasks)
    random = _random(split, batch, range(tasks), inner_batch, steps)
    outputs = maml.predictions(parameters, batch, steps, (normalisation,), **random)[normalisation]
    return TaskBatch(*(tree_map(Tensor.cpu, tree) for tree in batch)), first_tensor(outputs).cpu()


def _shown_tasks(distribution: TaskDistribution, split: str, tasks: int) -> TaskBatch:
    if isinstance(distribution, Regression):
        return distribution.sample(split, SEED, 0, range(tasks), grid=200)
    return distribution.sample(split, SEED, 0, range(tasks))


class SeenFeatures(NamedTuple):
    """What goes into the head, of the examples of one task, the support set first."""

    features: Tensor  # [steps + 1, examples, features]
    x: Tensor  # [examples, ...]
    y: Tensor  # [examples, ...]
    support: int  # how many of them


def features_of_task(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    split: str,
    *,
    steps: int,
    normalisation: str,
    inner_batch: int | None = None,
) -> SeenFeatures | None:
    """How a split's first task is seen, after each inner step; None where the learner has no features.

    Curves are asked on a dense grid.
    """
    batch = _shown_tasks(distribution, split, 1)
    random = _random(split, batch, range(1), inner_batch, steps)
    try:
        features = maml.features(parameters, batch, steps, normalisation, **random)[0]
    except NoFeaturesError:
        return None
    support_x, support_y, query_x, query_y = (first_tensor(tree)[0].cpu() for tree in batch)
    x, y = torch.cat([support_x, query_x]), torch.cat([support_y, query_y])
    return SeenFeatures(features.float().cpu(), x, y, len(support_x))

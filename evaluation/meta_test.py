"""The one evaluation: query loss and accuracy on fixed tasks, after 0, 1, ... inner steps.

Validation, --eval, --baselines and --compare all call `evaluate`. Its `Evaluation` holds one value a task and
step; tables, figures and records are made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.batch import TaskBatch, TaskDistribution, Tree, first_tensor, tree_map
from common.optimizers import Weights
from common.processes import ALONE, World
from common.random import derive_keys, minibatch_order, task_stream
from common.task import Extras
from learners.reading import Metric, Reading, choose_reading
from maml import MAML

SEED = 0  # of the evaluation tasks; validation and test have random streams apart from those of training

# Limits of a chunk of tasks, which then fills about 1.5 GB at the most (20-way `convnet`; ResNet-18)
CHUNK_EXAMPLES, CHUNK_WEIGHTS, CHUNK_OUTPUTS = 2000, 50_000_000, 50_000_000
COMPILED_EXAMPLES = 400  # the same for compiled predictions, which then stay in the cache
MIN_CHUNKS = 8  # to share among processes, of tasks that take long
SIZES = ("ways", "shots")  # of tasks, by which results are reported where they vary
DIVERGENCE = 10.0  # a diverged loss is this many times the loss before adaptation


@dataclass(frozen=True)
class Evaluation:
    """Results on fixed tasks, float64 `[tasks, steps + 1]`; NaN where a measure is undefined for a task."""

    measures: dict[str, dict[str, Tensor]]  # by name, see `Reading.measures`; then by normalisation
    metric: Metric | None = None
    parts: dict[str, Evaluation] = field(default_factory=dict)  # by data set, of whose means this is the mean
    sizes: dict[str, Tensor] = field(default_factory=dict)  # those of `SIZES` that vary, int64 [tasks]

    @classmethod
    def over(cls, parts: dict[str, Evaluation]) -> Evaluation:
        """Return the mean over data sets, in which task i is the mean over their tasks i.

        Data sets count alike, and an interval over tasks is that of a mean of independent samples.
        """
        first, *_ = every = list(parts.values())

        def mean(name: str, norm: str) -> Tensor:
            return torch.stack([part.measures[name][norm] for part in every]).mean(0)

        measures = {name: {norm: mean(name, norm) for norm in first.losses} for name in first.measures}
        return cls(measures, first.metric, parts)

    @property
    def losses(self) -> dict[str, Tensor]:
        return self.measures["loss"]

    @property
    def quoted(self) -> str:
        """Return which of the measures is reported: "metric", "accuracy" or "loss"."""
        return next(name for name in ("metric", "accuracy", "loss") if name in self.measures)

    @property
    def measure(self) -> str:
        """Return the name of the reported measure: the metric's, "accuracy", or "loss"."""
        return self.metric.name if self.metric else self.quoted

    @property
    def more_is_better(self) -> bool:
        return self.metric.more_is_better if self.metric else self.quoted == "accuracy"

    def measured(self, normalisation: str) -> Tensor:
        """Return the results to report, `[tasks, steps + 1]`."""
        return self.measures[self.quoted][normalisation]

    def find_diverged(self, normalisation: str) -> Tensor:
        """Return which tasks have diverged after which step: bool `[tasks, steps + 1]`.

        Of the mean over data sets, those of which one has.
        """
        if self.parts:
            return torch.stack([part.find_diverged(normalisation) for part in self.parts.values()]).any(0)
        return find_diverged(self.losses[normalisation])


def find_diverged(losses: Tensor) -> Tensor:
    """Return which of the query losses `[tasks, steps + 1]` have diverged.

    They are not finite, or above ten times the loss before adaptation: the larger of the task's and of the
    median over tasks. Losses that may be negative have grown by more than nine times the size of that loss.
    """
    before = losses[:, :1]
    finite = before[before.isfinite()]
    # the median of no numbers is NaN, which `fmax` ignores
    base, size = torch.fmax(before, finite.nanmedian()), torch.fmax(before.abs(), finite.abs().nanmedian())
    return ~losses.isfinite() | (losses > base + (DIVERGENCE - 1) * size)


def mean_and_interval(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean over tasks (the first axis) and the half width of its 95 % confidence interval.

    Only the values in `mask` count; None: all.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count = mask.sum(0)
    mean = values.where(mask, 0).sum(0) / count
    variance = (values - mean).where(mask, 0).square().sum(0) / (count - 1)
    return mean, 1.96 * (variance / count).sqrt()


def loss_per_step(maml: MAML, outputs: Tree, batch: TaskBatch) -> Tensor:
    """Return the query losses `[tasks, steps + 1]` of `MAML.predictions`."""
    # one flat `vmap` over tasks and steps: a nested one of `mse_loss` fails in PyTorch 2.15
    sizes = first_tensor(outputs).shape[:2]
    targets, extras = tree_map(
        lambda t: t[:, None].expand(-1, sizes[1], *t.shape[1:]).flatten(0, 1),
        (batch.query_y, Extras(mask=batch.query_mask, ways=batch.ways)),
    )
    outputs = tree_map(lambda t: t.flatten(0, 1), outputs)
    return maml.over_tasks(maml.loss)(outputs, targets, extras).view(sizes)


def list_normalisations(maml: MAML, statistics: Weights) -> tuple[str, ...]:
    """Return the normalisations to test a learner with; without batch norm, the one it was trained with."""
    if not maml.has_batch_norm:
        return (maml.choices.query_norm,)
    return ("transductive", "inductive", *["per-step"] * bool(statistics))


def evaluate(
    maml: MAML, parameters: Weights, distribution: TaskDistribution, split: str, **how: Any
) -> Evaluation:
    """Measure the fixed tasks of a split (see `measure_tasks`); of a mixture, those of each data set."""
    if not distribution.parts:
        return measure_tasks(maml, parameters, distribution, split, **how)
    parts = distribution.parts.items()
    return Evaluation.over({n: measure_tasks(maml, parameters, part, split, **how) for n, part in parts})


def measure_tasks(
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
    """Adapt to fixed tasks of a split by 0, 1, ... `steps` inner steps, and measure the query sets.

    Args:
        tasks: number of tasks, after the first `skipped` of the split.
        normalisations: batch-norm readings to measure, see `MAML.predictions`.
        statistics: running statistics that "per-step" normalises with.
        inner_batch: support examples in the minibatch of an inner step; None: all.
        world: the processes that share the chunks of tasks. All get the same result, whatever their number.
        interrupted: called before each chunk; InterruptedError is raised once it returns True.
    """
    size = chunk_size(maml, parameters, distribution, split, tasks, steps)
    reading = choose_reading(maml.reading, distribution.most_ways)
    results = torch.zeros(len(reading.measures), len(normalisations), tasks, steps + 1, dtype=torch.float64)
    sizes = torch.zeros(len(SIZES), tasks, dtype=torch.float64)  # zero where they do not vary
    for first in range(0, tasks, size)[world.rank :: world.size]:
        if interrupted():
            raise InterruptedError
        numbers = range(skipped + first, skipped + min(first + size, tasks))
        batch = distribution.sample(split, SEED, 0, numbers)
        order, keys = derive_randomness(
            split, batch.support_x, numbers, inner_batch, steps, batch.support_mask
        )
        outputs = maml.predictions(
            parameters, batch, steps, normalisations, order=order, keys=keys, statistics=statistics
        )
        rows = slice(first, first + len(numbers))
        sizes[:, rows] = count_sizes(batch, distribution.most_ways).cpu().double()
        for column, name in enumerate(normalisations):
            for measure, values in _measure(maml, reading, outputs[name], batch).items():
                results[reading.measures.index(measure), column, rows] = values.cpu().double()
    results, sizes = (world.sum(part, patiently=True) for part in (results, sizes))  # 0 in all but one
    by_norm = [dict(zip(normalisations, part, strict=True)) for part in results]
    measures = dict(zip(reading.measures, by_norm, strict=True))
    varying = {name: part.long() for name, part in zip(SIZES, sizes, strict=True) if (part != part[0]).any()}
    return Evaluation(measures, reading.metric, sizes=varying)


def count_sizes(batch: TaskBatch, ways: int | None) -> Tensor:
    """Return the numbers `SIZES` of each task, `[2, tasks]`, 0 where the batch does not tell.

    Shots are the support examples of a class, rounded where its classes differ.
    """
    none = torch.zeros(len(first_tensor(batch.support_x)), device=first_tensor(batch.support_x).device)
    classes = none if batch.ways is None else batch.ways
    if batch.support_mask is None:
        return torch.stack([classes, none])
    shots = batch.support_mask.sum(1) / ((ways or 1) if batch.ways is None else batch.ways)
    return torch.stack([classes, shots.round().clamp(min=1)])


def _measure(maml: MAML, reading: Reading, outputs: Tree, batch: TaskBatch) -> dict[str, Tensor]:
    """Return the measures `[tasks, steps + 1]` of outputs `[tasks, steps + 1, ...]` by name."""
    measures = {"loss": loss_per_step(maml, outputs, batch)}
    targets, mask = tree_map(lambda t: t[:, None], batch.query_y), batch.query_mask
    beside_steps = targets, None if mask is None else mask[:, None]
    if reading.has_accuracy:
        measures["accuracy"] = reading.accuracy(outputs, *beside_steps, before=2)
    if reading.metric is not None:
        measures["metric"] = reading.metric.per_step(outputs, batch, reading)
    return measures | reading.measure_further(outputs, *beside_steps, before=2)


def chunk_size(
    maml: MAML, parameters: Weights, distribution: TaskDistribution, split: str, tasks: int, steps: int
) -> int:
    """Return how many tasks are adapted to at a time, whatever the number of processes."""
    if maml.tasks_at_once:
        return maml.tasks_at_once
    adapted = sum(w.numel() for name, w in parameters.items() if name in maml.adapted)
    one = distribution.sample(split, SEED, 0, range(1))
    examples = sum(first_tensor(x).shape[1] for x in (one.support_x, one.query_x))
    limit = COMPILED_EXAMPLES if maml.accelerate else CHUNK_EXAMPLES
    size = min(limit // examples, CHUNK_WEIGHTS // max(1, adapted))
    if maml.reading is not None:  # images as outputs are many numbers
        size = min(size, CHUNK_OUTPUTS // ((steps + 1) * examples * maml.reading.numbers))
    if distribution.kind != "curves":  # these take long, and are worth sharing among processes
        size = min(size, -(-tasks // MIN_CHUNKS))
    size = max(1, size)
    equal = max(part for part in range(1, size + 1) if tasks % part == 0)  # compiled once, not twice
    return equal if 2 * equal >= size else size


def derive_randomness(
    split: str,
    support_x: Tree,
    numbers: range,
    inner_batch: int | None,
    steps: int,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Return the arguments `order` and `keys` of `MAML.predictions` for tasks of these numbers."""
    support = first_tensor(support_x)
    stream = task_stream(split, SEED, 0, numbers, support.device)
    order = minibatch_order(stream.at("minibatches"), support.shape[1], inner_batch, steps, mask)
    return order, derive_keys(stream)

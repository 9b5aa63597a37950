"""Task distributions: what can be sampled, and how.

A distribution samples a whole meta-batch as tensors on its device: no loop over tasks, no workers.
Task t of iteration i is a pure function of (split, seed, i, t), see randomness.py. A new one needs a
`sample` method as `TaskDistribution` describes it and a line in `build_distribution`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from omniglot import load_omniglot
from randomness import Stream
from tasks import TaskBatch

SPLITS = ("train", "validation", "test")


class TaskDistribution(Protocol):
    """Anything that samples tasks."""

    classification: bool  # labels are classes, and accuracy means something
    computed: bool  # `sample` computes tasks from numbers alone, so that it can be compiled with the step
    on_host: bool  # `sample` works on the host, ahead of its call: it asks for the iteration as a number

    @property
    def examples(self) -> int:
        """Support and query examples of one task."""
        ...

    def resized(self, shots: int) -> TaskDistribution:
        """The same tasks with another number of support examples (per class in classification)."""
        ...

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        """The tasks with these numbers of an iteration, of the "train", "validation" or "test" split.

        The iteration may be an int64 scalar on the distribution's device; the tasks are the same.
        """
        ...


def minibatch_order(stream: Stream, examples: int, batch: int | None, steps: int) -> Tensor | None:
    """The examples of each inner step: int64 `[tasks, steps, batch]`, or None where all are taken.

    As Nichol et al. (2018) have it: passes over the examples, each in a new random order, cut into batches.
    """
    if batch is None or batch >= examples or not steps:
        return None
    passes = -(-steps * batch // examples)
    orders = [stream.at(number).distinct(examples, examples) for number in range(passes)]
    return torch.cat(orders, 1)[:, : steps * batch].unflatten(1, (steps, batch))


def task_stream(split: str, seed: int, iteration: int | Tensor, tasks: range, device: torch.device) -> Stream:
    """One independent random stream for each task."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: one of {', '.join(SPLITS)}")
    numbers = torch.arange(tasks.start, tasks.stop, device=device)
    return Stream.from_seed(seed).at(split).at(iteration).at(numbers)


def keys_of(stream: Stream) -> Tensor:
    """Keys of the random numbers that a learner draws in each task (see elementary.py): `[tasks, 2]`."""
    own = stream.at("learner")
    return torch.stack([own.key_1, own.key_2], -1)  # type: ignore[list-item]


# ---- regression ----------------------------------------------------------------------------------


class Regression(ABC):
    """Curves from a parametric family: inputs `[tasks, points, 1]`, targets of the same shape.

    Arguments:
        shots, queries: points of the support and of the query set of a task.
        noise: standard deviation of Gaussian noise on the targets of both.
        oracle: the parameters of the task join the inputs: `[tasks, points, 1 + parameters]`.
    """

    classification = False
    computed = True
    on_host = False

    def __init__(
        self,
        shots: int,
        queries: int,
        *,
        noise: float = 0.0,
        oracle: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shots = shots
        self.queries = queries
        self.noise = noise
        self.oracle = oracle
        self.device = torch.device(device)
        self.dtype = dtype

    @property
    def examples(self) -> int:
        return self.shots + self.queries

    def resized(self, shots: int) -> Regression:
        other = copy.copy(self)
        other.shots = shots
        return other

    @abstractmethod
    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        """What makes a task: tensors `[tasks, 1]`."""

    @abstractmethod
    def inputs(self, stream: Stream, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        """Random inputs `[tasks, points]`."""

    @abstractmethod
    def grid(self, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        """Dense, sorted inputs for a picture: `[tasks, points]`, or `[1, points]`."""

    @abstractmethod
    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """The targets, without noise: `[tasks, points]`."""

    def sample(
        self, split: str, seed: int, iteration: int | Tensor, tasks: range, *, grid: int | None = None
    ) -> TaskBatch:
        """A meta-batch; with `grid`, the query is that many dense, sorted points without noise."""
        stream = task_stream(split, seed, iteration, tasks, self.device)
        parameters = self.parameters(stream.at("parameters"))
        support = self._examples(stream.at("support"), self.shots, parameters)
        if grid is None:
            return TaskBatch(*support, *self._examples(stream.at("query"), self.queries, parameters))
        x = self.grid(grid, parameters).expand(len(tasks), grid)
        return TaskBatch(*support, self._inputs(x, parameters), self.curve(x, parameters)[..., None])

    def _examples(self, stream: Stream, points: int, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x = self.inputs(stream, points, parameters)
        y = self.curve(x, parameters)
        if self.noise:
            y = y + self.noise * stream.at("noise").normal(points, self.dtype)
        return self._inputs(x, parameters), y[..., None]

    def _inputs(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        if not self.oracle:
            return x[..., None]
        told = torch.cat([p.to(x.dtype) for p in parameters], 1)
        return torch.cat([x[..., None], told[:, None].expand(-1, x.shape[1], -1)], -1)

    @property
    def input_size(self) -> int:
        """Numbers that describe a point."""
        return self.sample("train", 0, 0, range(1)).query_x.shape[-1]


class Sinusoid(Regression):
    """y = a sin(x + phase): a in [0.1, 5), phase in [0, pi), x in [-5, 5), all uniform.

    Finn et al. (2017); they write x - phase, a mirrored family.
    """

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        amplitude, phase = stream.uniform(2, 0.0, 1.0, self.dtype).split(1, 1)
        return 0.1 + 4.9 * amplitude, math.pi * phase

    def inputs(self, stream: Stream, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        return stream.uniform(points, -5.0, 5.0, self.dtype)

    def grid(self, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        return torch.linspace(-5.0, 5.0, points, device=self.device, dtype=self.dtype)[None]

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        amplitude, phase = parameters
        return amplitude * torch.sin(x + phase)


class SinusoidFrequency(Sinusoid):
    """y = a sin(w x + phase): amplitude and phase as above, frequency w uniform in [0.8, 1.2).

    The regression of the Meta-SGD paper (Li et al. 2017).
    """

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        return *super().parameters(stream), stream.at("frequency").uniform(1, 0.8, 1.2, self.dtype)

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        amplitude, phase, frequency = parameters
        return amplitude * torch.sin(frequency * x + phase)


class SinusoidLine(Sinusoid):
    """With even odds a sinusoid as above, or a line with slope and intercept uniform in [-3, 3)."""

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        is_line = stream.at("kind").words(1) >> 31 == 1
        line = stream.at("line").uniform(2, -3.0, 3.0, self.dtype).split(1, 1)
        return *super().parameters(stream), *line, is_line

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        amplitude, phase, slope, intercept, is_line = parameters
        return torch.where(is_line, slope * x + intercept, super().curve(x, (amplitude, phase)))


class Harmonic(Regression):
    """y = a1 sin(w x + b1) + a2 sin(2 w x + b2), from Lacoste et al. (2018).

    w uniform in [5, 7), b1 and b2 in [0, 2 pi), a1 and a2 standard normal; x normal with std 1 around
    a mean of the task, uniform in [-4, 4).
    """

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        frequency, phase_1, phase_2, mean = stream.uniform(4, 0.0, 1.0, self.dtype).split(1, 1)
        amplitudes = stream.at("amplitudes").normal(2, self.dtype).split(1, 1)
        return (
            5.0 + 2.0 * frequency,
            *amplitudes,
            2.0 * math.pi * phase_1,
            2.0 * math.pi * phase_2,
            8.0 * mean - 4.0,
        )

    def inputs(self, stream: Stream, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        mean = parameters[-1]
        return mean + stream.normal(points, self.dtype)

    def grid(self, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        mean = parameters[-1]
        return mean + torch.linspace(-3.0, 3.0, points, device=self.device, dtype=self.dtype)

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        frequency, amplitude_1, amplitude_2, phase_1, phase_2, _ = parameters
        first = amplitude_1 * torch.sin(frequency * x + phase_1)
        return first + amplitude_2 * torch.sin(2.0 * frequency * x + phase_2)


# ---- classification ------------------------------------------------------------------------------


class Omniglot:
    """N-way K-shot tasks over handwritten characters (Lake et al. 2015), as Vinyals et al. (2016) built them.

    A task draws `ways` different characters, then one of four rotations for each, in every split;
    labels follow the random order of the characters. Support and query never share a drawing.
    Inputs `[tasks, ways * examples, 1, 28, 28]` in [0, 1] with ink = 1; labels int64
    `[tasks, ways * examples]`, ordered by class.

    Arguments:
        images: uint8 `[characters, drawings, height, width]`, ink = 255.
        splits: the characters of each split, as int64 positions in `images`.
        ways: classes of a task; shots, queries: images per class of the support and the query set.
    """

    classification = True
    computed = False
    on_host = False

    def __init__(
        self,
        images: Tensor,
        splits: dict[str, Tensor],
        *,
        ways: int,
        shots: int,
        queries: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _, self.drawings, *self.image_size = images.shape
        self.pixels = images.flatten(2).to(device)
        self.splits = {name: characters.to(device) for name, characters in splits.items()}
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.dtype = dtype
        positions = torch.arange(self.pixels.shape[-1]).view(*self.image_size)
        turned = [torch.rot90(positions, quarters).flatten() for quarters in range(4)]
        self.turned = torch.stack(turned).to(device)  # [4, pixels]

    @property
    def examples(self) -> int:
        return self.ways * (self.shots + self.queries)

    def resized(self, shots: int) -> Omniglot:
        other = copy.copy(self)
        other.shots = shots
        return other

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        """A meta-batch: one index operation on the whole dataset."""
        stream = task_stream(split, seed, iteration, tasks, self.pixels.device)
        characters = self.splits[split]
        characters = characters[stream.at("classes").distinct(self.ways, len(characters))]
        quarters = stream.at("rotations").words(self.ways) >> 30
        order = stream.at("drawings").words(self.ways * self.drawings)
        drawings = order.view(len(tasks), self.ways, self.drawings).argsort(-1)
        support, query, _ = drawings.split(
            [self.shots, self.queries, self.drawings - self.shots - self.queries], -1
        )
        return TaskBatch(
            *self._examples(characters, quarters, support),
            *self._examples(characters, quarters, query),
        )

    def _examples(self, characters: Tensor, quarters: Tensor, drawings: Tensor) -> tuple[Tensor, Tensor]:
        tasks, ways, examples = drawings.shape
        pixels = self.pixels[
            characters[:, :, None, None], drawings[..., None], self.turned[quarters][:, :, None]
        ]
        x = pixels.view(tasks, ways * examples, 1, *self.image_size).to(self.dtype) / 255
        labels = torch.arange(ways, device=pixels.device).repeat_interleave(examples)
        return x, labels.expand(tasks, -1)


FAMILIES: dict[str, type[Regression]] = {
    "sinusoid": Sinusoid,
    "sinusoid-frequency": SinusoidFrequency,
    "sinusoid-line": SinusoidLine,
    "harmonic": Harmonic,
}


def build_distribution(
    name: str,
    *,
    ways: int | None,
    shots: int,
    queries: int,
    noise: float,
    oracle: bool = False,
    omniglot_split: str,
    resize: str,
    data_root: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> TaskDistribution:
    """The distribution of that name; Omniglot is read, or fetched, from `data_root`."""
    if name in FAMILIES:
        return FAMILIES[name](shots, queries, noise=noise, oracle=oracle, device=device, dtype=dtype)
    if name != "omniglot" or ways is None:
        raise ValueError(f"no dataset {name!r} with ways {ways}")
    images, splits = load_omniglot(data_root, split=omniglot_split, resize=resize)
    return Omniglot(images, splits, ways=ways, shots=shots, queries=queries, device=device, dtype=dtype)

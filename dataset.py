"""Task distributions: what can be sampled, and how.

A distribution samples a whole meta-batch as tensors on its device: no loop over tasks, no workers.
Task t of iteration i is a pure function of (split, seed, i, t), see randomness.py. Curves are computed
here; images (image_tasks.py) and tables (tables.py) are looked up; the user's own are asked for. A new one
in this project needs what `TaskDistribution` in tasks.py describes, and a line in `build_distribution`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import Kind, TaskBatch, TaskDistribution, first_tensor, tree_map
from common.errors import UsageError
from common.own_code import asked_for, called, is_own_code, load_code
from common.random import Stream, task_stream
from tasks.image_tasks import ImageTasks, check_sizes
from tasks.images import ImageSet, load_images, load_named
from tasks.omniglot import load_omniglot
from tasks.prefetch import Ahead
from tasks.tables import Columns, TableTasks, load_table

GRID_POINTS = 200  # of a curve in a picture

# ---- regression ----------------------------------------------------------------------------------


class Regression(ABC):
    """Curves from a parametric family: inputs `[tasks, points, 1]`, targets of the same shape.

    Arguments:
        shots, queries: points of the support and of the query set of a task.
        noise: standard deviation of Gaussian noise on the targets of both.
        oracle: the parameters of the task join the inputs: `[tasks, points, 1 + parameters]`.
    """

    kind: Kind = "curves"
    classification = False
    ways = None
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

    @property
    def split_names(self) -> dict[str, list[str]]:
        return {}

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
        self,
        split: str,
        seed: int | Tensor,
        iteration: int | Tensor,
        tasks: range | Tensor,
        *,
        grid: int | None = None,
    ) -> TaskBatch:
        """A meta-batch; with `grid`, the query is that many dense, sorted points without noise."""
        stream = task_stream(split, seed, iteration, tasks, self.device)
        parameters = self.parameters(stream.at("parameters"))
        support = self._examples(stream.at("support"), self.shots, parameters)
        if grid is None:
            return TaskBatch(*support, *self._examples(stream.at("query"), self.queries, parameters))
        x = self.grid(grid, parameters).expand(len(tasks), grid)
        return TaskBatch(*support, self._inputs(x, parameters), self.curve(x, parameters)[..., None])

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        """Return tasks whose query is the true curve on a grid."""
        return self.sample(split, seed, 0, range(tasks), grid=GRID_POINTS)

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


# ---- the user's own ------------------------------------------------------------------------------


class Custom:
    """Tasks from the user's object, which has one method, `sample(split, seeds)`.

    It gives the four tensors of a `TaskBatch` for "train", "validation" or "test" and seeds, int64 `[tasks]`:
    each task is a function of the split and of its seed. (Nested tuples or dictionaries of tensors stand for
    several inputs or outputs.) Labels are int64; numbers to predict have an axis of their own, behind the
    examples'.

    Raises UsageError where the object has no such method, or gives anything else.

    Arguments:
        make: the object for a number of shots.
        name: of the object's factory, for messages.
        ways: classes of a task; None: regression.
    """

    kind: Kind = "other"
    computed = False
    on_host = True

    def __init__(
        self,
        make: Callable[[int], Any],
        name: str,
        *,
        ways: int | None,
        shots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.make = make
        self.name = name
        self.shots = shots
        self.ways = ways
        self.classification = ways is not None
        self.device = torch.device(device)
        self.dtype = dtype
        self.source = make(shots)
        if not callable(getattr(self.source, "sample", None)):
            raise UsageError(f"--dataset {name} makes a {type(self.source).__name__} without a method sample")
        self.fetched = Ahead(self._sample)

    @cached_property
    def examples(self) -> int:
        batch = self._sample("train", 0, 0, range(1))  # past what is fetched ahead
        return sum(first_tensor(tree).shape[1] for tree in (batch.support_x, batch.query_x))

    @property
    def split_names(self) -> dict[str, list[str]]:
        return {}

    def resized(self, shots: int) -> Custom:
        if shots == self.shots:
            return self
        return Custom(
            self.make, self.name, ways=self.ways, shots=shots, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        batch = self.fetched(split, seed, int(iteration), tasks)
        return TaskBatch(*(tree_map(self._placed, tree) for tree in batch))

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        """Return the first tasks as `sample` gives them."""
        return self.sample(split, seed, 0, range(tasks))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _sample(self, split: str, seed: int, iteration: int, tasks: range) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, torch.device("cpu"))
        high, low = stream.at("own").words(2).unbind(1)
        seeds = (high >> 1 << 32) | low  # 63 bits
        found = called(self.source.sample, f"{self.name}: sample", "--dataset", split, seeds)
        problem = self._problem(found, len(tasks))
        if problem:
            raise UsageError(f"--dataset {self.name}: sample({split!r}, {len(tasks)} seeds) {problem}")
        return TaskBatch(*found)

    def _problem(self, found: Any, tasks: int) -> str | None:
        if not isinstance(found, tuple | list) or len(found) != 4:
            return "should give four tensors: support x and y, query x and y"
        for name, tree in zip(TaskBatch._fields, found, strict=True):
            tensors = pytree.tree_leaves(tree)
            if not tensors or not all(isinstance(t, Tensor) for t in tensors):
                return f"gives no tensor as {name}"
            if any(t.dim() < 2 or len(t) != tasks or not t.shape[1] for t in tensors):
                return f"gives {name} {tuple(tensors[0].shape)}: it should be [{tasks} tasks, examples, ...]"
            if len({t.shape[1] for t in tensors}) > 1:
                return f"gives parts of {name} with different numbers of examples"
        sizes = [first_tensor(tree).shape[1] for tree in found]
        if sizes[0] != sizes[1] or sizes[2] != sizes[3]:
            return f"gives x and y of different numbers of examples: {sizes}"
        if not self.classification and min(first_tensor(found[i]).dim() for i in (1, 3)) < 3:
            return "gives targets without an axis of their own: they should be [tasks, examples, numbers]"
        for labels in map(first_tensor, (found[1], found[3]) if self.classification else ()):
            if labels.is_floating_point():
                return "gives labels that are not int64"
            if labels.min() < 0 or labels.max() >= (self.ways or 0):
                return f"gives labels from {labels.min()} to {labels.max()}: they go from 0 to -n - 1"
        return None


@dataclass(frozen=True)
class ImageOptions:
    """How images are brought to tensors, and where these are kept."""

    size: int
    channels: int
    invert: bool = False
    resize: str = "lanczos"
    quarter_turns: bool = False
    augment: tuple[str, ...] = ()
    place: str = "auto"


FAMILIES: dict[str, type[Regression]] = {
    "sinusoid": Sinusoid,
    "sinusoid-frequency": SinusoidFrequency,
    "sinusoid-line": SinusoidLine,
    "harmonic": Harmonic,
}


def build_distribution(
    name: str,
    *,
    classification: bool,
    ways: int | None,
    shots: int,
    queries: int,
    noise: float = 0.0,
    oracle: bool = False,
    images: ImageOptions | None = None,
    columns: Columns | None = None,
    shares: tuple[int, int, int] = (64, 16, 20),
    split_seed: int = 0,
    omniglot_split: str = "random",
    arguments: dict[str, Any] | None = None,
    for_test: bool = False,
    data_root: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> TaskDistribution:
    """The distribution of that name; named sets are read, or fetched, from `data_root`.

    Arguments:
        for_test: there is no training on it: all classes or tasks of a set without a split of its own are
            for test.
    """
    placed: dict[str, Any] = {"device": device, "dtype": dtype}
    if name in FAMILIES:
        return FAMILIES[name](shots, queries, noise=noise, oracle=oracle, device=device, dtype=dtype)
    kind, _, path = name.partition(":")
    split: dict[str, Any] = {"shares": shares, "split_seed": split_seed}
    if kind == "table":
        table = load_table(Path(path), columns or Columns(), classification=classification, **split)
        if for_test and not table.own_splits:
            table = replace(table, splits=all_for_test(len(table.tasks)))
        return TableTasks(table, shots=shots, queries=queries, ways=ways, **placed)
    if is_own_code(name):
        factory, given = load_code(name, "--dataset"), arguments or {}

        def make(shots: int) -> Any:
            sizes = asked_for(factory, {"ways": ways, "shots": shots, "queries": queries})
            return called(factory, name, "--dataset", **sizes | given)

        return Custom(make, name, ways=ways if classification else None, shots=shots, **placed)
    if ways is None or images is None:
        raise ValueError(f"no dataset {name!r} with ways {ways}")

    def as_used(found: ImageSet) -> ImageSet:
        everything = for_test and not found.own_splits
        return replace(found, splits=all_for_test(len(found.names))) if everything else found

    if name == "omniglot":
        pixels, splits = load_omniglot(data_root, split=omniglot_split, resize=images.resize)
        pixels = pixels if images.invert else 255 - pixels
        found = ImageSet.of_equal_classes(pixels, splits, "Omniglot")
    else:
        form: dict[str, Any] = {
            "size": images.size, "channels": images.channels, "invert": images.invert,
            "resize": images.resize,
        }  # fmt: skip

        def check(found: ImageSet) -> None:
            check_sizes(as_used(found), ways=ways, shots=shots, queries=queries)

        form["check"] = check
        found = load_images(Path(path), **form, **split) if path else load_named(name, data_root, **form)
    found = as_used(found)
    return ImageTasks(
        found, ways=ways, shots=shots, queries=queries, augment=images.augment, place=images.place,
        quarter_turns=images.quarter_turns or name == "omniglot", **placed,
    )  # fmt: skip


def all_for_test(count: int) -> dict[str, Tensor]:
    """Splits in which everything is for test."""
    none = torch.zeros(0, dtype=torch.int64)
    return {"train": none, "validation": none, "test": torch.arange(count)}

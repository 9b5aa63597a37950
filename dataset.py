"""Task distributions by name: what `--dataset` can be, and how a meta-batch is sampled from it.

`build_distribution` makes a distribution from the options of tasks, and its `sample` gives a whole
meta-batch, a `TaskBatch`, as tensors on the device: no loop over tasks, no workers. Task t of iteration i is
a pure function of (split, seed, i, t), see common/random.py. Curves are computed here, images and tables
(tasks/) are looked up, the user's own tasks are asked for. A new one needs the members of `TaskDistribution`
in common/batch.py, and a line in `build_distribution`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import TaskBatch, TaskDistribution, first_tensor, tree_map
from common.errors import UsageError
from common.own_code import call_factory, is_own_code, load_code, parse_arguments, select_accepted
from common.random import SPLITS, Stream, task_stream
from tasks.image_tasks import ImageTasks
from tasks.images import Form, ImageSet, open_folder
from tasks.omniglot import open_omniglot
from tasks.options import TaskOptions
from tasks.prefetch import Prefetch
from tasks.published import open_benchmark
from tasks.splits import all_for_test
from tasks.table_tasks import TableTasks
from tasks.tables import Columns, load_table

GRID_POINTS = 200  # of a curve in a picture


def build_distribution(
    options: TaskOptions,
    *,
    data_root: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    for_test: bool = False,
) -> TaskDistribution:
    """Return the task distribution `options.dataset`.

    Args:
        data_root: the folder from which named image sets are read; they are fetched into it if need be.
        for_test: there is no training on it: of data without a split of its own, everything is for test.

    Raises UsageError where the data cannot be read, or is too little for tasks of this size.
    """
    name = options.dataset
    placed: dict[str, Any] = {"device": device, "dtype": dtype}
    if name in FAMILIES:
        return FAMILIES[name](
            options.shots, options.queries, noise=options.noise, oracle=options.oracle, **placed
        )
    sizes: dict[str, Any] = {"ways": options.ways, "shots": options.shots, "queries": options.queries}
    if is_own_code(name):
        factory, arguments = load_code(name, "--dataset"), parse_arguments(options.dataset_args)

        def make(shots: int) -> Any:
            sizes_of_task = select_accepted(factory, sizes | {"shots": shots})
            return call_factory(factory, name, "--dataset", **sizes_of_task | arguments)

        return Custom(make=make, name=name, ways=options.ways, shots=options.shots, **placed)
    if name.startswith("table:"):
        path, columns = Path(name.partition(":")[2]), Columns.parse(options.columns)
        table = load_table(path, columns, classification=options.classification, shares=_shares(options))
        if for_test and not table.own_splits:
            table = replace(table, splits=all_for_test(len(table.tasks)))
        return TableTasks(table=table, **sizes, **placed)
    images = _open_images(options, data_root)
    if for_test and not images.own_splits:
        images = replace(images, splits=all_for_test(len(images.names)))
    quarter_turns = options.quarter_turns or name == "omniglot"
    augment = tuple(options.augment.split(",")) if options.augment else ()
    return ImageTasks(images, **sizes, quarter_turns=quarter_turns, augment=augment, **placed)


def _open_images(options: TaskOptions, data_root: Path) -> ImageSet:
    """Return the images of a folder or of a named set; no pixel is read yet."""
    assert options.image_size and options.channels
    form = Form(options.image_size, options.channels, options.invert, options.resize)
    if options.dataset == "omniglot":
        return open_omniglot(data_root, form, options.omniglot_split)
    if options.dataset.startswith("images:"):
        return open_folder(Path(options.dataset.partition(":")[2]), form, _shares(options))
    return open_benchmark(options.dataset, data_root, form)


def _shares(options: TaskOptions) -> dict[str, int]:
    return dict(zip(SPLITS, map(int, options.split_shares.split(",")), strict=True))


# ---- curves --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Regression(TaskDistribution):
    """Curves from a parametric family: inputs `[tasks, points, 1]`, targets of the same shape.

    Args:
        shots, queries: points of the support and of the query set of a task.
        noise: standard deviation of Gaussian noise on the targets of both.
        oracle: the parameters of the task join the inputs: `[tasks, points, 1 + parameters]`.
    """

    shots: int
    queries: int
    noise: float = 0.0
    oracle: bool = False
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    kind = "curves"
    computed = True

    @abstractmethod
    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        """Draw the parameters that make a task: tensors `[tasks, 1]`."""

    @abstractmethod
    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """Return the targets at `x`, without noise: `[tasks, points]`."""

    def inputs(self, stream: Stream, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        """Draw inputs `[tasks, points]`, by default uniform in [-5, 5)."""
        return stream.uniform(points, -5.0, 5.0, self.dtype)

    def grid(self, points: int, parameters: tuple[Tensor, ...]) -> Tensor:
        """Return dense, sorted inputs for a picture: `[tasks, points]`, or `[1, points]`."""
        return torch.linspace(-5.0, 5.0, points, device=self.device, dtype=self.dtype)[None]

    @property
    def examples(self) -> int:
        return self.shots + self.queries

    def resized(self, shots: int) -> Regression:
        return replace(self, shots=shots)

    def sample(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        parameters = self.parameters(stream.at("parameters"))
        support = self._examples(stream.at("support"), self.shots, parameters)
        query = self._examples(stream.at("query"), self.queries, parameters)
        return TaskBatch(*support, *query)

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        numbers = range(tasks)
        parameters = self.parameters(task_stream(split, seed, 0, numbers, self.device).at("parameters"))
        x = self.grid(GRID_POINTS, parameters).expand(tasks, GRID_POINTS)
        query_x, query_y = self._with_parameters(x, parameters), self.curve(x, parameters)[..., None]
        return self.sample(split, seed, 0, numbers)._replace(query_x=query_x, query_y=query_y)

    def _examples(self, stream: Stream, points: int, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x = self.inputs(stream, points, parameters)
        y = self.curve(x, parameters)
        if self.noise:
            y = y + self.noise * stream.at("noise").normal(points, self.dtype)
        return self._with_parameters(x, parameters), y[..., None]

    def _with_parameters(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """Return inputs `[tasks, points, features]` of `x` `[tasks, points]`."""
        if not self.oracle:
            return x[..., None]
        features = torch.cat([parameter.to(x.dtype) for parameter in parameters], 1)
        return torch.cat([x[..., None], features[:, None].expand(-1, x.shape[1], -1)], -1)


def draw_wave(stream: Stream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw amplitudes in [0.1, 5) and phases in [0, pi), both uniform: `[tasks, 1]` each."""
    amplitude, phase = stream.uniform(2, 0.0, 1.0, dtype).split(1, 1)
    return 0.1 + 4.9 * amplitude, math.pi * phase


class Sinusoid(Regression):
    """y = a sin(x + phase): a in [0.1, 5), phase in [0, pi), x in [-5, 5), all uniform.

    Finn et al. (2017); they write x - phase, a mirrored family.
    """

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        return draw_wave(stream, self.dtype)

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        amplitude, phase = parameters
        return amplitude * torch.sin(x + phase)


class SinusoidFrequency(Regression):
    """y = a sin(w x + phase): a and phase as in `Sinusoid`, w in [0.8, 1.2). Meta-SGD, Li et al. (2017)."""

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        return *draw_wave(stream, self.dtype), stream.at("frequency").uniform(1, 0.8, 1.2, self.dtype)

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        amplitude, phase, frequency = parameters
        return amplitude * torch.sin(frequency * x + phase)


class SinusoidLine(Regression):
    """With even odds a `Sinusoid`, or a line with slope and intercept uniform in [-3, 3)."""

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        is_line = stream.at("kind").words(1) >> 31 == 1
        line = stream.at("line").uniform(2, -3.0, 3.0, self.dtype).split(1, 1)
        return *draw_wave(stream, self.dtype), *line, is_line

    def curve(self, x: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        amplitude, phase, slope, intercept, is_line = parameters
        return torch.where(is_line, slope * x + intercept, amplitude * torch.sin(x + phase))


class Harmonic(Regression):
    """y = a1 sin(w x + b1) + a2 sin(2 w x + b2), from Lacoste et al. (2018).

    w uniform in [5, 7), b1 and b2 in [0, 2 pi), a1 and a2 standard normal; x normal with std 1 around
    a mean of the task, uniform in [-4, 4).
    """

    def parameters(self, stream: Stream) -> tuple[Tensor, ...]:
        frequency, phase_1, phase_2, mean = stream.uniform(4, 0.0, 1.0, self.dtype).split(1, 1)
        amplitudes = stream.at("amplitudes").normal(2, self.dtype).split(1, 1)
        phases = math.tau * phase_1, math.tau * phase_2
        return 5.0 + 2.0 * frequency, *amplitudes, *phases, 8.0 * mean - 4.0

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


FAMILIES: dict[str, type[Regression]] = {
    "sinusoid": Sinusoid,
    "sinusoid-frequency": SinusoidFrequency,
    "sinusoid-line": SinusoidLine,
    "harmonic": Harmonic,
}


# ---- the user's own ------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Custom(TaskDistribution):
    """Tasks of a user's object, which has one method, `sample(split, seeds)`.

    The method returns the four tensors of a `TaskBatch` for "train", "validation" or "test" and seeds, int64
    `[tasks]`: each task is a function of the split and of its seed. Nested tuples or dictionaries of tensors
    stand for several inputs or outputs. Labels are int64; targets of a regression are `[tasks, examples,
    numbers]`.

    Args:
        make: makes the object for a number of shots.
        name: of the object's factory, for messages.
        ways: classes of a task; None in regression.

    Raises UsageError where the object has no such method, or returns anything else.
    """

    make: Callable[[int], Any]
    name: str
    ways: int | None
    shots: int
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    on_host = True

    def __post_init__(self) -> None:
        self.source = self.make(self.shots)
        if not callable(getattr(self.source, "sample", None)):
            kind = type(self.source).__name__
            raise UsageError(f"--dataset {self.name} makes a {kind} without a method sample")
        self.prefetch = Prefetch(self._fetch)

    @cached_property
    def examples(self) -> int:
        batch = self._fetch("train", 0, 0, range(1))
        return sum(first_tensor(tree).shape[1] for tree in (batch.support_x, batch.query_x))

    def resized(self, shots: int) -> Custom:
        return self if shots == self.shots else replace(self, shots=shots)

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        batch = self.prefetch(split, seed, int(iteration), tasks)
        return TaskBatch(*(tree_map(self._place, tree) for tree in batch))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _fetch(self, split: str, seed: int, iteration: int, tasks: range) -> TaskBatch:
        """Call the user's method and check what it returns."""
        stream = task_stream(split, seed, iteration, tasks, torch.device("cpu"))
        high, low = stream.at("own").words(2).unbind(1)
        seeds = (high >> 1 << 32) | low  # 63 bits
        parts = call_factory(self.source.sample, f"{self.name}: sample", "--dataset", split, seeds)
        problem = self._find_problem(parts, len(tasks))
        if problem:
            raise UsageError(f"--dataset {self.name}: sample({split!r}, {len(tasks)} seeds) {problem}")
        return TaskBatch(*parts)

    def _find_problem(self, parts: Any, tasks: int) -> str | None:
        """Return what is wrong with a batch of the user's, or None."""
        if not isinstance(parts, tuple | list) or len(parts) != 4:
            return "should give four tensors: support x and y, query x and y"
        for name, tree in zip(TaskBatch._fields, parts, strict=True):
            tensors = pytree.tree_leaves(tree)
            if not tensors or not all(isinstance(t, Tensor) for t in tensors):
                return f"gives no tensor as {name}"
            if any(t.dim() < 2 or len(t) != tasks or not t.shape[1] for t in tensors):
                return f"gives {name} {tuple(tensors[0].shape)}: it should be [{tasks} tasks, examples, ...]"
        for x_and_y in (parts[:2], parts[2:]):
            sizes = [t.shape[1] for t in pytree.tree_leaves(x_and_y)]
            if len(set(sizes)) > 1:
                return f"gives x and y of different numbers of examples: {sizes}"
        support_y, query_y = first_tensor(parts[1]), first_tensor(parts[3])
        if not self.classification and min(support_y.dim(), query_y.dim()) < 3:
            return "gives targets without an axis of their own: they should be [tasks, examples, numbers]"
        for labels in (support_y, query_y) if self.classification else ():
            if labels.is_floating_point():
                return "gives labels that are not int64"
            if labels.min() < 0 or labels.max() >= (self.ways or 0):
                return f"gives labels from {labels.min()} to {labels.max()}: they go from 0 to -n - 1"
        return None

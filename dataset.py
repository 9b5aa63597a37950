"""Task distributions by name: what `--dataset` can be, and how a meta-batch is sampled from it.

Curves are computed here; images and tables are read by tasks/; the user's own tasks come from the user's
code. Each call makes a whole `TaskBatch` on the device, without workers. Task t of iteration i is a pure
function of (split, seed, i, t). A new distribution needs the members of common/batch.py's `TaskDistribution`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.batch import DataRecord, TaskBatch, TaskDistribution, first_tensor, index_tree, tree_map
from common.errors import UsageError
from common.names import parse_name
from common.own_code import call_factory, load_code, parse_arguments, select_accepted
from common.random import SPLITS, Stream, task_stream
from common.sizes import Size, Span
from tasks.drawn_sizes import draw_number
from tasks.file_tasks import Prefetch
from tasks.images import ImageSet, ImageTasks, check_apart, open_images
from tasks.mixture import Mixture
from tasks.options import TaskOptions
from tasks.pixels import Form
from tasks.published import open_benchmark
from tasks.tables import Columns, Table, TableTasks, load_table

GRID_POINTS = 200  # points of a plotted curve
CHECKED = 4  # tasks of the user's sampler that are drawn twice at the start


def build_distribution(
    options: TaskOptions,
    *,
    data_root: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    for_test: bool = False,
    scale_targets: bool = True,
    ignored: int | None = None,
) -> TaskDistribution:
    """Return the distribution `options.dataset`; UsageError if its data is bad, or too little for a task.

    Args:
        data_root: the folder of named image sets; a missing one is fetched into it.
        for_test: use all of the data for test if it has no split of its own.
        scale_targets: the loss allows a table's targets to be standardised, and requires all of them.
        ignored: a label of the user's own tasks that is no class, and that the loss leaves out.
    """
    kind, source, _ = parse_name(options.dataset)
    if kind == "mixture":
        how: dict[str, Any] = dict(data_root=data_root, device=device, dtype=dtype, for_test=for_test)
        parts = {name: build_distribution(options.of(name), **how) for name in options.datasets}
        check_apart({name: part.images for name, part in parts.items() if isinstance(part, ImageTasks)})
        return Mixture(parts, options.weights, device)
    if kind == "code":
        tasks = Custom(options=options, shots=options.shots, ignored=ignored, device=device, dtype=dtype)
        tasks.check(("test",) if for_test else SPLITS, may_lack_targets=not scale_targets)
        return tasks
    sizes: dict[str, Any] = dict(shots=options.shots, queries=options.queries, device=device, dtype=dtype)
    if source in FAMILIES:
        return FAMILIES[source](noise=options.noise, oracle=options.oracle, **sizes)
    numbers = "0,0,1" if for_test else options.split_shares
    shares = dict(zip(SPLITS, map(int, numbers.split(",")), strict=True))
    if kind != "table":
        return ImageTasks(
            _open_images(options, data_root, shares),
            ways=options.ways or 0,
            quarter_turns=options.quarter_turns or source == "omniglot",
            augment=tuple(options.augment.split(",")) if options.augment else (),
            **sizes,
        )
    table = _open_table(options, torch.float64 if options.standardise else dtype, shares)
    scales = table.measure_scales(targets=scale_targets) if options.standardise else {}
    return TableTasks(table=table, ways=options.ways, scales=scales, **sizes)


def _open_table(options: TaskOptions, dtype: torch.dtype, shares: dict[str, int]) -> Table:
    """Return the table of a path, split by these shares; its numbers fit `dtype`."""
    return load_table(
        Path(parse_name(options.dataset).source),
        Columns.parse(options.columns, options.exclude_columns),
        dtype,
        classification=options.classification,
        shares=shares,
        min_examples=options.min_examples,
        min_classes=Span.of(options.ways or 1).least,
    )


def _open_images(options: TaskOptions, data_root: Path, shares: dict[str, int]) -> ImageSet:
    """Return the images of a named set, or those of a path, split by these shares."""
    form = Form.of(options)
    kind, source, _ = parse_name(options.dataset)
    if kind == "images":
        return open_images(Path(source), form, shares, options.columns, options.min_examples)
    return open_benchmark(source, data_root, form, options.omniglot_split, options.icons_split)


@dataclass(eq=False)
class Regression(TaskDistribution):
    """Curves from a parametric family: inputs and targets `[tasks, points, 1]`.

    The targets have Gaussian noise of standard deviation `noise`. With `oracle`, the parameters of the task
    join the inputs, `[tasks, points, 1 + parameters]`.
    """

    shots: Size
    queries: Size
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

    def resized(self, shots: Size) -> Regression:
        return replace(self, shots=shots)

    def sample(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        parameters = self.parameters(stream.at("parameters"))
        parts: dict[str, Tensor] = {}
        for name, size in (("support", self.shots), ("query", self.queries)):
            points, span = stream.at(name), Span.of(size)
            x, y = self._evaluate(self.inputs(points, span.most, parameters), parameters)
            if self.noise:
                y = y + self.noise * points.at("noise").normal(span.most, self.dtype)[..., None]
            parts |= {f"{name}_x": x, f"{name}_y": y}
            if span.varies:
                number = draw_number(points.at("number"), span)[:, None]
                parts[f"{name}_mask"] = torch.arange(span.most, device=self.device) < number
        return TaskBatch(**parts)

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        parameters = self.parameters(task_stream(split, seed, 0, range(tasks), self.device).at("parameters"))
        x, y = self._evaluate(self.grid(GRID_POINTS, parameters).expand(tasks, GRID_POINTS), parameters)
        batch = self.sample(split, seed, 0, range(tasks))
        return replace(batch, query_x=x, query_y=y, query_mask=None)

    def _evaluate(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return inputs `[tasks, points, features]` and targets `[tasks, points, 1]` at x."""
        y = self.curve(x, parameters)[..., None]
        if not self.oracle:
            return x[..., None], y
        return torch.stack([x, *(parameter.to(x.dtype).expand_as(x) for parameter in parameters)], -1), y


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
    """A `Sinusoid` or a line, equally likely; slope and intercept are uniform in [-3, 3)."""

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


@dataclass(eq=False, kw_only=True)
class Custom(TaskDistribution):
    """Tasks of a user's object with one method, `sample(split, seeds)`; UsageError if the method is missing.

    The method returns the four parts of a `TaskBatch`, and the masks of support and query if tasks differ in
    size, for "train", "validation" or "test" and seeds, int64 `[tasks]`: each task is a function of the split
    and of its seed. Parts are tensors, arrays or lists of numbers, or nested tuples or dictionaries of them.
    Labels are whole numbers; targets of a regression are `[tasks, examples, numbers]`.
    """

    options: TaskOptions
    shots: Size
    ignored: int | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    on_host = True
    constant: tuple[str, ...] = ()  # splits with one task, whatever the seed
    sampled: tuple[str, ...] = ()  # rough numbers of a task, which must be the same in every process

    def __post_init__(self) -> None:
        options, name, self.ways = self.options, self.options.dataset, self.options.ways
        flags = {"ways": options.ways, "shots": self.shots, "queries": options.queries}
        sizes = {flag: (*Span.of(size),) if isinstance(size, str) else size for flag, size in flags.items()}
        factory = load_code(name, "--dataset")
        arguments = select_accepted(factory, sizes) | parse_arguments(options.dataset_args)
        self.source = call_factory(factory, name, "--dataset", **arguments)
        if not callable(getattr(self.source, "sample", None)):
            raise UsageError(f"--dataset {name} makes a {type(self.source).__name__} without a method sample")
        self.prefetch = Prefetch(self._fetch)

    def resized(self, shots: Size) -> Custom:
        return self if shots == self.shots else replace(self, shots=shots)

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        batch = self.prefetch(split, seed, int(iteration), tasks)
        return tree_map(lambda t: t.to(self.device, self.dtype if t.is_floating_point() else None), batch)

    @property
    def record(self) -> DataRecord:
        sizes = f"{self.ways}-way {self.options.shots}-shot {self.options.queries}-query"
        return DataRecord(fingerprint={sizes: list(self.sampled)} if self.sampled else {})

    @property
    def summary(self) -> list[str]:
        splits = ", ".join(self.constant)
        return [f"sample gives the same task for every seed: {splits}"] if splits else []

    def check(self, splits: Sequence[str], *, may_lack_targets: bool) -> None:
        """Raise UsageError for tasks that differ when drawn again, lack numbers, or vary in form by split."""
        forms = {}
        for split in splits:
            task = self._draw_twice(split)
            for part, tree in task.parts.items():
                gaps = not all(t.isfinite().all() for t in pytree.tree_leaves(tree))
                if gaps and not (may_lack_targets and part in ("support_y", "query_y")):
                    self._fail(split, f"gives NaN or infinity in {part}: fill or leave out such examples")
            forms[split] = [tuple(tensor.shape[2:]) for tensor in pytree.tree_leaves(task)]
            if forms[split] != forms[splits[0]]:
                shapes = f"examples of shapes {forms[split]} and for {splits[0]!r} {forms[splits[0]]}"
                self._fail(split, f"gives {shapes}: make them alike")

    def _fail(self, split: str, problem: str) -> NoReturn:
        raise UsageError(f"--dataset {self.options.dataset}: sample({split!r}, seeds) {problem}")

    def _draw_twice(self, split: str) -> TaskBatch:
        """Return tasks; UsageError where one differs, called again or without the other seeds."""
        seeds = self._draw_seeds(split, 0, 0, range(CHECKED))
        first, again, alone = (self._call(split, part) for part in (seeds, seeds, seeds[-1:]))
        tasks = [index_tree(first, slice(i, i + 1)) for i in range(CHECKED)]
        how = ""
        if not _are_equal(first, again):
            how = "when called again, and resuming, comparing"
        elif not _are_equal(tasks[-1], alone):
            how = "for a seed when it is alone, and chunks of tasks (--tasks-at-once)"
        if how:
            way = "draw each task from its own seed, as with torch.Generator().manual_seed(int(seed))"
            way += ", and pad to the same length every time" * (first.support_mask is not None)
            self._fail(split, f"gives other numbers {how} and several processes need the same: {way}")
        leaves = pytree.tree_leaves(tasks[0])
        self.sampled = tuple(f"{value.double().abs().mean().item():.3g}" for value in leaves)
        if all(_are_equal(tasks[0], task) for task in tasks):
            self.constant += (split,)
        return first

    def _draw_seeds(self, split: str, seed: int, iteration: int, tasks: range) -> Tensor:
        stream = task_stream(split, seed, iteration, tasks, torch.device("cpu"))
        high, low = stream.at("own").words(2).unbind(1)
        return (high >> 1 << 32) | low  # 63 bits

    def _fetch(self, split: str, seed: int, iteration: int, tasks: range) -> TaskBatch:
        return self._call(split, self._draw_seeds(split, seed, iteration, tasks))

    def _call(self, split: str, seeds: Tensor) -> TaskBatch:
        """Call the user's method; return what it gives, checked, as tensors that are not the user's."""
        name = self.options.dataset
        parts = call_factory(self.source.sample, f"{name}: sample", "--dataset", split, seeds.clone())
        with suppress(TypeError, ValueError, RuntimeError):  # of other things than numbers: said below
            parts = [*pytree.tree_map(_as_tensor, (*parts,), is_leaf=lambda part: isinstance(part, list))]
            if self.ways:  # labels of any whole type
                parts[1:4:2] = (tree_map(_as_labels, part) for part in parts[1:4:2])
        if problem := self._find_problem(parts, len(seeds)):
            raise UsageError(f"--dataset {name}: sample({split!r}, {len(seeds)} seeds) {problem}")
        batch = TaskBatch(*parts)
        for part in ("support", "query") if len(parts) == 6 else ():
            batch = _sort_padding(batch, part)
        return batch if isinstance(self.ways, int | None) else replace(batch, ways=self._count_classes(batch))

    def _count_classes(self, batch: TaskBatch) -> Tensor:
        """Return the number of classes of each task, which its labels tell."""
        labels = torch.cat([first_tensor(y).flatten(1) for y in (batch.support_y, batch.query_y)], 1)
        return labels.masked_fill((labels < 0) | (labels == self.ignored), 0).amax(1) + 1

    def _find_problem(self, parts: Any, tasks: int) -> str | None:
        """Return what is wrong with a batch of the user's, or None."""
        if not isinstance(parts, tuple | list) or len(parts) not in (4, 6):
            return "should give four tensors, support x and y, query x and y, and two masks if sizes differ"
        for x, y, *masks in ((*parts[:2], *parts[4:5]), (*parts[2:4], *parts[5:])):
            tensors, main = pytree.tree_leaves((x, y)), first_tensor(y)
            if not all(isinstance(t, Tensor) and t.dim() > 1 for t in tensors):
                return "should give tensors [tasks, examples, ...]"
            sizes = [tuple(t.shape[:2]) for t in tensors]
            if {*sizes} != {(tasks, sizes[0][1])}:
                return f"gives x and y of different numbers of tasks or examples: {sizes}"
            if not sizes[0][1]:
                return "gives no examples"
            if main.is_complex():
                return "gives complex targets: give real and imaginary parts, torch.view_as_real"
            if not self.ways and main.dim() < 3:
                return "gives targets without an axis of their own: they should be [tasks, examples, numbers]"
            for mask in masks:
                if not isinstance(mask, Tensor) or mask.shape != main.shape[:2] or mask.dtype != torch.bool:
                    return f"should give masks that are bool and {sizes[0]}, [tasks, examples]"
                if not mask.any(1).all():
                    return "gives a task whose mask leaves no example"
            valid = (main >= 0) & (main < (self.most_ways or 0)) | (main == self.ignored)
            valid |= ~masks[0].view(*sizes[0], *(1,) * (main.dim() - 2)) if masks else False
            if self.ways and (main.is_floating_point() or not valid.all()):
                others = "" if self.ignored is None else f", or {self.ignored} (the loss's ignore_index)"
                most = (self.most_ways or 0) - 1
                return f"gives labels that are not int64 from 0 to {most}{others}"
        return None


def _sort_padding(batch: TaskBatch, part: str) -> TaskBatch:
    """Return the batch with the examples of "support" or "query" that count first; padding repeats one."""
    mask = getattr(batch, f"{part}_mask")
    place, tasks = (~mask).long().argsort(dim=1, stable=True), torch.arange(len(mask))[:, None]
    mask = mask.gather(1, place)
    place = place.where(mask, place[:, :1])
    x, y = (index_tree(getattr(batch, f"{part}_{name}"), (tasks, place)) for name in "xy")
    return replace(batch, **{f"{part}_x": x, f"{part}_y": y, f"{part}_mask": mask})


def _as_tensor(part: Any) -> Any:
    """Return a tensor of the tool's own, which the user's code cannot change, of an array or a list."""
    if isinstance(part, list):
        part = torch.stack(part) if isinstance(next(iter(part), None), Tensor) else np.asarray(part)
    return torch.as_tensor(part).detach().clone() if isinstance(part, Tensor | np.ndarray) else part


def _as_labels(labels: Tensor) -> Tensor:
    return labels if labels.is_floating_point() else labels.long()


def _are_equal(one: TaskBatch, other: TaskBatch) -> bool:
    """Return whether two batches have the same shapes and, to rounding, the same numbers."""
    pairs = list(zip(*map(pytree.tree_leaves, (one, other)), strict=True))
    same = all(a.shape == b.shape for a, b in pairs)
    return same and all(torch.allclose(a.double(), b.double(), equal_nan=True) for a, b in pairs)

"""Make labelled, split image sets, and draw N-way K-shot tasks: path -> `ImageSet` -> `ImageTasks`.

Splits are those of the folder; class folders alone are split at random. The pixels lie on the device as one
uint8 tensor. Where it would fill more than half of a GPU's free memory, or of the memory that a process may
use, it stays memory-mapped on the host, and the next batch is fetched while this one is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.batch import DataRecord, TaskBatch, TaskDistribution
from common.device import machine_memory
from common.errors import UsageError
from common.random import HELD_OUT, Stream, task_stream
from common.sizes import Size, Span
from tasks.archives import find_archived_classes, has_archives
from tasks.cache import cache_pixels
from tasks.drawn_sizes import DrawnSizes
from tasks.file_tasks import Prefetch, say_too_few
from tasks.folders import find_classes, find_real_paths
from tasks.parquet_images import find_stored_classes, parquet_files
from tasks.pixels import Form, ImagePath, StoredImage, decode_all, find_rows, find_sources, settle_range
from tasks.splits import as_positions, divide_classes, find_seen

ZOOM = 0.8  # part of the side that "crop" shows at least
SHIFT = 1 / 8  # of the side
ANGLE = 15.0  # degrees

Groups = Mapping[str, Mapping[str, Sequence[ImagePath]]]  # the classes of each split, or of "all"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: classes and splits at once, pixels when `load` is called."""

    names: list[str]  # [classes]
    count: Tensor  # int64 [classes], images of each
    splits: dict[str, Tensor]  # "train", "validation", "test" -> int64 positions of classes, disjoint
    load: Callable[[], Tensor]  # gives uint8 [images, channels, height, width], class by class
    source: str  # for messages
    published: bool = False  # the split is the same for everyone, always
    split_source: str = ""  # in words
    notes: list[str] = field(default_factory=list)  # on what was left out or changed
    range_record: list[str] = field(default_factory=list)  # see `Form.record`
    files: Sequence[Sequence[ImagePath]] = ()  # [classes], the images of each

    def find_real_paths(self, *splits: str) -> set[str]:
        """Return where the images of splits lie, of those that are files."""
        files = chain(*(self.files[place] for split in splits for place in self.splits[split].tolist()))
        return {*find_real_paths(file for file in files if isinstance(file, Path))}

    @property
    def summary(self) -> list[str]:
        """Say how many classes and images each split has, why, and what was left out or changed."""
        parts = []
        for split, part in self.splits.items():
            images = f" ({int(self.count[part].sum()):,} images)" if len(part) else ""
            parts.append(f"{len(part):,}{images} for {'training' if split == 'train' else split}")
        source = self.split_source or "as published"
        return [f"classes: {', '.join(parts)}; split: {source}", *self.notes]


def open_images(
    path: Path, form: Form, shares: Mapping[str, int], columns: Sequence[str] = (), min_examples: int = 0
) -> ImageSet:
    """Return the images of a folder, of the archives in it or of Parquet files, and their splits.

    Args:
        shares: of each split where the folder has none.
        columns: the roles of the columns of Parquet files.
        min_examples: classes with fewer images are left out.
    """
    groups: Groups
    if not columns and has_archives(path):
        groups, source, notes = find_archived_classes(path)
    elif files := parquet_files(path):
        groups, source, notes = find_stored_classes(path, files, columns)
    elif columns:
        raise UsageError(f"--columns: {path} is no Parquet file and holds none: leave it out")
    else:
        groups, source, notes = find_classes(path, allow_empty=min_examples > 0)
    splits, source, more = divide_classes(groups, shares, str(path), source, min_examples)
    return image_set(path, groups, splits, form, split_source=source, notes=[*notes, *more])


def image_set(
    path: Path,
    groups: Groups,
    splits: Mapping[str, Iterable[str]],
    form: Form,
    *,
    published: bool = False,
    split_source: str = "",
    notes: Sequence[str] = (),
) -> ImageSet:
    """Return the images of groups of classes, through the cache in the folder of `path`."""
    folder = path if path.is_dir() else path.parent
    names = sorted(chain(*splits.values()))
    images = [[*chain(*(group.get(name, ()) for group in groups.values()))] for name in names]
    count, files = [*map(len, images)], [*chain(*images)]
    form, note = settle_range(folder, files, form)

    def load() -> Tensor:
        settings = (form, names, count, *find_rows(files))
        shape, decode = (len(files), form.channels, form.size, form.size), partial(decode_all, files, form)
        pixels = cache_pixels(folder, find_sources(files), settings, shape, decode)
        for column in {file.column for file in files if isinstance(file, StoredImage)}:
            column.forget()
        return pixels

    return ImageSet(
        names,
        torch.tensor(count),
        as_positions(splits, names),
        load,
        str(path),
        published=published,
        split_source=split_source,
        notes=[*notes, *note],
        range_record=form.record,
        files=images,
    )


def check_apart(parts: Mapping[str, ImageSet]) -> None:
    """Raise UsageError where a data set trains on what another one is validated or tested on."""
    for (name, one), (other, two) in permutations(parts.items(), 2):
        seen: Collection[str] = find_seen(name, other, *HELD_OUT)
        if seen := seen or one.find_real_paths("train") & two.find_real_paths(*HELD_OUT):
            raise UsageError(
                f"{name} trains on what validates or tests {other} ({min(seen)}, and {len(seen) - 1} more): "
                "leave one of them out"
            )


# ---- tasks ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class ImageTasks(TaskDistribution):
    """Tasks of `ways` different classes, with `shots` and `queries` different images of each.

    Inputs are `[tasks, examples, channels, side, side]` in [0, 1]; labels, int64, number the classes in
    random order. With `quarter_turns`, each class of a task is turned by 0, 90, 180 or 270 degrees, in every
    split. Raises UsageError where a split has too few classes, or a class too few images.
    """

    images: ImageSet
    _: KW_ONLY
    ways: Size
    shots: Size
    queries: Size
    quarter_turns: bool = False
    augment: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    kind = "images"

    def __post_init__(self) -> None:
        self.sizes = DrawnSizes.of(self.ways, self.shots, self.queries)
        self._check_sizes()
        pixels = self.images.load()
        cuda = self.device.type == "cuda"
        memory = torch.cuda.mem_get_info(self.device)[0] if cuda else machine_memory()
        self.on_host = memory is not None and pixels.nbytes > memory // 2
        place = torch.device("cpu") if self.on_host else self.device
        count = self.images.count
        first = count.cumsum(0) - count  # [classes], position of a class's first image
        tensors = {"pixels": pixels, "count": count, "first": first, **self.images.splits}
        self.tensors = {name: tensor.to(place) for name, tensor in tensors.items()}
        self.largest = int(count.max())
        self.computed = not (self.on_host or self.augment)
        self.prefetch = Prefetch(self._fetch)

    @property
    def record(self) -> DataRecord:
        names, splits = self.images.names, {} if self.images.published else self.images.splits
        names_of = {split: sorted(names[i] for i in part.tolist()) for split, part in splits.items()}
        return DataRecord(splits=names_of, image_range=self.images.range_record)

    @property
    def summary(self) -> list[str]:
        return self.images.summary

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ImageTasks:
        other = copy.copy(self)
        other.tensors = {name: tensors[name] for name in self.tensors}
        return other

    def resized(self, shots: Size) -> ImageTasks:
        other = copy.copy(self)  # with the same pixels
        other.shots, other.sizes = shots, replace(self.sizes, shots=Span.of(shots))
        other._check_sizes()
        other.prefetch = Prefetch(other._fetch)
        return other

    def sample(self, split: str, seed: Any, iteration: int | Tensor, tasks: Any) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        if not len(self.tensors[split]):
            raise UsageError(f"{self.images.source} has no {split} classes: add them, or use another split")
        if self.on_host:
            fetched = self.prefetch(split, seed, int(iteration), tasks)
            pixels, totals = (part.to(self.device, non_blocking=True) for part in fetched)
        else:
            pixels, totals = self._draw(stream, split)
        if self.quarter_turns:
            quarters = (stream.at("rotations").words(pixels.shape[1]) >> 30)[..., None, None, None, None]
            pixels = torch.where(quarters >= 2, pixels.flip(-2, -1), pixels)
            pixels = torch.where(quarters % 2 == 1, pixels.rot90(1, (-2, -1)), pixels).contiguous()
        support, query, ways = self.sizes.divide(stream, pixels, totals)
        parts: dict[str, Tensor | None] = {}
        for name, part in (("support", support), ("query", query)):
            x = part.drawn.to(self.dtype).div_(255)  # in place: `to` has made a copy
            if split == "train" and self.augment:
                x = augment_images(x, self.augment, stream.at("augmentation").at(name))
            parts |= {f"{name}_x": x, f"{name}_y": part.labels, f"{name}_mask": part.mask}
        return TaskBatch(**parts, ways=ways)

    def _draw(self, stream: Stream, split: str) -> tuple[Tensor, Tensor]:
        """Return pixels `[tasks, ways, drawn, channels, height, width]`, and images of the classes."""
        count, first, classes = (self.tensors[name] for name in ("count", "first", split))
        ways = self.sizes.ways.most
        classes = classes[stream.at("classes").distinct(ways, len(classes))]  # [tasks, ways]
        words = stream.at("drawings").words(ways * self.largest).unflatten(1, (ways, self.largest))
        drawn = self.sizes.draw_examples(words, count[classes])
        rows = first[classes][..., None] + drawn
        pixels = self.tensors["pixels"].index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return pixels, count[classes]

    def _fetch(self, split: str, seed: int, iteration: int, tasks: range) -> tuple[Tensor, ...]:
        drawn = self._draw(task_stream(split, seed, iteration, tasks, self.tensors["pixels"].device), split)
        return tuple(part.pin_memory() for part in drawn) if self.device.type == "cuda" else drawn

    def _check_sizes(self) -> None:
        images, needed, source = self.images, self.sizes.needed, self.images.split_source
        for split, classes in images.splits.items():
            if 0 < len(classes) < self.sizes.ways.most:
                few = f"{len(classes)} {split} classes, and -n is {self.ways}: lower it, or add classes"
                raise UsageError(f"{images.source} has {few}" + f" (split: {source})" * bool(source))
        used = torch.cat([*images.splits.values()])
        counts = images.count[used]
        if len(used) and counts.min() < needed:
            few = say_too_few(counts, needed, "images", "-k plus -q")
            some = counts.max() >= needed and not images.published
            hint = f", or leave those out with --min-examples {needed}" * some
            name = images.names[used[counts.argmin()]]
            raise UsageError(f"{images.source}: class {name!r} has {few}: lower them{hint}")


def augment_images(x: Tensor, kinds: tuple[str, ...], stream: Stream) -> Tensor:
    """Change each of the images `[tasks, images, channels, side, side]` at random, by its task's stream.

    "flip" mirrors half of them, "crop" zooms in and shifts, "rotate" turns; edges are reflected.
    """
    tasks, images = x.shape[:2]
    if "flip" in kinds:
        mirrored = stream.at("flip").words(images) >> 31 == 1
        x = torch.where(mirrored[..., None, None, None], x.flip(-1), x)
    if not {"crop", "rotate"} & set(kinds):
        return x
    precise = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot tell two pixels apart
    zoom = torch.ones(tasks, images, device=x.device, dtype=precise)
    right = down = angle = torch.zeros_like(zoom)
    if "crop" in kinds:
        zoom = stream.at("zoom").uniform(images, ZOOM, 1.0, precise)
        # The sides are 2 long in the coordinates of the grid.
        right, down = stream.at("shift").uniform(2 * images, -2 * SHIFT, 2 * SHIFT, precise).chunk(2, 1)
    if "rotate" in kinds:
        angle = torch.deg2rad(stream.at("angle").uniform(images, -ANGLE, ANGLE, precise))
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    maps = torch.stack([cosine, -sine, right, sine, cosine, down], -1).view(tasks * images, 2, 3)
    flat = x.flatten(0, 1)
    grid = F.affine_grid(maps, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat.to(precise), grid, padding_mode="reflection", align_corners=False)
    return moved.to(x.dtype).view(x.shape)

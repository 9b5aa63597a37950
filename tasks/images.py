"""Make labelled, split image sets: path -> folders.py, pixels.py -> `ImageSet` -> image_tasks.py.

Splits are those of the folder; class folders alone are split at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UsageError
from tasks.archives import find_archived_classes, has_archives
from tasks.cache import cache_pixels
from tasks.folders import find_classes
from tasks.parquet_images import find_stored_classes, parquet_files
from tasks.pixels import Form, ImagePath, decode_all, find_rows, find_sources, settle_range
from tasks.splits import as_positions, divide_classes

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
        return cache_pixels(folder, find_sources(files), settings, shape, decode)

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
    )

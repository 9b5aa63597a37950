"""Make labelled, split image sets of folders: path -> folders.py, pixels.py -> `ImageSet` -> image_tasks.py.

Splits are those of the folder; class folders alone are split at random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UsageError, printable
from tasks.cache import cached_pixels
from tasks.folders import find_classes
from tasks.parquet_images import find_stored_classes, parquet_files
from tasks.pixels import Form, ImagePath, decode_all, rows_of, settle_range, sources_of
from tasks.splits import as_positions, divide_classes

Groups = Mapping[str, Mapping[str, Sequence[ImagePath]]]  # the classes of each split, or of "all"
IN_WORDS = {"train": "training", "validation": "validation", "test": "test"}


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
            parts.append(f"{len(part):,}{images} for {IN_WORDS[split]}")
        source = self.split_source or "as published"
        return [f"classes: {', '.join(parts)}; split: {source}", *self.notes]


def open_images(
    path: Path, form: Form, shares: Mapping[str, int], columns: Sequence[str] = (), min_examples: int = 0
) -> ImageSet:
    """Return the images of Parquet files, whose columns have these roles, or of a folder."""
    if files := parquet_files(path):
        return open_parquet(path, files, form, shares, columns, min_examples)
    if columns:
        raise UsageError(f"--columns: {path} is no Parquet file and holds none: leave it out")
    return open_folder(path, form, shares, min_examples)


def open_folder(folder: Path, form: Form, shares: Mapping[str, int], min_examples: int = 0) -> ImageSet:
    """Return the images of a folder and their splits, of these shares where the folder has none.

    If it has training and test alone, validation classes come out of the training classes. Classes with
    fewer images than `min_examples` are left out.
    """
    layout = find_classes(folder, allow_empty=min_examples > 0)
    return _split_classes(
        folder,
        layout.groups,
        layout.source,
        [*_say_left_out(layout.left_out), *_say_repeated(layout.groups)],
        form,
        shares,
        min_examples,
    )


def open_parquet(
    path: Path,
    files: Sequence[Path],
    form: Form,
    shares: Mapping[str, int],
    columns: Sequence[str] = (),
    min_examples: int = 0,
) -> ImageSet:
    """Return the images of Parquet files, with those columns, as `open_folder` does those of a folder."""
    groups, source, notes = find_stored_classes(path, files, columns)
    folder = path if path.is_dir() else path.parent
    images = _split_classes(folder, groups, source, notes, form, shares, min_examples)
    stored = {image.column for part in groups.values() for row in part.values() for image in row}

    def load() -> Tensor:
        pixels = images.load()
        for column in stored:
            column.forget()
        return pixels

    return replace(images, load=load, source=str(path))


def _split_classes(
    folder: Path,
    groups: Groups,
    source: str,
    notes: list[str],
    form: Form,
    shares: Mapping[str, int],
    min_examples: int,
) -> ImageSet:
    """Return images in the split that they have, or a random one."""
    sizes = {s: {name: len(files) for name, files in part.items()} for s, part in groups.items()}
    splits, source, more = divide_classes(sizes, shares, str(folder), source, min_examples)
    return image_set(folder, groups, splits, form, split_source=source, notes=[*notes, *more])


def _say_repeated(groups: Groups) -> list[str]:
    """Return a line where folders of one name are several classes: right for alphabets, wrong for domains."""
    inner = Counter(name.rpartition("/")[2] for name in {*chain(*groups.values())})
    return [
        f"classes are whole paths: {printable(name)} of {number:,} folders is {number:,} classes"
        for name, number in inner.most_common(1)
        if number > 1
    ]


def _say_left_out(names: Sequence[str]) -> list[str]:
    """Return a line on files that are no images, and one on folders beside those of the split."""
    files, folders = ([n for n in names if n.endswith("/") is ends] for ends in (False, True))
    return [
        f"left out: {len(part):,} {what} ({', '.join(map(printable, [*dict.fromkeys(part)][:3]))}"
        f"{', ...' if len({*part}) > 3 else ''})"
        for part, what in ((files, "files that are no images"), (folders, "folders beside the split's"))
        if part
    ]


def image_set(
    folder: Path,
    groups: Groups,
    splits: Mapping[str, Iterable[str]],
    form: Form,
    *,
    published: bool = False,
    split_source: str = "",
    notes: Sequence[str] = (),
) -> ImageSet:
    """Return the images of groups of classes, through the cache."""
    classes: dict[str, list[ImagePath]] = {name: [] for part in splits.values() for name in part}
    for name, files_of_class in chain.from_iterable(group.items() for group in groups.values()):
        if name in classes:
            classes[name] += files_of_class
    names = sorted(classes)
    count = [len(classes[name]) for name in names]
    files = [file for name in names for file in classes[name]]
    form, note = settle_range(folder, files, form) if files else (form, [])

    def load() -> Tensor:
        settings = (form, names, count, *rows_of(files))
        shape, decode = (len(files), form.channels, form.size, form.size), partial(decode_all, files, form)
        return cached_pixels(folder, sources_of(files), settings, shape, decode)

    return ImageSet(
        names,
        torch.tensor(count),
        as_positions(splits, names, str(folder)),
        load,
        str(folder),
        published=published,
        split_source=split_source,
        notes=[*notes, *note],
        range_record=form.record,
    )

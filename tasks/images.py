"""Find the classes of a folder of images and decode its files: from a path to an `ImageSet`.

Three layouts are read: folders train/, val/ and test/ of class folders; lists train.csv, val.csv and
test.csv; or class folders alone, which are split at random. `ImageTasks` (image_tasks.py) draws tasks from an
`ImageSet`; the benchmarks with published classes are in published.py and omniglot.py.
"""

from __future__ import annotations

import csv
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UsageError, one_line
from tasks.cache import cached_pixels
from tasks.splits import as_positions, check_disjoint, split_at_random

warnings.filterwarnings("ignore", module=r"PIL\.")  # about files that are read all the same

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow's other readers see nothing
LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # left by file managers; hidden files are ignored too
SPLIT_NAMES = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
AT_ONCE = 256  # images in work at a time: bounds the memory

ImageFile = Path | zipfile.Path
Classes = dict[str, list[Path]]  # a class's name -> its image files, sorted


@dataclass(frozen=True)
class Form:
    """How an image becomes a tensor, uint8 `[channels, size, size]`."""

    size: int
    channels: int
    invert: bool = False
    resize: str = "lanczos"  # or "nearest"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: classes and splits at once, pixels when `load` is called."""

    names: list[str]  # [classes]
    count: Tensor  # int64 [classes], images of each
    splits: dict[str, Tensor]  # "train", "validation", "test" -> int64 positions of classes, disjoint
    load: Callable[[], Tensor]  # gives uint8 [images, channels, height, width], class by class
    source: str  # for messages
    own_splits: bool = True  # the data itself says which classes are for training
    published: bool = False  # the split is the same for everyone, always


def open_folder(folder: Path, form: Form, shares: Mapping[str, int]) -> ImageSet:
    """Return the images of a folder and their splits; no image is read yet.

    Args:
        shares: of "train", "validation" and "test" in classes that the folder does not split. If it splits
            them into training and test alone, validation classes come out of the training classes.

    Raises UsageError, in one line, on a folder in none of the three layouts.
    """
    groups, own_splits = find_classes(folder)
    splits = {split: list(classes) for split, classes in groups.items()}
    if not own_splits:
        splits = split_at_random(splits["all"], shares)
    elif "train" in splits and "validation" not in splits:
        both = {split: share for split, share in shares.items() if split != "test"}
        splits |= split_at_random(splits["train"], both)
    classes = {name: files for group in groups.values() for name, files in group.items()}
    return image_set(folder, classes, splits, form, own_splits=own_splits)


def image_set(
    folder: Path,
    classes: Mapping[str, Sequence[ImageFile]],
    splits: Mapping[str, Iterable[str]],
    form: Form,
    *,
    sources: Sequence[Path] | None = None,
    own_splits: bool = True,
    published: bool = False,
) -> ImageSet:
    """Return the images of these files, through the cache.

    Args:
        sources: the files whose changes make another cache; by default the images themselves.
    """
    names = sorted(classes)
    count = [len(classes[name]) for name in names]
    files = [file for name in names for file in classes[name]]
    if sources is None:
        sources = [file for file in files if isinstance(file, Path)]
    shape, settings = (len(files), form.channels, form.size, form.size), (form, names, count)
    return ImageSet(
        names,
        torch.tensor(count),
        as_positions(splits, names, str(folder)),
        lambda: cached_pixels(folder, sources, settings, shape, lambda: _decode_all(files, form)),
        str(folder),
        own_splits=own_splits,
        published=published,
    )


# ---- which classes there are ---------------------------------------------------------------------


def find_classes(folder: Path) -> tuple[dict[str, Classes], bool]:
    """Return the classes of each split that the folder names, and True; or {"all": classes}, and False."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: name a folder of images")
    split_folders, lists = _named_splits(folder, ""), _named_splits(folder, ".csv")
    # folders that all hold images themselves are classes with these names
    if not all(image_files(path) for path in split_folders.values()):
        groups = {split: _class_folders(path) for split, path in split_folders.items()}
    elif lists:
        groups = {split: _listed_classes(folder, path) for split, path in lists.items()}
        _check_listed_once(groups)
    else:
        return {"all": _class_folders(folder)}, False
    check_disjoint(groups, str(folder))
    return groups, True


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted; other files are passed over."""
    return [path for path in _visible(folder, (path.name for path in folder.iterdir())) if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _visible(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the paths of these names, sorted, without hidden files and litter."""
    return [folder / name for name in sorted(names) if name[0] != "." and name.lower() not in LITTER]


def _named_splits(folder: Path, suffix: str) -> dict[str, Path]:
    """Return the split folders, or lists, of a folder; none unless one is for training or for test."""
    splits: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        candidates = [folder / f"{name}{suffix}" for name in names]
        paths = [path for path in candidates if (path.is_file() if suffix else path.is_dir())]
        if len(paths) > 1:
            raise UsageError(f"{folder} has both {paths[0].name} and {paths[1].name}: remove one of them")
        if paths:
            splits[split] = paths[0]
    return splits if {"train", "test"} & splits.keys() else {}


def _class_folders(base: Path) -> Classes:
    """Return every folder below `base` that directly holds images, by its path relative to `base`."""
    classes: Classes = {}
    seen: dict[Path, Path] = {}  # a folder's real path -> its path here
    for place, folder_names, file_names in os.walk(base, followlinks=True, onerror=_refuse):
        folder = Path(place)
        folder_names[:] = [path.name for path in _visible(folder, folder_names)]
        files = _visible(folder, file_names)
        images = [path for path in files if _is_image(path)]
        others = [path for path in files if not _is_image(path)]
        real = folder.resolve()
        if real in seen:  # its images would be in two classes; and a link to a folder above has no end
            raise UsageError(f"{folder} is the same folder as {seen[real]}: remove one of them")
        seen[real] = folder
        if folder == base and images:
            raise UsageError(
                f"{base} holds images itself, such as {images[0].name}: put the images of each class into a "
                "folder of its own"
            )
        if folder != base and others and (images or not folder_names):
            raise UsageError(f"{others[0]} is no image, in the folder of a class: remove it")
        if folder != base and not files and not folder_names:
            raise UsageError(f"class folder {folder} is empty: remove it, or put its images there")
        if images:
            classes[folder.relative_to(base).as_posix()] = images
    if not classes:
        raise UsageError(f"{base} holds no classes: put the images of each class into a folder of its own")
    return classes


def _refuse(error: OSError) -> None:
    raise UsageError(f"{error.filename} cannot be read ({error.strerror}): see to its permissions") from error


def _listed_classes(folder: Path, path: Path) -> Classes:
    """Return the classes of a list: of files and labels, or of labels that are class folders."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = list(rows.fieldnames or ())
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is no readable CSV file ({one_line(error)}): write it again") from error
    label_column = next((column for column in ("label", "class") if column in columns), None)
    if label_column is None:
        raise UsageError(
            f'{path} has the columns {columns}: it needs "filename" and "label", or "label" alone'
        )
    classes: Classes = {}
    for number, row in lines:
        label, filename = row[label_column], row.get("filename")
        line = f"{path}, line {number},"
        if not label or ("filename" in columns and not filename):
            raise UsageError(f"{line} is incomplete: fill it, or remove it")
        if filename:
            places = [folder / "images", folder, folder / label]
            classes.setdefault(label, []).append(_listed_path(line, filename, places, Path.is_file))
        else:
            classes[label] = image_files(_listed_path(line, label, [folder], Path.is_dir))
            if not classes[label]:
                raise UsageError(f"{line} names the class {label}, which has no images: put them there")
    if not classes:
        raise UsageError(f"{path} names no class: fill it, or remove it")
    return {label: sorted(files) for label, files in classes.items()}


def _listed_path(line: str, name: str, places: list[Path], exists: Callable[[Path], bool]) -> Path:
    """Return the path of what a line of a list names."""
    for place in places:
        if exists(place / name):
            return place / name
    raise UsageError(
        f"{line} names {name}, which is not in {' nor in '.join(map(str, places))}: put it there, or remove "
        "the line"
    )


def _check_listed_once(groups: Mapping[str, Classes]) -> None:
    """Refuse a file in two places: what is tested was never trained on, and no task has an image twice."""
    class_of: dict[str, str] = {}
    for split, classes in groups.items():
        for name, files in classes.items():
            for file in files:
                key = os.path.normpath(file)
                if key in class_of:
                    raise UsageError(
                        f"{file} is listed twice, under {class_of[key]} and {name} ({split}): list it once"
                    )
                class_of[key] = f"{name} ({split})"


# ---- from a file to pixels -----------------------------------------------------------------------


def read_images(files: Sequence[Path], form: Form) -> Tensor:
    """Return images of no class, uint8 `[files, channels, size, size]`.

    Raises UsageError, which names the file, where one is unreadable.
    """
    images = np.empty((len(files), form.channels, form.size, form.size), np.uint8)
    for position, image in enumerate(_decode_all(files, form)):
        images[position] = image
    return torch.from_numpy(images)


def _decode_all(files: Sequence[ImageFile], form: Form) -> Iterator[np.ndarray]:
    """Yield the files' images in order, decoded in parallel."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(partial(_decode, form=form), files[start : start + AT_ONCE])


def _decode(path: ImageFile, form: Form) -> np.ndarray:
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return prepare(image, form)
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise UsageError(
            f"{path} is no readable image ({one_line(error)}): remove it, or put a sound one there"
        ) from error


def prepare(image: Image.Image, form: Form) -> np.ndarray:
    """Return an image as uint8 `[channels, size, size]`: upright, on white, grey or in colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Converted before it is resized: on one-bit images Pillow silently takes the nearest pixel.
    image = image.convert("L" if form.channels == 1 else "RGB")
    if image.size != (form.size, form.size):
        image = image.resize((form.size, form.size), Image.Resampling[form.resize.upper()])
    pixels = np.asarray(image).reshape(form.size, form.size, form.channels).transpose(2, 0, 1)
    return 255 - pixels if form.invert else pixels

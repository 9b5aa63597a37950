"""Find the classes of a folder of images and decode its files: path -> `ImageSet` -> image_tasks.py.

Splits are folders train/, val/ and test/ of class folders, or lists train.csv, val.csv and test.csv of files
and labels; class folders alone are split at random.
"""

from __future__ import annotations

import csv
import os
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UsageError, one_line
from tasks.cache import cached_pixels
from tasks.splits import SPLIT_NAMES, as_positions, check_disjoint, split_at_random

warnings.filterwarnings("ignore", module=r"PIL\.")  # about files that are read anyway

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HIDDEN = (".", "__MACOSX")  # beginnings of names that are ignored
AT_ONCE = 256  # images in work at a time: bounds the memory

ImageFile = Path | zipfile.Path
Classes = dict[str, list[Path]]  # a class's name -> its image files, sorted
Groups = Mapping[str, Mapping[str, Sequence[ImageFile]]]  # the classes of each split, or of "all"


@dataclass(frozen=True)
class Form:
    """The form of a decoded image: uint8 `[channels, size, size]`."""

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
    published: bool = False  # the split is the same for everyone, always


def open_folder(folder: Path, form: Form, shares: Mapping[str, int]) -> ImageSet:
    """Return the images of a folder and their splits, of these shares where the folder has none.

    If it has training and test alone, validation classes come out of the training classes.
    """
    groups = find_classes(folder)
    splits: dict[str, Iterable[str]] = {**groups}
    if "all" in groups:
        splits = {**split_at_random(groups["all"], shares)}
    elif "train" in groups and "validation" not in groups and shares["train"]:
        splits |= split_at_random(groups["train"], {name: shares[name] for name in ("train", "validation")})
    return image_set(folder, groups, splits, form)


def image_set(
    folder: Path, groups: Groups, splits: Mapping[str, Iterable[str]], form: Form, *, published: bool = False
) -> ImageSet:
    """Return the images of groups of classes, through the cache."""
    classes = {name: files for group in groups.values() for name, files in group.items()}
    names = sorted(classes)
    count = [len(classes[name]) for name in names]

    def load() -> Tensor:
        files = [file for name in names for file in classes[name]]
        sources = [Path(str(f.root.filename)) if isinstance(f, zipfile.Path) else f for f in files]
        shape, decode = (len(files), form.channels, form.size, form.size), partial(decode_all, files, form)
        return cached_pixels(folder, dict.fromkeys(sources), (form, names, count), shape, decode)

    positions = as_positions(splits, names, str(folder))
    return ImageSet(names, torch.tensor(count), positions, load, str(folder), published=published)


def find_classes(folder: Path) -> dict[str, Classes]:
    """Return the classes of each split of a folder, or {"all": classes} where it has no splits."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: it should hold class folders, or train, val and test")
    groups: dict[str, Classes] = {}
    for name, split in SPLIT_NAMES.items():
        part, listing = folder / name, folder / f"{name}.csv"
        if part.is_dir() and any(child.is_dir() for child in part.iterdir()):  # a class may be called train
            groups[split] = class_folders(part)
        elif listing.is_file():
            groups[split] = _listed_classes(folder, listing)
    groups = groups or {"all": class_folders(folder)}
    check_disjoint(groups, str(folder))
    real, files = cache(os.path.realpath), {}
    for split, classes in groups.items():  # no image appears twice, through a list or a link
        files[split] = [f"{real(file.parent)}/{file.name}" for file in chain(*classes.values())]
    check_disjoint(files, str(folder))
    return groups


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted; other files are ignored."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(HIDDEN))
    return [folder / name for name in names if name.lower().endswith(EXTENSIONS)]


def class_folders(base: Path, place: str = ".") -> Classes:
    """Return every folder below `base` that directly holds images, by its path relative to `base`."""
    images = image_files(base / place)
    with os.scandir(base / place) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(HIDDEN))
    if not (images or folders) or (images and place == "."):
        raise UsageError(f"{base / place}: put the images of each class into a folder of its own")
    classes = {place: images} if images else {}
    for name in folders:
        classes |= class_folders(base, name if place == "." else f"{place}/{name}")
    return classes


def _listed_classes(folder: Path, path: Path) -> Classes:
    """Return the classes of a list with the columns "filename" and "label"."""
    classes: dict[str, list[Path]] = defaultdict(list)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            name, label = row.get("filename"), row.get("label")
            if not (name and label):
                raise UsageError(f'{path}: a row should have a "filename" and a "label": it has {row}')
            places = (folder / "images" / name, folder / name, folder / label / name)
            image = next((place for place in places if place.is_file()), None)
            if image is None:
                raise UsageError(f"{path}: there is no {name} in {folder}: put it there, or remove the row")
            classes[label].append(image)
    return {label: sorted(files) for label, files in classes.items()}


def decode_all(files: Sequence[ImageFile], form: Form) -> Iterator[np.ndarray]:
    """Yield the files' images in order, decoded in parallel, as uint8 `[channels, size, size]`."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(partial(_decode, form=form), files[start : start + AT_ONCE])


def _decode(path: ImageFile, form: Form) -> np.ndarray:
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return prepare(image, form)
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise UsageError(f"{path} is not a readable image ({one_line(error)}): mend or remove it") from error


def prepare(image: Image.Image, form: Form) -> np.ndarray:
    """Return an image as uint8 `[channels, size, size]`: upright, on white, grey or in colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Converted before it is resized: on one-bit images Pillow silently takes the nearest pixel.
    image = image.convert("L" if form.channels == 1 else "RGB")
    image = image.resize((form.size, form.size), Image.Resampling[form.resize.upper()])
    pixels = np.asarray(image).reshape(form.size, form.size, form.channels).transpose(2, 0, 1)
    return 255 - pixels if form.invert else pixels

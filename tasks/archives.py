"""Read the files in which few-shot benchmarks are passed around: pickles and .npz archives of each split.

mini-imagenet-cache-{train,val,test}.pkl, CIFAR_FS_train.pickle, FC100_train.pickle and tieredImageNet's
train_images_png.pkl or train_images.npz with train_labels.pkl. A pickle is read as data: nothing in it runs.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UsageError, escape_text
from common.random import SPLITS
from tasks.cache import cache_array
from tasks.file_tasks import explain
from tasks.pixels import ImageColumn, StoredImage, as_file
from tasks.splits import find_part

SUFFIXES = (".pkl", ".pickle", ".npz")
_ARRAY = np.empty(0)
# By the name in the pickle: numpy's modules have moved. None of these runs anything.
NUMPY = {"ndarray": np.ndarray, "dtype": np.dtype, "scalar": np.float64(0).__reduce__()[0]}
NUMPY |= {"_reconstruct": _ARRAY.__reduce__()[0], "_frombuffer": _ARRAY.__reduce_ex__(5)[0]}
CONTAINERS = {"list": list, "dict": dict, "set": set, "range": range, "xrange": range}
CONTAINERS |= {"OrderedDict": OrderedDict, "defaultdict": defaultdict}

Labelled = tuple[Sequence[Any], dict[str, np.ndarray]]  # images, and the positions of each class's


class DataUnpickler(pickle.Unpickler):
    """Load arrays, numbers, texts, lists and dictionaries; UsageError where a pickle names other code."""

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if package == "numpy" and name in NUMPY:
            return NUMPY[name]
        if module in ("builtins", "__builtin__", "collections") and name in CONTAINERS:
            return CONTAINERS[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")  # what older pickles write for bytes
        raise UsageError(f"it names {escape_text(f'{module}.{name}')}, which is not loaded")


def load_data(path: Path) -> Any:
    """Return the content of a pickle or an .npz archive; UsageError if it is damaged, or more than data."""
    try:
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no .npz archive")
            return dict(np.load(path, allow_pickle=False))
        with path.open("rb") as file:
            return DataUnpickler(file, encoding="latin1").load()
    except Exception as error:  # the unpickler raises errors of many kinds on damaged files
        way = f"where it was made, write numpy.savez('{path.stem}.npz', images=..., labels=...)"
        raise UsageError(f"{path} cannot be read as data ({explain(path, error)}): {way}") from error


def has_archives(folder: Path) -> bool:
    """Return whether a folder holds archives of splits, and no folders."""
    if not folder.is_dir() or any(path.is_dir() and path.name[0] not in "._" for path in folder.iterdir()):
        return False
    return bool(find_archives(folder))


def find_archives(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split: one, or images and labels apart."""
    archives: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem = path.stem.lower()
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if "train_phase" in stem and not stem.endswith("train_phase_train"):
            continue  # MetaOptNet's other images of training classes
        part = find_part(path.stem)
        if part in SPLITS:
            archives.setdefault(part, []).append(path)
        elif part:
            way = "call it train, val or test, or move it away"
            raise UsageError(f"{path} looks like part of a split: {way}")
    for split, paths in archives.items():
        halves = [path for path in paths if "label" in path.stem.lower()]
        if len(paths) != 1 + len(halves) or len(halves) > 1:
            names = ", ".join(path.name for path in paths)
            problem = f"{names} may all hold {split} images"
            raise UsageError(f"{folder}: {problem}: leave one, or images and labels")
    return {split: archives[split] for split in SPLITS if split in archives}


def read_split(paths: Sequence[Path], split: str) -> Labelled:
    """Return the images of a split and the positions of each class's, by name."""
    content: dict[str, Any] = {}
    for path in paths:
        part = load_data(path)
        part = part if isinstance(part, Mapping) else {"images": part}
        content |= {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in part.items()}
    images = next((content[key] for key in ("image_data", "data", "images") if key in content), None)
    labels = next((content[key] for key in ("labels", "label_specific") if key in content), None)
    if images is None or (labels is None and "class_dict" not in content):
        keys = escape_text(", ".join(content)[:80])
        form = "it should have image_data and class_dict, data and labels, or images and labels"
        raise UsageError(f"{paths[0]} has the parts {keys}: {form}")
    if "class_dict" in content:
        classes = {str(name): np.asarray([*places]) for name, places in content["class_dict"].items()}
    else:
        numbers, names = np.asarray(labels), _name_labels(content)
        if len(numbers) != len(images):
            problem = f"{len(images):,} images and {len(numbers):,} labels"
            raise UsageError(f"{paths[0]}: {problem}: they should match")
        present = np.unique(numbers).tolist()
        classes = {names.get(n, f"{split}/{n}"): np.flatnonzero(numbers == n) for n in present}
    for name, rows in classes.items():
        if not len(rows) or rows.min() < 0 or rows.max() >= len(images):
            problem = "has no images, or some that are not there"
            raise UsageError(f"{paths[0]}: class {escape_text(name)} {problem}")
    used = [row for rows in classes.values() for row in rows.tolist()]
    if len({*used}) < len(used):
        raise UsageError(f"{paths[0]}: an image is in two classes, or twice in one: leave it once")
    return _as_pictures(images, paths[0]), classes


def _name_labels(content: Mapping[str, Any]) -> dict[Any, str]:
    """Return the names of labels, where the file has some."""
    if isinstance(content.get("catname2label"), Mapping):
        return {label: str(name) for name, label in content["catname2label"].items()}
    return dict(enumerate(map(str, content.get("label_specific_str", ()))))


def _as_pictures(images: Any, path: Path) -> Sequence[Any]:
    """Return images that `as_file` takes: uint8 `[n, height, width(, 3)]`, or encoded ones."""
    encoded = isinstance(images, list | tuple) or getattr(images, "dtype", None) == np.dtype(object)
    if encoded and all(np.asarray(image).dtype == np.uint8 or isinstance(image, bytes) for image in images):
        return images
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        problem = f"images of type {images.dtype} and shape {images.shape}"
        raise UsageError(f"{path} has {problem}: they should be uint8 [images, height, width, 3]")
    return images.transpose(0, 2, 3, 1) if images.ndim == 4 and images.shape[-1] not in (1, 3) else images


def find_archived_classes(folder: Path) -> tuple[dict[str, dict[str, list[StoredImage]]], str, list[str]]:
    """Return the images by class and split, the names of the archives, and a line on files left out."""
    archives = find_archives(folder)
    sources = [path for paths in archives.values() for path in paths]
    data = cache_array(folder, sources, "places of classes", lambda: _find_places(folder, archives))
    groups: dict[str, dict[str, list[StoredImage]]] = {}
    for split, classes in json.loads(data.tobytes()).items():
        column = ImageColumn(archives[split][0], "image", partial(_open_split, archives[split], split))
        groups[split] = {name: [StoredImage(column, row) for row in rows] for name, rows in classes.items()}
    names = {path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    others = ", ".join(map(escape_text, sorted(names - {path.name for path in sources})))
    return groups, ", ".join(path.name for path in sources), [f"left out: {others}"] if others else []


def _find_places(folder: Path, archives: Mapping[str, Sequence[Path]]) -> np.ndarray:
    """Return the positions of each class's images in each split, as JSON."""
    places: dict[str, dict[str, list[int]]] = {}
    firsts: dict[bytes, str] = {}  # the first image of a class -> its split
    for split, paths in archives.items():
        images, classes = read_split(paths, split)
        places[split] = {name: rows.tolist() for name, rows in classes.items()}
        for rows in places[split].values():
            if firsts.setdefault(as_file(images[rows[0]]), split) != split:
                raise UsageError(f"{folder}: {paths[0].name} has images of another split: replace the file")
    return np.frombuffer(json.dumps(places).encode(), np.uint8)


def _open_split(paths: Sequence[Path], split: str) -> Callable[[int], bytes]:
    images, _ = read_split(paths, split)
    return lambda row: as_file(images[row])

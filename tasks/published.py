"""Image benchmarks with published classes: Omniglot, icons, CIFAR-FS, FC100, mini- and tiered-ImageNet.

Omniglot and CIFAR-100 are fetched by torchvision, and examples/icons.py draws the icons; ImageNet's images
lie in a folder of the benchmark's name.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UsageError, fold_message
from common.random import SPLITS
from tasks.archives import find_archived_classes, has_archives, load_data
from tasks.folders import find_classes
from tasks.images import Groups, ImageSet, image_set
from tasks.options import ICON_DRAWINGS, OMNIGLOT_CLASSES, OMNIGLOT_DRAWINGS
from tasks.pixels import Form, ImageColumn, ImagePath, StoredImage, as_file
from tasks.splits import check_disjoint, published_splits, read_published, shuffle

PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each half of Omniglot
FOLDERS = {"omniglot": "omniglot-py", "cifar-fs": "cifar-100-python", "fc100": "cifar-100-python"}
CIFAR_IMAGES = 600  # of each class, training and test images together


def open_benchmark(
    name: str, data_root: Path, form: Form, omniglot_split: str = "random", icons_split: str = "concept"
) -> ImageSet:
    """Return a benchmark by its name; UsageError if it is not there, or has other classes than published."""
    folder_name = FOLDERS.get(name, name)
    if data_root.name == folder_name and data_root.is_dir() and not any((data_root / folder_name).glob("*")):
        data_root = data_root.parent  # the data's own folder was named
    if name == "omniglot":
        return _open_omniglot(data_root, form, omniglot_split)
    if name == "icons":
        return _open_icons(data_root, form, icons_split)
    published, folder = published_splits(name), data_root / name
    if name in ("cifar-fs", "fc100") and not folder.is_dir():
        return _open_cifar(name, data_root, published, form)
    groups: Groups
    if has_archives(folder):
        groups, source, notes = find_archived_classes(folder)
        numbered = all("/" in class_name for group in groups.values() for class_name in group)
        notes += ["classes are numbered in these files: their names are not compared"] * numbered
    else:
        groups, source, notes, numbered = find_classes(folder)[0], "", [], False
    if "all" in groups:  # ImageNet's other classes may lie there too
        classes = groups["all"]
        groups = {split: {w: classes[w] for w in part if w in classes} for split, part in published.items()}
    for split, group in groups.items():
        names = published[split]
        problem = f"{split} should have the {len(names)} published classes, and has {len(group)}"
        if different := [] if numbered else sorted({*group} ^ {*names}):
            problem = f"{different[0]} is missing in {split}, or was not published there"
        if different or len(group) != len(names):
            way = f"mend that, or load the folder as your own, images:{folder}"
            raise UsageError(f"{folder}: {problem}: {way}")
    check_disjoint(groups, str(folder))  # numbered classes have no published names
    return image_set(folder, groups, groups, form, published=True, split_source=source, notes=notes)


def _fetch(name: str, data_root: Path, **half: bool) -> Any:
    """Return half of a torchvision data set; torchvision fetches it if it is incomplete in `data_root`."""
    from torchvision import datasets  # slow to import, and needed once in a lifetime

    try:
        return getattr(datasets, name)(data_root, download=True, **half)
    except Exception as error:  # of the network, the disk, an archive, a pickle
        problem = f"{name} is incomplete in {data_root} and could not be fetched ({fold_message(error)})"
        raise UsageError(f"{problem}: put it there by hand, or name another --data-root") from error


def _open_omniglot(data_root: Path, form: Form, split: str) -> ImageSet:
    """Return Omniglot's 1,623 characters of 20 drawings, from torchvision's archives or unpacked folders."""
    folder = data_root / "omniglot-py"
    classes: dict[str, list[ImagePath]] = {}
    for part, characters in PARTS.items():
        archive = folder / f"{part}.zip"
        if not archive.exists() and not (folder / part).exists():
            _fetch("Omniglot", data_root, background=part == "images_background")
        files: dict[str, ImagePath] = {}  # by part/alphabet/character/drawing.png
        if zipfile.is_zipfile(archive):
            zipped = zipfile.ZipFile(archive)
            files |= {name: zipfile.Path(zipped, name) for name in zipped.namelist() if name.endswith(".png")}
        else:
            files |= {p.relative_to(folder).as_posix(): p for p in folder.glob(f"{part}/*/*/*.png")}
        drawn: dict[str, list[ImagePath]] = defaultdict(list)
        for name in sorted(files):
            drawn[name.rpartition("/")[0]].append(files[name])
        if len(drawn) != characters or {*map(len, drawn.values())} != {OMNIGLOT_DRAWINGS}:
            where = f"{folder}: {part} should have {characters} characters of {OMNIGLOT_DRAWINGS} drawings"
            raise UsageError(f"{where}: remove it to fetch it again")
        classes |= drawn
    splits = split_characters(sorted(classes), split)
    source = f"--omniglot-split {split}"
    return image_set(folder, {"all": classes}, splits, form, published=True, split_source=source)


def split_characters(names: Sequence[str], split: str) -> dict[str, list[str]]:
    """Return the characters for training, validation and test.

    "random": all characters shuffled once. "alphabet": every sixth background alphabet for validation, the
    others for training; the evaluation alphabets for test.
    """
    if split == "random":
        shuffled = iter(shuffle(names, "omniglot split"))
        return {part: [next(shuffled) for _ in range(size)] for part, size in OMNIGLOT_CLASSES[split].items()}
    alphabets = sorted({name.rpartition("/")[0] for name in names if name.startswith("images_background")})
    part_of = dict.fromkeys(alphabets, "train") | dict.fromkeys(alphabets[5::6], "validation")
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in names:
        splits[part_of.get(name.rpartition("/")[0], "test")].append(name)
    return splits


def _open_icons(data_root: Path, form: Form, split: str) -> ImageSet:
    """Return the drawings of examples/icons.py: a class is a concept, drawn by different designers.

    "concept": all drawings of a split's concepts. "designer": of these, the drawings by the split's own
    designers; concepts with fewer than `ICON_DRAWINGS` of them are left out.
    """
    path, published = data_root / "icons" / "icons.npz", read_published("icons")
    command = f"python examples/icons.py --data-root {data_root}"
    if not path.is_file():
        raise UsageError(f"there is no {path}: {command} draws it")
    content = load_data(path)
    concepts, designers = (content[name].tolist() for name in ("concepts", "sets"))
    column = ImageColumn(path, "icon", lambda: lambda row: as_file(content["pixels"][row]))
    split_by_concept, part_of = (
        {name: part for part in SPLITS for name in names[part]}
        for names in (published, published["designers"])
    )
    groups: dict[str, dict[str, list[ImagePath]]] = {part: defaultdict(list) for part in SPLITS}
    if {*concepts} != {*split_by_concept}:
        raise UsageError(f"{path} has other concepts than the published ones: {command} draws them")
    for row, (concept, designer) in enumerate(zip(concepts, designers, strict=True)):
        if split == "concept" or part_of[designer] == split_by_concept[concept]:
            groups[split_by_concept[concept]][concept].append(StoredImage(column, row))
    least = ICON_DRAWINGS[split]
    groups = {part: {n: i for n, i in group.items() if len(i) >= least} for part, group in groups.items()}
    source = f"--icons-split {split}"
    return image_set(path, groups, groups, form, published=True, split_source=source)


def _open_cifar(name: str, data_root: Path, published: Mapping[str, list[str]], form: Form) -> ImageSet:
    folder, names = data_root / "cifar-100-python", sorted(chain(*published.values()))

    def load() -> Callable[[int], bytes]:
        halves = [_fetch("CIFAR100", data_root, train=train) for train in (True, False)]
        labels = np.concatenate([half.targets for half in halves])
        data = np.concatenate([half.data for half in halves])  # [60000, 32, 32, 3]
        order = np.concatenate([np.flatnonzero(labels == halves[0].class_to_idx[name]) for name in names])
        return lambda row: as_file(data[order[row]])

    for half in ("train", "test"):
        if not (folder / half).is_file():
            _fetch("CIFAR100", data_root, train=half == "train")
    column = ImageColumn(folder / "train", f"image of {name}", load)
    rows = iter(range(len(names) * CIFAR_IMAGES))
    classes = {name: [StoredImage(column, next(rows)) for _ in range(CIFAR_IMAGES)] for name in names}
    return image_set(folder, {"all": classes}, published, form, published=True)

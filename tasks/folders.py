"""Find classes and splits in a folder of images: lists of files, split folders, or class folders alone.

What looks like a split and is not understood is refused: pooled, its test classes would be trained on.
"""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from common.errors import UsageError, escape_text
from common.random import SPLITS
from tasks.splits import check_disjoint, find_part, is_plain, parse_split

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
HIDDEN = (".", "__MACOSX")  # beginnings of names that are ignored
OTHER_KINDS = {  # endings of files where class folders should be -> what to do
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".rar", ".7z"): "unpack it there first, a folder per class",
    (".h5", ".hdf5", ".mat"): "convert it, numpy.savez('train.npz', images=..., labels=...), val, test too",
    (".parquet", ".npz", ".pkl", ".pickle"): "give its folder with images:, files called train, val, test",
}
LISTS = (".csv", ".txt", ".tsv", ".json", ".lst")  # of these, .csv is read
USUAL = "name its folders train, val and test, or as docs/data.md lists"

Classes = dict[str, list[Path]]  # a class's name -> its image files, sorted


def find_classes(folder: Path, *, allow_empty: bool = False) -> tuple[dict[str, Classes], str, list[str]]:
    """Return the classes of each split of a folder, or of "all" where it has no split.

    Returns also the names of the split's folders or lists, and lines on what may surprise. A class without
    images raises UsageError unless `allow_empty`.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give the folder that holds it, images:{folder.parent}")
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: it should hold class folders, or train, val and test")
    left_out: list[str] = []
    lists, strange = _split_lists(folder)
    parts = {} if lists else _split_folders(folder, left_out)
    strange = [path for path in strange if len(lists) < len(SPLITS) and parse_split(path.stem) not in lists]
    if strange and not parts:
        form = 'call it train.csv, val.csv or test.csv, with columns "filename" and "label", a comma between'
        raise UsageError(f"{strange[0]} looks like the list of a split: {form}, or remove it")
    if lists:
        groups = {split: _listed_classes(folder, path) for split, path in lists.items()}
    else:
        bases = parts or {"all": folder}
        groups = {s: class_folders(base, left_out, allow_empty=allow_empty) for s, base in bases.items()}
        for split, classes in groups.items():
            _refuse_inner_split(bases[split], classes, is_part=bool(parts))
    _check_images_apart(folder, groups)
    source = join(path.name + "/" * path.is_dir() for path in (lists or parts).values())
    return groups, source, [*_say_left_out(left_out), *_say_repeated(groups)]


def _say_repeated(groups: Mapping[str, Classes]) -> list[str]:
    """Return a line where folders of one name are several classes: right for alphabets, wrong for domains."""
    inner = Counter(name.rpartition("/")[2] for name in {*chain(*groups.values())})
    return [
        f"classes are whole paths: {escape_text(name)} of {number:,} folders is {number:,} classes"
        for name, number in inner.most_common(1)
        if number > 1
    ]


def _say_left_out(names: Sequence[str]) -> list[str]:
    """Return a line on files that are no images, and on folders beside those of the split."""
    few = join([*dict.fromkeys(names)][:3]) + ", ..." * (len({*names}) > 3)
    return [f"left out: {len(names):,} other files and folders ({few})"] if names else []


def join(names: Iterable[str]) -> str:
    return ", ".join(map(escape_text, names))


def _check_images_apart(folder: Path, groups: Mapping[str, Classes]) -> None:
    """Raise UsageError if an image is in two splits, through a list or a link too."""
    files = {split: find_real_paths(chain(*classes.values())) for split, classes in groups.items()}
    check_disjoint(files, str(folder))


def find_real_paths(files: Iterable[Path]) -> list[str]:
    """Return where images lie, whatever links lead there."""
    real = cache(os.path.realpath)  # of folders, which have many images
    return [
        os.path.realpath(file) if file.is_symlink() else f"{real(file.parent)}/{file.name}" for file in files
    ]


# ---- split folders -------------------------------------------------------------------------------


def _split_folders(folder: Path, left_out: list[str]) -> dict[str, Path]:
    """Return the folder of each split; none where class folders alone lie in `folder`."""
    names = _subfolders(folder)
    deep = {name for name in names if _subfolders(folder / name)}  # a class may be called train
    maybe = {name: find_part(name) for name in names}
    hints = {n: split for n, split in maybe.items() if split and (n in deep or parse_split(n) or split == n)}
    pair = len({split for name, split in hints.items() if name in deep}) > 1
    flat = len(names) == len(hints) and len({*hints.values()}) > 1
    if not (pair or flat or any(name in deep and is_plain(name) for name in hints)):
        return {}
    parts: dict[str, Path] = {}
    for name, split in hints.items():
        if name not in deep and not is_plain(name) and not flat:
            continue  # a class folder of that name
        if parse_split(name) is None:
            raise UsageError(f"{folder}: {name}/ looks like part of a split: {USUAL}, or move it away")
        if split in parts:
            both = f"{parts[split].name}/ and {name}/ may both hold {split} classes"
            raise UsageError(f"{folder}: {both}: {USUAL}, or move one away")
        if name not in deep:
            raise UsageError(f"{folder / name}: put the images of each class into a folder of its own there")
        parts[split] = folder / name
    others = [name for name in names if folder / name not in parts.values()]
    if "train" in parts and len(parts) > 1:
        left_out += [f"{name}/" for name in others]
        others = [name for name in others if len(parts) < len(SPLITS) and _holds_images(folder / name)]
    if others:
        looks = f"{join(f'{path.name}/' for path in parts.values())} looks like a split"
        raise UsageError(f"{folder}: {looks}, and {others[0]}/ does not: {USUAL}, or move one away")
    return {split: parts[split] for split in SPLITS if split in parts}


def _refuse_inner_split(base: Path, classes: Classes, *, is_part: bool) -> None:
    """Raise UsageError if folders below those of `base`, and of a part its own, look like another split."""
    children: dict[str, set[str]] = defaultdict(set)
    for name in classes:
        parts = name.split("/")
        for depth in range(0 if is_part and len(parts) > 1 else 1, len(parts)):
            children["/".join(parts[:depth])].add(parts[depth])
    for parent, names in children.items():
        splits = {name: find_part(name) for name in sorted(names)}
        plain = {split for name, split in splits.items() if is_plain(name)}
        if len(plain) > 1 or (all(splits.values()) and len({*splits.values()}) > 1):
            problem = f"{join(f'{name}/' for name, split in splits.items() if split)} look like a split"
            way = f"give images:{base / parent}, or put the images of each class into one folder"
            raise UsageError(f"{base / parent}: {problem}: {way}")


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.rglob("*"))


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(HIDDEN))


# ---- classes -------------------------------------------------------------------------------------


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the images directly in a folder, and the names of its other files, both sorted."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.is_dir())
    images = [n for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(HIDDEN)]
    return [folder / name for name in images], sorted({*names} - {*images})


def class_folders(base: Path, left_out: list[str], *, allow_empty: bool = False, place: str = ".") -> Classes:
    """Return every folder below `base` that directly holds images, by its path relative to `base`.

    An empty one raises UsageError, or is a class without images with `allow_empty`. Names of other files are
    added to `left_out`.
    """
    (images, others), folders = image_files(base / place), _subfolders(base / place)
    if (images and place == ".") or not (images or folders or (allow_empty and place != ".")):
        raise UsageError(_say_what_is_missing(base / place, others, empty_class=place != "."))
    if place != ".":  # beside the class folders lie caches and read-me files
        left_out += others
    classes = {} if folders and not images else {place: images}
    for name in folders:
        inner = name if place == "." else f"{place}/{name}"
        classes |= class_folders(base, left_out, allow_empty=allow_empty, place=inner)
    return classes


def _say_what_is_missing(folder: Path, others: list[str], *, empty_class: bool) -> str:
    for endings, way in OTHER_KINDS.items():
        if name := next((name for name in others if name.lower().endswith(endings)), None):
            return f"{folder} holds {name}: {way}"
    text = f"{folder}: put the images of each class into a folder of its own"
    if others and empty_class:
        problem = f"{folder} holds files such as {escape_text(others[0])}"
        text = f"{problem}, of no format that is read (.png, .jpg, .tif, ...): convert or rename them"
    elif others:
        text += f" (there are files such as {escape_text(others[0])})"
    return text + ", or leave empty classes out with --min-examples 1" * empty_class


# ---- lists ---------------------------------------------------------------------------------------


def _split_lists(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Return the list of each split, and files that look like one."""
    lists: dict[str, Path] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(HIDDEN) or path.suffix.lower() not in LISTS or not path.is_file():
            continue
        split, is_list = parse_split(path.stem), path.suffix.lower() == ".csv" and _has_columns(path)
        if split in lists and is_list:
            raise UsageError(f"{folder}: {lists[split].name} and {path.name} are both {split}: remove one")
        if split and is_list:
            lists[split] = path
        elif split or (is_list and find_part(path.stem)):
            others.append(path)
    return {split: lists[split] for split in SPLITS if split in lists}, others


def _has_columns(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return {"filename", "label"} <= {*next(csv.reader(file), [])}


def _listed_classes(folder: Path, path: Path) -> Classes:
    """Return the classes of a list with the columns "filename" and "label"."""
    classes: dict[str, list[Path]] = defaultdict(list)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            name, label = row.get("filename"), row.get("label")
            if not (name and label):
                raise UsageError(f'{path}: a row should have a "filename" and a "label": it has {row}')
            bases = folder / "images", folder, folder / label, folder / path.stem, folder / path.stem / label
            image = next((base / name for base in bases if (base / name).is_file()), None)
            if image is None:
                raise UsageError(f"{path}: there is no {name} in {folder}: put it there, or remove the row")
            classes[label].append(image)
    return {label: sorted(files) for label, files in classes.items()}

"""Find classes and images in Parquet files, as Hugging Face exports them: path -> `Groups` -> images.py.

An image is the content of a file, PNG or another, in a column of bytes or of {bytes, path}; a class is a name
or a number in another column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.random import SPLITS
from tasks.file_tasks import explain
from tasks.folders import join
from tasks.options import parse_roles
from tasks.pixels import ImageColumn, StoredImage
from tasks.splits import find_part, parse_split
from tasks.table_files import TableFile, class_labels

LABELS = ("label", "labels", "class", "target")  # usual names

Groups = dict[str, dict[str, list[StoredImage]]]  # images by class by split, or of "all"


def parquet_files(path: Path) -> list[Path]:
    """Return a Parquet file, or those of a folder, its data/ and folders of splits, sorted; perhaps none."""
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".parquet" and path.exists() else []
    inner = sorted(part for part in path.iterdir() if part.name == "data" or find_part(part.name))
    return [file for folder in (path, *inner) for file in sorted(folder.glob("*.parquet"))]


def find_stored_classes(
    path: Path, files: Sequence[Path], columns: Sequence[str]
) -> tuple[Groups, str, list[str]]:
    """Return the images by class and split, the split's source, and lines on what was left out or changed.

    `columns` are the roles that `--columns` gives. Files of one split alone are split as those of none.
    """
    roles = parse_roles(columns)
    if wrong := roles.keys() - {"class", "input"}:
        raise UsageError(f"--columns {min(wrong)}=: images have class=NAME and input=NAME alone")
    (image,), (label,) = (roles.get(role, (None,)) for role in ("input", "class"))
    groups: Groups = {}
    unlabelled = 0
    for file, split in _split_files(path, files).items():
        classes, missing = _read_classes(file, image, label)
        unlabelled += missing
        for name, images in classes.items():
            groups.setdefault(split, {}).setdefault(name, []).extend(images)
    if not groups:
        way = "name the column of classes with --columns class=NAME"
        raise UsageError(f"{path}: none of its {unlabelled:,} images has a class: {way}")
    notes = [f"left out: {unlabelled:,} images without a class"] if unlabelled else []
    groups = {split: groups[split] for split in ("all", *SPLITS) if split in groups}
    return groups, join(groups), notes


def _split_files(path: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Return each file's split, "all" if it is the only one; UsageError if a name is only like a split's."""
    names = {file: [re.split(r"[-.]", file.stem)[0]] for file in files}
    for file in files if path.is_dir() else ():
        names[file] += [file.parent.name] * (file.parent != path)
    hints, splits = (
        {file: next(filter(None, map(split_in, words)), "all") for file, words in names.items()}
        for split_in in (find_part, parse_split)
    )
    if len({*hints.values()}) == 1:
        return dict.fromkeys(files, "all")
    if unknown := [file for file, split in splits.items() if split == "all"]:
        problem = f"{unknown[0]} is not named after a split, and others are, or look like it"
        raise UsageError(f"{problem}: call them train, validation and test, or move it away")
    return splits


def _read_classes(
    file: Path, image: str | None, label: str | None
) -> tuple[dict[str, list[StoredImage]], int]:
    """Return a file's images by class, and the number of those without a class."""
    import pyarrow as pa  # slow to import, and for such files alone
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
        images = [field.name for field in schema if _holds_images(field.type)]
        labels = [name for name in schema.names if class_labels(schema, name)]
        labels = labels or [name for name in schema.names if name.lower() in LABELS]
        image = image or _choose(file, schema, images, "images", "input")
        label = label or _choose(file, schema, labels, "classes", "class")
        if missing := [name for name in (image, label) if name not in schema.names]:
            header = f"has no column {missing[0]!r}, but {schema.names}"
            raise UsageError(f"{file} {header}: name yours with --columns")
        table = TableFile(file, parquet.read_table(file, columns=[label], partitioning=None))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{file} is not readable ({explain(file, error)}): mend the file") from error
    if not _holds_images(kind := schema.field(image).type):
        raise UsageError(f"{file}: column {image!r} holds {kind}, not the bytes of images")
    column = ImageColumn(file, f"column {image!r}, data row", partial(_open_column, file, image))
    classes: dict[str, list[StoredImage]] = {}
    names, positions = table.names(label)
    for row, position in enumerate(positions.tolist()):
        if position >= 0:
            classes.setdefault(names[position], []).append(StoredImage(column, row))
    return classes, int((positions < 0).sum())


def _open_column(file: Path, name: str) -> Callable[[int], bytes]:
    """Return what gives the bytes of a row; those of a path are in a file beside the Parquet file."""
    from pyarrow import parquet

    column = parquet.read_table(file, columns=[name], partitioning=None).column(name)

    def read(row: int) -> bytes:
        value = column[row].as_py()
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None and path:
            return (file.parent / path).read_bytes()
        if content is None:
            raise ValueError("it has no bytes")
        return content

    return read


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    fields = {kind.field(i).name for i in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    return "bytes" in fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _choose(file: Path, schema: Any, names: list[str], what: str, role: str) -> str:
    """Return the only one of some names of columns."""
    if len(names) != 1:
        few = ", ".join(names or schema.names)
        problem = f"has {len(names)} columns of {what} ({few})"
        raise UsageError(f"{file} {problem}: name one with --columns {role}=NAME")
    return names[0]

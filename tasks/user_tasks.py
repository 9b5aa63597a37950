"""Read a user's own examples: the tasks of `--adapt`, and arrays.

A folder is one task: `support/<class>/` holds labelled images, `query/` those to predict. A table holds one
task or several: rows with targets are the support set, rows without are the query. An .npz file is one task.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UsageError, escape_text
from common.task import UserTask
from tasks.file_tasks import explain
from tasks.folders import EXTENSIONS, HIDDEN, class_folders, image_files
from tasks.pixels import PLAIN, TRAINED, Form, Range, decode_all, prepare, scale_values, settle_range
from tasks.scales import Scales, apply_scale
from tasks.tables import Columns, load_table

Array = np.ndarray[Any, Any]


def read_task_folder(
    path: Path, form: Form, record: Sequence[str], device: torch.device, dtype: torch.dtype
) -> UserTask:
    """Return the task of a folder of images, with pixels from 0 to 1; UsageError on another layout.

    `record` is the training images' (see `Form`): without another --image-range, these have to be alike.
    """
    parts = {part.name.lower(): part for part in sorted(path.iterdir()) if part.is_dir()}
    support, query = (parts.get(name) for name in ("support", "query"))
    classes = class_folders(support, []) if support else {}
    queries = image_files(query)[0] if query else []
    if query and (deeper := _images_in_folders(query)):
        few = f"{deeper[0]} and {len(deeper) - 1} others" if deeper[1:] else str(deeper[0])
        raise UsageError(f"--adapt {path}: {few} lie in folders: put images to predict directly into {query}")
    if len(classes) < 2 or not queries:
        layout = "put images of two classes or more into support/<class>/, and those to predict into query/"
        raise UsageError(f"--adapt {path}: {layout}")
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    files = [*chain(*classes.values(), queries)]
    trained = form.recorded(record)
    reference = TRAINED if form.range in (None, trained.range) else ""
    form = trained if reference else settle_range(path, files, form)[0]
    images = np.stack([*decode_all(files, form, reference)])
    x = torch.from_numpy(images).to(device, dtype) / 255
    return UserTask(
        name="",
        support_x=x[: len(labels)],
        support_y=torch.tensor(labels, device=device),
        query_x=x[len(labels) :],
        classes=[escape_text(name) for name in classes],
        query_names=[escape_text(file.name) for file in queries],
    )


def _images_in_folders(folder: Path) -> list[Path]:
    """Return the images in folders of a folder, at any depth, apart from hidden ones."""
    images = [part for part in sorted(folder.glob("*/**/*")) if part.name.lower().endswith(EXTENSIONS)]
    return [path for path in images if not any(p.startswith(HIDDEN) for p in path.relative_to(folder).parts)]


def read_task_arrays(
    path: Path,
    scales: Scales,
    device: torch.device,
    dtype: torch.dtype,
    *,
    classification: bool,
    ways: int | None,
    ignored: int | None = None,
    images: bool = False,
) -> UserTask:
    """Return the task of an .npz file of arrays `support_x`, `support_y` and `query_x`, `[examples, ...]`.

    Args:
        scales: by which a table is standardised; the arrays are in the table's units.
        images: pixels should be from 0 to 1.
        ways: the number of classes; None: as many as there are labels.
        ignored: label that is no class; None: there is none.
    """
    support_x, support_y, query_x = _load_arrays(path)
    if classification and support_y.is_floating_point():
        raise UsageError(f"--adapt {path}: support_y are numbers: give labels, from 0, as integers")
    support_x, query_x = (apply_scale(x, scales, "input", f"--adapt {path}") for x in (support_x, query_x))
    if images and any(bool((x.double() > 1).any()) for x in (support_x, query_x)):
        raise UsageError(f"--adapt {path}: support_x and query_x have pixels above 1: give them from 0 to 1")
    labels = (ways or _count_labels(path, support_y, ignored)) if classification else 0
    if support_y.dim() == 1 and not classification:
        support_y = support_y[:, None]
    support_y = apply_scale(support_y, scales, "target", f"--adapt {path}: support_y")
    support_y = support_y.to(dtype) if support_y.is_floating_point() else support_y.long()
    has_decimals = support_x.is_floating_point() or query_x.is_floating_point()  # which tokens have not
    place = device, dtype if has_decimals else torch.int64
    return UserTask(
        name="",
        support_x=support_x.to(*place),
        support_y=support_y.to(device),
        query_x=query_x.to(*place),
        classes=[str(label) for label in range(labels)],
        query_names=[str(number) for number in range(1, len(query_x) + 1)],
    )


def _load_arrays(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return `support_x`, `support_y` and `query_x` of an .npz file; UsageError where they do not fit."""
    names = ("support_x", "support_y", "query_x")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(np.asarray(file[name])) for name in names}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = explain(path, error)
        raise UsageError(f"--adapt {path}: give numbers called {', '.join(names)} ({reason})") from error
    support_x, support_y, query_x = arrays.values()
    examples = [len(array) if array.dim() else 0 for array in arrays.values()]
    if not all(examples) or examples[0] != examples[1] or support_x.shape[1:] != query_x.shape[1:]:
        shapes = ", ".join(f"{name} {(*array.shape,)}" for name, array in arrays.items())
        raise UsageError(f"--adapt {path}: {shapes}: give [examples, ...], a target an example")
    if any(array.is_complex() for array in arrays.values()):
        raise UsageError(f"--adapt {path} has complex numbers: give real ones")
    return support_x, support_y, query_x


def _count_labels(path: Path, labels: Tensor, ignored: int | None) -> int:
    """Return how many classes there are, whose labels are 0, 1, ...; UsageError where there is a gap."""
    present = [label for label in labels.unique().tolist() if label != ignored]
    if not present or min(present) < 0 or (labels.dim() == 1 and present != [*range(len(present))]):
        few = ", ".join(map(str, present[:5])) or "none"
        raise UsageError(f"--adapt {path}: labels in support_y are {few}: count them from 0, without a gap")
    return present[-1] + 1


def read_task_table(
    path: Path,
    columns: Columns,
    scales: Scales,
    device: torch.device,
    dtype: torch.dtype,
    *,
    classification: bool,
) -> list[UserTask]:
    """Return the tasks of a table, standardised by `scales`, in order of appearance.

    Raises UsageError if one lacks either kind of rows, or columns are not those of the scales.
    """
    table = load_table(path, columns, dtype, classification=classification, shares=None)
    has_target = table.y >= 0 if classification else ~table.y.isnan().any(1)
    source = f"--adapt {path}"
    x, y = (apply_scale(t, scales, p, source) for t, p in ((table.x, "input"), (table.y, "target")))
    tasks = []
    for number, name in enumerate(table.tasks):
        support, query = ((table.task == number) & rows for rows in (has_target, ~has_target))
        if not (support.any() and query.any()):
            rows = "rows with targets, to adapt to, and others, to predict"
            raise UsageError(f"--adapt {path}, task {name!r}: give {rows}")
        classes, targets = [], y[support]
        if classification:
            labels, targets = targets.unique(return_inverse=True)
            classes = [escape_text(table.classes[label]) for label in labels.tolist()]
        task = UserTask(
            name=escape_text(name) if len(table.tasks) > 1 else "",
            support_x=x[support].to(device, dtype),
            support_y=targets.to(device, None if classification else dtype),
            query_x=x[query].to(device, dtype),
            classes=classes,
            query_names=[str(row + 1) for row in query.nonzero()[:, 0].tolist()],
        )
        tasks.append(task)
    return tasks


# ---- arrays --------------------------------------------------------------------------------------


def read_numbers(name: str, values: Any, axes: int = 1) -> Array:
    """Return finite numbers of at least so many axes; UsageError, which has the array's name, for others."""
    array = np.asarray(values)
    if array.dtype == object:  # as of a data frame with columns of several types
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name} should be numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{name} should be numbers, not {array.dtype}")
    if array.ndim < axes or not array.size:
        shape = "[examples, ...]" if axes == 1 else "[examples, numbers] or images"
        raise UsageError(f"{name} is {array.shape}: give {shape}")
    if not np.isfinite(array).all():
        raise UsageError(f"{name} has NaN or infinity: mend it")
    return array


def read_pixels(values: Array, form: Form, record: Sequence[str], user_range: Range | None) -> Tensor:
    """Return images as the training images were made: uint8 `[images, channels, size, size]`.

    Args:
        values: `[images, height, width]` or `[images, channels, height, width]`, 1 or 3 channels: bytes
            from 0 (black) to 255 (white), or floats from 0 to 1. Other whole numbers have the range of the
            training images, and so have bytes if those were bytes.
        record: the range of the training images, see `Form`.
        user_range: the values that are black and white, if the user says so.
    """
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise UsageError(f"x is {values.shape}: give images [n, height, width] or [n, 1 or 3, height, width]")
    is_integer, plain = values.dtype.kind in "iu", replace(form, range=None)
    trained = form.recorded(record)
    if values.dtype == np.uint8 and trained.kind != PLAIN:
        trained = plain  # bytes, though the training images have more bits
    low, high = user_range or ((trained.range or (0.0, 255.0)) if is_integer else (0.0, 1.0))
    lowest, highest = float(values.min()), float(values.max())
    if not user_range and (lowest < low or highest > high or (is_integer and highest <= 1 < high)):
        raise UsageError(
            f"x has values from {lowest:.7g} to {highest:.7g}: give whole numbers from 0 to "
            f"{max(high, 255):.7g}, floats from 0 (black) to 1 (white), or say image_range='LOW,HIGH'"
        )
    pixels = scale_values(values, (low, high)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    images = (Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels)
    return torch.from_numpy(np.stack([prepare(image, plain) for image in images]))

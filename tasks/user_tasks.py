"""Read the tasks of `--adapt`: few labelled examples to adapt to, and others to predict.

A folder is one task: `support/<class>/` holds labelled images, `query/` those to predict. A table holds one
task or several: rows with targets are the support set, rows without are the query.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UsageError, printable
from tasks.images import Form, image_files, read_images
from tasks.tables import Columns, load_table

LAYOUT = "put labelled images into support/<class>/ and those to predict into query/"
NO_SPLIT = {"train": 1, "validation": 1, "test": 1}  # shares of tasks, which nothing here uses


@dataclass(frozen=True)
class UserTask:
    """A task of the user's: examples with targets, and examples without."""

    name: str  # "" if it is the only one
    support_x: Tensor  # [support examples, ...]
    support_y: Tensor  # int64 [support examples] of labels, or [support examples, targets]
    query_x: Tensor  # [query examples, ...]
    classes: list[str]  # names of the labels; empty for regression
    query_names: list[str]  # file names, or numbers of the table's rows from 1


def read_task_folder(path: Path, form: Form, device: torch.device, dtype: torch.dtype) -> UserTask:
    """Return the task of a folder of images, with pixels from 0 to 1.

    Raises UsageError where the folder has another layout, or an image cannot be read.
    """
    support, query = path / "support", path / "query"
    for folder in (support, query):
        if not folder.is_dir():
            raise UsageError(f"--adapt {path}: it has no folder {folder.name}/: {LAYOUT}")
    folders = sorted(p for p in support.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise UsageError(f"--adapt {path}: {support} has {len(folders)} folders of classes: give two or more")
    by_class = {folder.name: image_files(folder) for folder in folders}
    queries = image_files(query)
    for folder, files in [(query, queries), *((support / name, files) for name, files in by_class.items())]:
        if not files:
            raise UsageError(f"--adapt {path}: {folder} has no images: put some there, or remove it")

    def read(files: list[Path]) -> Tensor:
        return read_images(files, form).to(device, dtype) / 255

    labels = [label for label, files in enumerate(by_class.values()) for _ in files]
    return UserTask(
        name="",
        support_x=read([file for files in by_class.values() for file in files]),
        support_y=torch.tensor(labels, device=device),
        query_x=read(queries),
        classes=[printable(name) for name in by_class],
        query_names=[printable(file.name) for file in queries],
    )


def read_task_table(
    path: Path, columns: Columns, device: torch.device, dtype: torch.dtype, *, classification: bool
) -> list[UserTask]:
    """Return the tasks of a table, in order of first appearance.

    Raises UsageError where the table cannot be read, or a task has rows of one kind alone.
    """
    table = load_table(path, columns, classification=classification, shares=NO_SPLIT, missing_targets=True)
    tasks = []
    for name, first, count in zip(table.tasks, table.first.tolist(), table.count.tolist(), strict=True):
        rows = slice(first, first + count)
        x, y, known = table.x[rows], table.y[rows], table.known[rows]
        several = len(table.tasks) > 1
        where = f"--adapt {path}" + f", task {name!r}" * several
        if not known.any():
            raise UsageError(f"{where}: no row has its targets: fill in some, to adapt to")
        if known.all():
            raise UsageError(f"{where}: no row lacks a target: add rows to predict")
        classes: list[str] = []
        targets = y[known].to(dtype)
        if classification:
            labels, targets = y[known].unique(return_inverse=True)
            classes = [printable(table.classes[label]) for label in labels.tolist()]
        names = [str(row + 1) for row in table.row[rows][~known].tolist()]
        support_x, query_x = (x[part].to(device, dtype) for part in (known, ~known))
        tasks.append(
            UserTask(printable(name) * several, support_x, targets.to(device), query_x, classes, names)
        )
    return tasks

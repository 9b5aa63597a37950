"""Read a user's table, a CSV or Parquet file with one row per example: from a path to a `Table`.

pyarrow reads the file; ordinary mistakes in it become one line that says where. `TableTasks` (table_tasks.py)
draws tasks from a `Table`, and `--adapt` predicts the rows whose targets are missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UsageError, one_line
from common.random import SPLITS
from tasks.splits import as_positions, split_at_random

SPLIT_COLUMN = "split"
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation", "valid": "validation"}
EXTENSIONS = (".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class Columns:
    """The roles of a table's columns."""

    task: str = "task"
    targets: tuple[str, ...] = ("y",)
    inputs: tuple[str, ...] = ()  # empty: all other columns but "split"

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> Columns:
        """Return the roles that `task=NAME`, `target=NAME,...` and `input=NAME,...` name."""
        names = {}
        for pair in pairs:
            role, _, text = pair.partition("=")
            names[role] = tuple(name.strip() for name in text.split(","))
        (task,) = names.get("task", (cls.task,))
        return cls(task, names.get("target", cls.targets), names.get("input", cls.inputs))


@dataclass(frozen=True)
class Table:
    """The rows of a file, sorted by task; the rows of a task keep the file's order."""

    x: Tensor  # float64 [rows, inputs]
    y: Tensor  # regression: float64 [rows, targets], NaN where missing;
    #            classification: int64 [rows], positions in `classes`, -1 where missing
    known: Tensor  # bool [rows], whether all targets are there
    tasks: list[str]  # names, in order of first appearance
    count: Tensor  # int64 [tasks], rows of each
    classes: list[str]  # all classes, sorted, numbers as numbers; empty for regression
    splits: dict[str, Tensor]  # int64 positions of the tasks of each split, disjoint
    own_splits: bool  # the file says which task is in which split
    row: Tensor  # int64 [rows], positions in the file from 0
    source: str  # for messages

    @property
    def first(self) -> Tensor:
        """The position of each task's first row, int64 `[tasks]`."""
        return self.count.cumsum(0) - self.count


def load_table(
    path: Path,
    columns: Columns,
    *,
    classification: bool,
    shares: Mapping[str, int],
    missing_targets: bool = False,
) -> Table:
    """Read a .csv, .csv.gz or .parquet file.

    Args:
        classification: the one target is a class, of any type; otherwise targets are numbers.
        shares: of "train", "validation" and "test" in the tasks of a file without a column "split".
        missing_targets: for prediction: targets may be missing; without a task column all rows are one task.

    Raises UsageError where the file is not there, not readable, or its data is bad.
    """
    if classification and len(columns.targets) != 1:
        raise UsageError(f"classification takes one target column, not {len(columns.targets)}: name one")
    header = _read_header(path)
    one_task = missing_targets and columns.task not in header
    inputs = _check_columns(path, header, columns, one_task)
    own_splits = SPLIT_COLUMN in header and SPLIT_COLUMN not in (*inputs, *columns.targets, columns.task)
    numeric = inputs if classification else (*inputs, *columns.targets)
    file = _File(path, _read(path, header, numeric))
    x = torch.stack([file.numbers(name) for name in inputs], 1)
    classes: list[str] = []
    if classification:
        classes, y = _sort_classes(*file.names(columns.targets[0], "class", missing=missing_targets))
    else:
        y = torch.stack([file.numbers(name, missing=missing_targets) for name in columns.targets], 1)
    if one_task:
        tasks, task = ["task"], torch.zeros(len(x), dtype=torch.int64)
    else:
        tasks, task = file.names(columns.task, "task")
    splits = _read_splits(file, tasks, task) if own_splits else split_at_random(tasks, shares)
    order = task.argsort(stable=True)
    return Table(
        x=x[order],
        y=y[order],
        known=(y >= 0 if classification else ~y.isnan().any(1))[order],
        tasks=tasks,
        count=torch.bincount(task, minlength=len(tasks)),
        classes=classes,
        splits={split: part.sort().values for split, part in as_positions(splits, tasks, str(path)).items()},
        own_splits=own_splits,
        row=order,
        source=str(path),
    )


def _check_columns(path: Path, header: list[str], columns: Columns, one_task: bool) -> tuple[str, ...]:
    """Return the input columns; refuse columns that are not there, or have two roles."""
    has = ", ".join(map(repr, header))
    chosen = [*columns.targets, *columns.inputs, *[columns.task] * (not one_task)]
    for name, times in Counter(chosen).items():
        if times > 1:
            raise UsageError(f"column {name!r} is named twice: task, targets and inputs are different")
        if name not in header:
            raise UsageError(f"{path} has no column {name!r}: it has {has}; name yours with --columns")
    inputs = columns.inputs or tuple(name for name in header if name not in (*chosen, SPLIT_COLUMN))
    if not inputs:
        raise UsageError(f"{path} has no input column, only {has}: add one")
    if not columns.inputs and {"", "__index_level_0__"} & set(inputs):  # in CSV and in Parquet
        raise UsageError(
            f"{path} seems to have pandas' index as a column: write the file with index=False, or name the "
            "input columns"
        )
    return inputs


def _sort_classes(names: list[str], labels: Tensor) -> tuple[list[str], Tensor]:
    """Return the classes in sorted order, numbers by their size, and the labels that go with it."""
    try:
        order = sorted(range(len(names)), key=lambda i: (float(names[i]), names[i]))
    except ValueError:
        order = sorted(range(len(names)), key=names.__getitem__)
    position = torch.full([len(names) + 1], -1)  # the last is that of -1, the missing class
    position[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(names))
    return [names[i] for i in order], position[labels]


def _read_splits(file: _File, tasks: list[str], task: Tensor) -> dict[str, list[str]]:
    """Return the tasks of each split, as the column "split" says."""
    names, split = file.names(SPLIT_COLUMN, "split")
    for position, name in enumerate(names):
        if name.lower() not in SPLIT_NAMES:
            raise file.error(
                SPLIT_COLUMN, f"says {name!r}, not train, validation or test,", split == position
            )
    split = torch.tensor([SPLITS.index(SPLIT_NAMES[name.lower()]) for name in names])[split]
    return {name: [tasks[t] for t in task[split == n].unique()] for n, name in enumerate(SPLITS)}


# ---- reading a file ------------------------------------------------------------------------------


def _read_header(path: Path) -> list[str]:
    """Return the names of the columns, without spaces around them."""
    from pyarrow import ArrowException, csv, parquet  # slow to import, and for tables alone

    if not path.name.lower().endswith(EXTENSIONS):
        raise UsageError(f"{path} is not a table: give a file that ends in {', '.join(EXTENSIONS)}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the path of a table")
    try:
        schema = parquet.read_schema(path) if path.suffix.lower() == ".parquet" else csv.open_csv(path).schema
        header = [name.strip() for name in schema.names]
    except (OSError, ValueError, ArrowException) as error:
        raise UsageError(f"{path} is not readable ({one_line(error)[:300]}): mend the file") from error
    for name, times in Counter(header).items():
        if times > 1:
            raise UsageError(f"{path} has {times} columns {name!r}: rename all but one")
    return header


def _read(path: Path, header: list[str], numeric: Iterable[str]) -> Any:
    """Return the file as a pyarrow.Table; of a CSV file the numeric columns are float64, all others text."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    types = dict.fromkeys(header, pa.string()) | dict.fromkeys(numeric, pa.float64())
    try:
        if path.suffix.lower() == ".parquet":  # read_table would make columns of the names of folders
            data = parquet.ParquetFile(path).read().rename_columns(header)
        else:
            data = csv.read_csv(
                path,
                csv.ReadOptions(column_names=header, skip_rows=1, use_threads=False),  # errors name the row
                csv.ParseOptions(newlines_in_values=True),
                csv.ConvertOptions(column_types=types),
            )
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = re.sub(r"CSV column #(\d+)", lambda m: f"column {header[int(m[1])]!r}", one_line(error))
        raise UsageError(f"{path} is not readable ({reason[:300]}): mend the file") from error
    if not data.num_rows:
        raise UsageError(f"{path} has no rows: give a table with at least one")
    return data


@dataclass(frozen=True)
class _File:
    """An open table: columns as numbers or names, and errors that say where."""

    path: Path
    data: Any  # pyarrow.Table

    def numbers(self, name: str, *, missing: bool = False) -> Tensor:
        """Return a column as float64 `[rows]`, with NaN where a value may be missing."""
        import pyarrow as pa

        column = self.data.column(name)
        try:
            column = column.cast(pa.float64(), safe=False)  # integers above 2^53 are rounded
        except pa.ArrowException as error:
            raise UsageError(
                f"{self.path}: column {name!r} holds {column.type}, not numbers: convert it, or leave it out"
            ) from error
        numbers = torch.tensor(column.to_numpy())
        if numbers.isinf().any():
            raise self.error(name, "is infinite", numbers.isinf())
        if not missing and numbers.isnan().any():
            raise self.error(name, "has no value", numbers.isnan())
        return numbers

    def names(self, name: str, what: str, *, missing: bool = False) -> tuple[list[str], Tensor]:
        """Return a column's different names in order of appearance, and each row's position among them.

        Positions are int64 `[rows]`, -1 where a name may be missing.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.data.column(name)
        try:
            column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        except pa.ArrowException as error:
            kind = column.type
            raise UsageError(f"{self.path}: column {name!r} holds {kind}: it needs plain names") from error
        absent = ["", "nan", "NaN"] if what == "class" else [""]  # a task may well be called NaN
        column = pc.if_else(pc.is_in(column, pa.array(absent)), pa.scalar(None, pa.string()), column)
        if what == "class":  # pandas makes floats of whole numbers as soon as one is missing
            column = pc.replace_substring_regex(column, r"^(-?\d+)\.0+$", r"\1")
        encoded = column.combine_chunks().dictionary_encode()
        positions = torch.from_numpy(encoded.indices.fill_null(-1).to_numpy().astype(np.int64))
        if not missing and (positions < 0).any():
            raise self.error(name, f"names no {what}", positions < 0)
        return encoded.dictionary.to_pylist(), positions

    def error(self, name: str, problem: str, rows: Tensor) -> UsageError:
        """Return an error that names a column, its problem and the first of the rows, bool `[rows]`."""
        row = int(rows.nonzero()[0]) + 1
        return UsageError(
            f"{self.path}: column {name!r} {problem} in data row {row}: correct it, or leave out the row or "
            "the column"
        )

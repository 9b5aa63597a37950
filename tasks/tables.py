"""Read a user's table, a CSV or Parquet file with one row per example: from a path to a `Table`.

pyarrow reads the file; ordinary mistakes in it become one line that says where. `TableTasks` (table_tasks.py)
draws tasks from a `Table`, and `--adapt` predicts the rows whose targets are missing.
"""

from __future__ import annotations

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
NO_NUMBER = ("", "NA", "N/A", "nan", "NaN", "null", "NULL", "None")  # how files write a missing number
NO_CLASS = ("", "nan", "NaN")
NO_NAME = ("",)  # a task may well be called NA
INDEX_COLUMNS = ("", "__index_level_0__")  # what pandas calls its index in CSV and in Parquet


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
        missing_targets: for prediction: targets may be missing, and without a task column all rows are one
        task.

    Raises UsageError where the file is not there, not readable, or its data is bad.
    """
    if classification and len(columns.targets) != 1:
        raise UsageError(f"classification takes one target column, not {len(columns.targets)}: name one")
    file = _File(path, _read(path))
    one_task = missing_targets and columns.task not in file.columns
    inputs, own_splits = _check_columns(file, columns, one_task)
    x = torch.stack([file.numbers(name) for name in inputs], 1)
    if classification:
        labels = file.names(columns.targets[0], NO_CLASS, "class", missing=missing_targets)
        classes, y = _sort_classes(*labels)
        known = y >= 0
    else:
        classes, y = [], torch.stack([file.numbers(n, missing=missing_targets) for n in columns.targets], 1)
        known = ~y.isnan().any(1)
    if one_task:
        tasks, task = ["task"], torch.zeros(len(x), dtype=torch.int64)
    else:
        tasks, task = file.names(columns.task, NO_NAME, "task")
    splits = _read_splits(file, tasks, task) if own_splits else split_at_random(tasks, shares)
    order = task.argsort(stable=True)
    return Table(
        x=x[order],
        y=y[order],
        known=known[order],
        tasks=tasks,
        count=torch.bincount(task, minlength=len(tasks)),
        classes=classes,
        splits={split: part.sort().values for split, part in as_positions(splits, tasks).items()},
        own_splits=own_splits,
        row=order,
        source=str(path),
    )


def _check_columns(file: _File, columns: Columns, one_task: bool) -> tuple[tuple[str, ...], bool]:
    """Return the input columns, and whether the file has splits of its own."""
    has = ", ".join(map(repr, file.columns))
    chosen = [*columns.targets, *columns.inputs, *[columns.task] * (not one_task)]
    for name, times in Counter(chosen).items():
        if times > 1:
            raise UsageError(
                f"column {name!r} is named twice: task, targets and inputs are different columns"
            )
        if name not in file.columns:
            raise UsageError(f"{file.path} has no column {name!r}: it has {has}; name yours with --columns")
    own_splits = SPLIT_COLUMN in file.columns and SPLIT_COLUMN not in chosen
    inputs = columns.inputs or tuple(name for name in file.columns if name not in (*chosen, SPLIT_COLUMN))
    if not inputs:
        raise UsageError(f"{file.path} has no input column, only {has}: add one")
    for name in INDEX_COLUMNS:
        if name in inputs and not columns.inputs:
            raise UsageError(
                f"{file.path} has a column {name!r}, which looks like pandas' index: write the file with "
                "index=False, or name the input columns"
            )
    return inputs, own_splits


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
    names, split = file.names(SPLIT_COLUMN, NO_NAME, "split")
    for position, name in enumerate(names):
        if name.lower() not in SPLIT_NAMES:
            raise file.error(
                SPLIT_COLUMN, f"says {name!r}, not train, validation or test,", split == position
            )
    split = torch.tensor([SPLITS.index(SPLIT_NAMES[name.lower()]) for name in names])[split]
    split_of_task = torch.zeros(len(tasks), dtype=torch.int64).scatter(0, task, split)
    torn = split != split_of_task[task]
    if torn.any():
        name = tasks[int(task[torn][0])]
        raise file.error(SPLIT_COLUMN, f"puts task {name!r} into two splits, the second of them", torn)
    return {
        name: [tasks[t] for t in (split_of_task == number).nonzero()] for number, name in enumerate(SPLITS)
    }


# ---- reading a file ------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """Return the file as a pyarrow.Table; the columns of a CSV file are text."""
    from pyarrow import ArrowException, csv, parquet, string  # slow to import, and for tables alone

    if not path.name.lower().endswith(EXTENSIONS):
        raise UsageError(f"{path} is not a table: give a file that ends in {', '.join(EXTENSIONS)}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the path of a table")
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "CSV"
    try:
        if kind == "Parquet":
            data = parquet.ParquetFile(path).read()  # read_table would make columns of folder names
        else:
            # A type guessed from the first rows would fail on a later one.
            parse = csv.ParseOptions(newlines_in_values=True)
            header = csv.open_csv(path, parse_options=parse).schema.names
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(header, string()))
            data = csv.read_csv(path, parse_options=parse, convert_options=as_text)
    except (OSError, ValueError, ArrowException) as error:
        raise UsageError(
            f"{path} is not readable as {kind} ({one_line(error)[:200]}): mend the file"
        ) from error
    names = [name.strip() for name in data.column_names]
    for name, times in Counter(names).items():
        if times > 1:
            raise UsageError(f"{path} has {times} columns {name!r}: rename all but one")
    if not data.num_rows:
        raise UsageError(f"{path} has no rows: give a table with at least one")
    return data.rename_columns(names)


@dataclass(frozen=True)
class _File:
    """An open table: columns as numbers or names, and errors that say where."""

    path: Path
    data: Any  # pyarrow.Table

    @property
    def columns(self) -> list[str]:
        return self.data.column_names

    def numbers(self, name: str, *, missing: bool = False) -> Tensor:
        """Return a column as float64 `[rows]`, with NaN where a value may be missing."""
        import pyarrow as pa

        column = self._column(name, NO_NUMBER)
        try:
            values = column.cast(pa.float64(), safe=False)  # integers above 2^53 are rounded
        except pa.ArrowException as error:
            try:
                values = column.cast(pa.bool_()).cast(pa.float64())  # "true" and "false" of a CSV file
            except pa.ArrowException:
                raise UsageError(
                    f"{self.path}: column {name!r} is not of numbers ({one_line(error)[:200]}): correct it, "
                    "or leave out the column"
                ) from error
        numbers = torch.from_numpy(np.array(values, dtype=np.float64))
        if numbers.isinf().any():
            raise self.error(name, "is infinite", numbers.isinf())
        if not missing and numbers.isnan().any():
            raise self.error(name, "has no value", numbers.isnan())
        return numbers

    def names(
        self, name: str, absent: Iterable[str], what: str, *, missing: bool = False
    ) -> tuple[list[str], Tensor]:
        """Return a column's different names in order of appearance, and each row's position among them.

        Positions are int64 `[rows]`, -1 where a name may be missing.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._column(name, absent)
        try:
            column = column.cast(pa.string())
        except pa.ArrowException as error:
            kind = column.type
            raise UsageError(f"{self.path}: column {name!r} holds {kind}: it needs plain names") from error
        if what == "class":  # pandas makes floats of whole numbers as soon as one is missing
            column = pc.replace_substring_regex(column, r"^(-?\d+)\.0+$", r"\1")
        encoded = column.combine_chunks().dictionary_encode()
        positions = torch.from_numpy(encoded.indices.fill_null(-1).to_numpy().astype(np.int64))
        if not missing and (positions < 0).any():
            raise self.error(name, f"names no {what}", positions < 0)
        return encoded.dictionary.to_pylist(), positions

    def _column(self, name: str, absent: Iterable[str]) -> Any:
        """Return a column; texts are trimmed, and null where they stand for a missing value."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.data.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return column
        column = pc.utf8_trim_whitespace(column)
        is_absent = pc.is_in(column, value_set=pa.array(absent, column.type))
        return pc.if_else(is_absent, pa.scalar(None, column.type), column)

    def error(self, name: str, problem: str, rows: Tensor) -> UsageError:
        """Return an error that names a column, its problem and the first of the rows, bool `[rows]`."""
        row = int(rows.nonzero()[0]) + 1
        return UsageError(
            f"{self.path}: column {name!r} {problem} in data row {row}: correct it, or leave out the row or "
            "the column"
        )

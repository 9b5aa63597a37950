"""Tasks from a user's own table: a CSV or Parquet file with one row per example.

`load_table` reads and checks the file and says in one line what is wrong with it. `TableTasks` keeps
the rows on the device and samples tasks from them: a batch is an index operation, as for Omniglot.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batch import Kind, TaskBatch
from common.errors import UsageError, one_line
from common.random import SPLITS, Stream, task_stream

SPLIT_COLUMN = "split"
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation", "valid": "validation"}
EXTENSIONS = (".csv", ".csv.gz", ".parquet")
ONE_TASK = "task"  # the name of the only task of a file without a task column
NO_NUMBER = ["", "NA", "N/A", "null", "NULL", "None"]  # how files write a missing number, beside NaN
NO_CLASS = ["", "nan", "NaN"]
NO_NAME = [""]  # a task or a class may well be called NA
MOST_BYTES = 2**31  # of a file, unpacked
MOST_CELLS = 2**28
MOST_COLUMNS = 2**15
MOST_NAMES = 2**24  # different tasks or classes
MOST_LINE = 2**22  # characters of a header
INDEX_COLUMNS = ("", "__index_level_0__")  # what pandas calls its index in CSV and in Parquet


@dataclass(frozen=True)
class Columns:
    """Which columns of the file are what."""

    task: str = "task"
    targets: tuple[str, ...] = ("y",)
    inputs: tuple[str, ...] = ()  # empty: all other columns, but "split"


@dataclass(frozen=True)
class Table:
    """The rows of a file, sorted by task; the rows of a task are in the file's order."""

    x: Tensor  # float64 [rows, inputs]
    y: Tensor  # regression: float64 [rows, targets], NaN where missing;
    #            classification: int64 [rows], positions in `classes`, -1 where missing
    known: Tensor  # bool [rows], whether all targets are there
    tasks: list[str]  # names, in order of first appearance
    first: Tensor  # int64 [tasks], the first row of each
    count: Tensor  # int64 [tasks], the number of its rows
    classes: list[str]  # classification: the names of all classes, sorted, numbers as numbers; else empty
    splits: dict[str, Tensor]  # int64 positions of the tasks of each split
    own_splits: bool  # whether the file says which task is in which split
    row: Tensor  # int64 [rows], positions in the file from 0, to write predictions in the file's order
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    source: str = "the table"  # for messages


def load_table(
    path: Path,
    columns: Columns,
    *,
    classification: bool,
    split_seed: int = 0,
    shares: tuple[int, int, int] = (64, 16, 20),
    missing_targets: bool = False,
) -> Table:
    """The table in a .csv, .csv.gz or .parquet file.

    Arguments:
        classification: the one target is a class, of any type; otherwise targets are numbers.
        split_seed, shares: the tasks are split at random in these proportions (training, validation,
            test), unless the file has a column "split".
        missing_targets: for prediction: targets may be missing, and without a task column all rows are
            of one task.

    Raises UsageError where the file is not there, not readable, or its data is bad.
    """
    if classification and len(columns.targets) != 1:
        raise UsageError(f"classification takes one target column, not {len(columns.targets)}: name one")
    file = _File.open(path)
    one_task = missing_targets and columns.task not in file.columns
    inputs, own_splits = _check_columns(file, columns, one_task)

    x = np.stack([file.numbers(name) for name in inputs], 1)
    if classification:
        classes, labels = file.names(columns.targets[0], NO_CLASS, "class", missing=missing_targets)
        classes, y = _sorted_classes(classes, labels)
        known = y >= 0
    else:
        targets = [file.numbers(name, missing=missing_targets) for name in columns.targets]
        classes, y = [], torch.from_numpy(np.stack(targets, 1))
        known = ~y.isnan().any(1)

    if one_task:
        tasks, task = [ONE_TASK], torch.zeros(file.rows, dtype=torch.int64)
    else:
        tasks, task = file.names(columns.task, NO_NAME, "task")
    order = task.argsort(stable=True)
    count = torch.bincount(task, minlength=len(tasks))
    first = count.cumsum(0) - count
    if own_splits:
        splits = _own_splits(file, tasks, task, order[first])
    else:
        splits = _random_splits(tasks, split_seed, shares)
    return Table(
        x=torch.from_numpy(x)[order],
        y=y[order],
        known=known[order],
        tasks=tasks,
        first=first,
        count=count,
        classes=classes,
        splits=splits,
        own_splits=own_splits,
        row=order,
        inputs=inputs,
        targets=columns.targets,
        source=str(path),
    )


def _check_columns(file: _File, columns: Columns, one_task: bool) -> tuple[tuple[str, ...], bool]:
    """The input columns, and whether the file has splits of its own."""
    there = file.columns
    chosen = [*columns.targets, *columns.inputs] + [columns.task] * (not one_task)
    for name, times in Counter(chosen).items():
        if times > 1:
            raise UsageError(
                f"column {name!r} is named twice: task, targets and inputs are different columns"
            )
        if name not in there:
            raise UsageError(f"{file.path} has no column {name!r}: it has {', '.join(map(repr, there))}")
    own_splits = SPLIT_COLUMN in there and SPLIT_COLUMN not in chosen
    inputs = columns.inputs or tuple(name for name in there if name not in (*chosen, SPLIT_COLUMN))
    if not inputs:
        raise UsageError(f"{file.path} has no input column beside {', '.join(map(repr, there))}: add one")
    for name in INDEX_COLUMNS:
        if name in inputs and not columns.inputs:
            raise UsageError(
                f"{file.path} has a column {name!r}, which looks like pandas' index: write the file with "
                "index=False, or name the input columns"
            )
    return inputs, own_splits


def _sorted_classes(names: list[str], labels: Tensor) -> tuple[list[str], Tensor]:
    """Classes in sorted order, numbers by their size, and the labels that go with it."""
    by_size = all(_is_number(name) for name in names)
    order = sorted(range(len(names)), key=lambda i: (float(names[i]) if by_size else 0.0, names[i]))
    position = torch.full([len(names) + 1], -1)  # the last is that of -1, the missing class
    position[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(names))
    return [names[i] for i in order], position[labels]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- splits --------------------------------------------------------------------------------------


def _own_splits(file: _File, tasks: list[str], task: Tensor, first_row: Tensor) -> dict[str, Tensor]:
    """The splits that the file gives; `first_row` is the position in the file of each task's first row."""
    names, split = file.names(SPLIT_COLUMN, NO_NAME, "split")
    for position, name in enumerate(names):
        if name.lower() not in SPLIT_NAMES:
            row = int((split == position).nonzero()[0])
            raise UsageError(
                f"{file.path}: column 'split' says {_quoted(name)} in {file.place(row)}: "
                "it is train, validation or test"
            )
    split = torch.tensor([SPLITS.index(SPLIT_NAMES[name.lower()]) for name in names])[split]
    of_task = split[first_row]
    torn = (split != of_task[task]).nonzero()
    if len(torn):
        row = int(torn[0])
        raise UsageError(
            f"{file.path}: task {_quoted(tasks[task[row]])} is in {SPLITS[of_task[task[row]]]} and, in "
            f"{file.place(row)}, in {SPLITS[split[row]]}: give all rows of a task the same split"
        )
    return {name: (of_task == position).nonzero()[:, 0] for position, name in enumerate(SPLITS)}


def _random_splits(tasks: list[str], seed: int, shares: tuple[int, int, int]) -> dict[str, Tensor]:
    """A random split that depends on the names of the tasks, not on the order of the rows."""
    total = len(tasks)
    by_name = torch.tensor(sorted(range(total), key=tasks.__getitem__))
    stream = Stream.from_seed(seed).at("task split").at(torch.zeros(1, dtype=torch.int64))
    parts = by_name[stream.distinct(total, total)[0]].split(_sizes(total, shares))
    return {name: part.sort().values for name, part in zip(SPLITS, parts, strict=True)}


def _sizes(total: int, shares: tuple[int, int, int]) -> list[int]:
    """Seats in proportion to the shares (Sainte-Laguë), after one for each share that is not 0."""
    sizes = [0] * len(shares)
    for _ in range(total):
        both = zip(sizes, shares, strict=True)
        claims = [(size == 0 < share, share / (2 * size + 1)) for size, share in both]
        sizes[claims.index(max(claims))] += 1
    return sizes


# ---- reading a file ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """An open table: columns as numbers or names, and errors that say where."""

    path: Path
    data: Any  # pyarrow.Table; of a CSV file all columns are text

    @classmethod
    def open(cls, path: Path) -> _File:
        name = path.name.lower()
        if not name.endswith(EXTENSIONS):
            raise UsageError(f"{path} is not a table: give a file that ends in {', '.join(EXTENSIONS)}")
        if not path.is_file():
            raise UsageError(f"there is no file {path}: give the path of a table")
        try:
            import pyarrow as pa
        except ImportError as error:
            raise UsageError("reading a table takes pyarrow: pip install pyarrow") from error
        kind, read = ("Parquet", _read_parquet) if name.endswith(".parquet") else ("CSV", _read_csv)
        try:
            data = read(path)
        except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
            reason = one_line(error)[:200]
            if "straddling object" in reason:
                reason = "a row has more than a million bytes, or a quotation has no end"
            raise UsageError(f"{path} is not readable as {kind} ({reason}): mend the file") from error
        if not data.num_rows:
            raise UsageError(f"{path} has no rows: give a table with at least one")
        _check_size(path, data.num_rows * data.num_columns, MOST_CELLS, "cells")
        return cls(path, data)

    @property
    def columns(self) -> list[str]:
        return self.data.column_names

    @property
    def rows(self) -> int:
        return self.data.num_rows

    def place(self, row: int) -> str:
        """Where a user finds a row: as a spreadsheet numbers it; in a Parquet file, counted from 0."""
        if self.path.suffix.lower() == ".parquet":
            return f"row {row} (from 0)"
        with _text(self.path) as text, contextlib.suppress(csv.Error, ValueError, StopIteration):
            # blank lines are no rows, but have a number
            filled = (number for number, cells in enumerate(csv.reader(_lines(text)), 1) if cells)
            return f"row {next(itertools.islice(filled, row + 1, None))}"
        return f"row {row + 1} of the data"  # this reader takes no fields of such lengths

    def numbers(self, name: str, *, missing: bool = False) -> np.ndarray:
        """A column as float64 `[rows]`, with NaN for what may be missing."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._column(name)
        if _is_text(column.type):
            column = self._parsed(name, _null_where_in(column, NO_NUMBER))
        try:
            column = pc.cast(column, pa.float64(), safe=False)  # integers above 2^53 are rounded
        except pa.ArrowException as error:
            raise UsageError(
                f"{self.path}: column {name!r} holds {column.type}, not numbers: convert it or leave it out"
            ) from error
        values = column.to_numpy()
        for bad, what in ((np.isinf(values), "is infinite"), (np.isnan(values), "has no value")):
            if bad.any() and not (missing and what == "has no value"):
                raise self._bad(name, what, int(bad.argmax()))
        return values

    def _parsed(self, name: str, column: Any) -> Any:
        """Numbers, or true and false, from text."""
        import pyarrow as pa

        for kind in (pa.float64(), pa.bool_()):
            with contextlib.suppress(pa.ArrowInvalid):
                return column.cast(kind)
        texts = (text.as_py() for text in column)  # one after the other: a list would take a lot of memory
        row, text = next((i, text) for i, text in enumerate(texts) if text and not _is_arrow_number(text))
        raise self._bad(name, f"holds {_quoted(text)}, not a number", row)

    def names(
        self, name: str, absent: list[str], what: str, *, missing: bool = False
    ) -> tuple[list[str], Tensor]:
        """The different names in a column, in order of appearance, and each row's position among them.

        int64 `[rows]`; -1 for what may be missing.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._column(name)
        try:
            column = column if _is_text(column.type) else column.cast(pa.string())
        except pa.ArrowException as error:
            raise UsageError(
                f"{self.path}: column {name!r} holds {column.type}: it needs plain names or numbers"
            ) from error
        if what == "class":  # pandas makes floats of whole numbers as soon as one is missing
            column = pc.replace_substring_regex(column, r"^(-?\d+)\.0+$", r"\1")
        encoded = _null_where_in(column, absent).combine_chunks().dictionary_encode()
        _check_size(self.path, len(encoded.dictionary), MOST_NAMES, f"names in column {_quoted(name)}")
        positions = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
        if not missing and positions.min() < 0:
            raise self._bad(name, f"names no {what}", int(positions.argmin()))
        return encoded.dictionary.to_pylist(), torch.from_numpy(positions)

    def _column(self, name: str) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.data.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return pc.utf8_trim_whitespace(column) if _is_text(column.type) else column

    def _bad(self, name: str, what: str, row: int) -> UsageError:
        return UsageError(
            f"{self.path}: column {name!r} {what} in {self.place(row)}: correct it, or leave out the row "
            "or the column"
        )


def _read_csv(path: Path) -> Any:
    """All columns as text: a type guessed from the first rows would fail on a later one."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    _check_bytes(path)
    with _text(path) as text:
        header = next(filter(None, csv.reader(_lines(text))), [])
    _check_size(path, len(header), MOST_COLUMNS, "columns")
    names = [name.strip() for name in header]
    _refuse_duplicates(path, names)
    data = arrow_csv.read_csv(
        str(path),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )
    return data.rename_columns(names)


def _check_bytes(path: Path) -> None:
    """Refuses a CSV file that unpacks to too much, and lines with more commas than there may be columns.

    A thousand times its size is possible; and at some hundred thousand commas, old versions of pyarrow crash.
    """
    import pyarrow as pa

    size = commas = 0
    with pa.input_stream(str(path)) as file:
        while piece := file.read(1 << 20):
            size += len(piece)
            _check_size(path, size, MOST_BYTES, "bytes, unpacked")
            content = np.frombuffer(piece, np.uint8)
            ends = np.flatnonzero((content == ord("\n")) | (content == ord("\r")))
            places = np.flatnonzero(content == ord(","))
            before = np.concatenate([[-commas], places.searchsorted(ends), [len(places)]])
            in_line = np.diff(before)
            _check_size(path, int(in_line.max()) + 1, MOST_COLUMNS, "columns in a line")
            commas = int(in_line[-1])


def _read_parquet(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(str(path)) as file:  # unlike read_table, makes no columns of folder names
        about, schema = file.metadata, file.schema_arrow
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        _check_size(path, about.num_columns, MOST_COLUMNS, "columns")
        _check_size(path, about.num_rows * about.num_columns, MOST_CELLS, "cells")
        _check_size(path, sum(group.total_byte_size for group in groups), MOST_BYTES, "bytes")
        _refuse_duplicates(path, schema.names)
    texts = [field.name for field in schema if _is_text(field.type) or _is_binary(field.type)]
    # a text that is repeated a million times takes the room of one in the file, and here; and what the file
    # says about its size may be untrue
    with parquet.ParquetFile(str(path), read_dictionary=texts) as file:
        batches, size = [], 0
        for batch in file.iter_batches():
            size += sum(map(_bytes_in_full, batch.columns))
            _check_size(path, size, MOST_BYTES, "bytes, unpacked")
            batches.append(batch)
        data = pa.Table.from_batches(batches, file.schema_arrow)
    data.validate(full=True)  # of texts, that they are UTF-8
    return data


def _bytes_in_full(column: Any) -> int:
    """The size of a column where each row has a text of its own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if not pa.types.is_dictionary(kind) or not (_is_text(kind.value_type) or _is_binary(kind.value_type)):
        return column.nbytes
    return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0


def _check_size(path: Path, found: int, most: int, what: str) -> None:
    if found > most:
        raise UsageError(
            f"{path} has {found:,} {what}, more than {most:,}: split the file, or leave some out"
        )


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines of a bounded length; ValueError for a longer one."""
    while line := text.readline(MOST_LINE):
        if len(line) == MOST_LINE and not line.endswith("\n"):
            raise ValueError(f"a line has more than {MOST_LINE:,} characters")
        yield line


def _text(path: Path) -> io.TextIOWrapper:
    import pyarrow as pa

    return io.TextIOWrapper(pa.input_stream(str(path)), "utf-8-sig", newline="")  # unpacks .gz by itself


def _refuse_duplicates(path: Path, names: list[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise UsageError(f"{path} has {times} columns {_quoted(name)}: rename all but one")


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_arrow_number(text: str) -> bool:
    import pyarrow as pa

    try:
        pa.array([text]).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _null_where_in(column: Any, absent: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    is_absent = pc.is_in(column, value_set=pa.array(absent, column.type))
    return pc.if_else(is_absent, pa.scalar(None, column.type), column)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


# ---- sampling ------------------------------------------------------------------------------------


class TableTasks:
    """Tasks that are drawn, with replacement, from those of a table.

    Support and query rows of a task are drawn without replacement and never meet; the query does not
    depend on the number of shots. Inputs `[tasks, examples, inputs]` are given as they are in the file.
    Regression: targets `[tasks, examples, targets]`. Classification: a task draws `ways` of its classes
    and then rows of each; labels int64 `[tasks, ways * examples]`, ordered by class, follow the random
    order of the classes. Only where the table has no more classes than `ways` do they keep their sorted
    order: there every task has the same classes, and a label has a meaning.

    Rows without a target are left out.

    Arguments:
        ways: classes of a task (classification).
        shots, queries: rows of the support and of the query set, per class in classification.

    Raises UsageError for a task with too few rows or classes.
    """

    kind: Kind = "other"
    computed = False
    on_host = False

    def __init__(
        self,
        table: Table,
        *,
        shots: int,
        queries: int,
        ways: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.classification = not table.y.is_floating_point()
        if self.classification and ways is None:
            raise UsageError("a table of classes needs the number of classes of a task: give -n")
        self.ways = ways if self.classification else None
        self._drawn_groups = ways if self.classification and ways is not None else 1
        self.shots = shots
        self.queries = queries
        self.source = table.source
        self.split_names = {s: sorted(table.tasks[i] for i in p.tolist()) for s, p in table.splits.items()}
        self.device = torch.device(device)
        self.fixed_labels = len(table.classes) == self._drawn_groups

        # Rows are grouped by (task, class), or by task alone: a group is what examples are drawn from.
        classes = max(len(table.classes), 1)
        task = torch.arange(len(table.tasks)).repeat_interleave(table.count)
        group = task * classes + (table.y if self.classification else 0)
        rows = table.known.nonzero()[:, 0]
        rows = rows[group[rows].argsort(stable=True)]
        groups, count = group[rows].unique_consecutive(return_counts=True)
        self._names = table.tasks, table.classes
        self._groups = groups  # task * classes + class
        self._group_rows = count
        self._task_groups = torch.bincount(groups // classes, minlength=len(table.tasks))
        self._check()

        self.x = table.x[rows].to(self.device, dtype)
        self.y = None if self.classification else table.y[rows].to(self.device, dtype)
        for values in (self.x, self.y):
            if values is not None and not values.isfinite().all():
                raise UsageError(f"the table has numbers beyond the range of {dtype}: scale its columns")
        self.splits = {name: positions.to(self.device) for name, positions in table.splits.items()}
        self.groups = self._task_groups.to(self.device)  # [tasks], the number of groups of each
        self.first_group = self.groups.cumsum(0) - self.groups
        self.rows = count.to(self.device)  # [groups], the number of rows of each
        self.first_row = self.rows.cumsum(0) - self.rows
        self.most_groups = int(self._task_groups.max())
        self.most_rows = int(count.max())

    @property
    def examples(self) -> int:
        return self._drawn_groups * (self.shots + self.queries)

    def resized(self, shots: int) -> TableTasks:
        other = copy.copy(self)
        other.shots = shots
        other._check()
        return other

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        """A meta-batch: one index operation on the whole table."""
        stream = task_stream(split, seed, iteration, tasks, self.device)
        candidates = self.splits[split]
        if not len(candidates):
            raise UsageError(f"{self.source} has no {split} tasks: it needs some in every split")
        task = candidates[stream.at("task").words(1)[:, 0] * len(candidates) >> 32]  # a word is below 2^32

        classes = _distinct(
            stream.at("classes").words(self.most_groups), self.groups[task], self._drawn_groups
        )
        if self.fixed_labels:
            classes = classes.sort().values
        group = self.first_group[task][:, None] + classes  # [tasks, ways]
        words = (
            stream.at("rows")
            .words(self._drawn_groups * self.most_rows)
            .view(len(tasks), self._drawn_groups, -1)
        )
        drawn = _distinct(words, self.rows[group], self.queries + self.shots)
        query, support = (self.first_row[group][..., None] + drawn).split([self.queries, self.shots], -1)
        return TaskBatch(*self._examples(support), *self._examples(query))

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        """Return the first tasks as `sample` gives them."""
        return self.sample(split, seed, 0, range(tasks))

    def _examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of rows `[tasks, ways, examples]`."""
        tasks, ways, examples = rows.shape
        x = self.x[rows].flatten(1, 2)
        if self.y is not None:
            return x, self.y[rows].flatten(1, 2)
        labels = torch.arange(ways, device=rows.device).repeat_interleave(examples)
        return x, labels.expand(tasks, -1)

    def _check(self) -> None:
        """Every task has the classes, and every class the rows, that a task of this size takes."""
        task_names, class_names = self._names
        for task in (self._task_groups < self._drawn_groups).nonzero()[:1, 0].tolist():
            name, found = _quoted(task_names[task]), int(self._task_groups[task])
            if self.classification:
                raise UsageError(
                    f"-n {self.ways}, but task {name} has {found} classes: lower -n, or leave out the task"
                )
            raise UsageError(f"no row of task {name} has a target: leave out the task")
        needed = self.shots + self.queries
        for group in (self._group_rows < needed).nonzero()[:1, 0].tolist():
            task, label = divmod(int(self._groups[group]), max(len(class_names), 1))
            where = f"class {_quoted(class_names[label])} of " if self.classification else ""
            raise UsageError(
                f"-k {self.shots} plus -q {self.queries} is {needed}, but {where}task "
                f"{_quoted(task_names[task])} has {int(self._group_rows[group])} rows: lower -k or -q, or "
                "leave it out"
            )


def _distinct(words: Tensor, totals: Tensor, count: int) -> Tensor:
    """`count` different numbers below each total, in random order: `[..., count]`.

    Arguments:
        words: different random words `[..., at least the largest total]`; totals: `[...]`, at least `count`.
    """
    positions = torch.arange(words.shape[-1], device=words.device)
    ranked = words.masked_fill(positions >= totals[..., None], 1 << 32)  # above every word
    return ranked.topk(count, largest=False).indices  # sorted, so the order is that of the words

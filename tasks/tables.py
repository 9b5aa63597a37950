"""Read a user's table, a row for each example, and draw tasks from it: path -> `Table` -> `TableTasks`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.batch import TaskBatch, TaskDistribution
from common.errors import UsageError, one_line
from common.random import SPLITS, task_stream
from tasks.file_tasks import draw_distinct, with_labels
from tasks.splits import SPLIT_NAMES, as_positions, split_at_random


@dataclass(frozen=True)
class Columns:
    """The roles of a table's columns."""

    task: str | None = "task"  # None: all rows are one task
    targets: tuple[str, ...] = ("y",)
    inputs: tuple[str, ...] = ()  # empty: all other columns but "split"

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> Columns:
        """Return the roles that `task=NAME`, `target=NAME,...` and `input=NAME,...` name."""
        roles = dict(pair.split("=", 1) for pair in pairs)
        names = {role: tuple(map(str.strip, text.split(","))) for role, text in roles.items()}
        return cls(roles.get("task", "task"), names.get("target", ("y",)), names.get("input", ()))


@dataclass(frozen=True)
class Table:
    """The rows of a file, in its order."""

    x: Tensor  # float [rows, inputs]
    y: Tensor  # float [rows, targets], NaN where missing; in classification int64 [rows], -1 where missing
    task: Tensor  # int64 [rows], positions in `tasks`
    tasks: list[str]  # names, in order of first appearance
    classes: list[str]  # all classes, sorted, numbers as numbers; empty for regression
    splits: dict[str, Tensor]  # int64 positions of the tasks of each split, disjoint
    inputs: tuple[str, ...]  # names of the input columns, in order
    source: str  # for messages


def load_table(
    path: Path, columns: Columns, dtype: torch.dtype, *, classification: bool, shares: dict[str, int] | None
) -> Table:
    """Read a .csv, .csv.gz or .parquet file.

    The shares are those of each split where the file has no column "split". None is for prediction: targets
    may be missing, and without a task column all rows are one task.
    """
    if classification and len(columns.targets) > 1:
        raise UsageError(f"classification takes one target column, not {len(columns.targets)}: name one")
    data, prediction, classes = _read(path), shares is None, list[str]()
    if not data.num_rows:
        raise UsageError(f"{path} has a header, {data.column_names}, and no rows: add some")
    columns = _complete(columns, path, data.column_names, prediction=prediction)
    tasks, task = ["task"], torch.zeros(data.num_rows, dtype=torch.int64)
    if columns.task:
        tasks, task = _read_names(path, data, columns.task)
    if classification:
        classes, y = _sort_classes(*_read_names(path, data, *columns.targets, missing=prediction))
    else:
        y = _read_numbers(path, data, columns.targets, dtype, missing=prediction)
    x = _read_numbers(path, data, columns.inputs, dtype, missing=False)
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    if shares and "split" in {*data.column_names} - {*columns.inputs, *columns.targets, columns.task}:
        names, split = _read_names(path, data, "split")
        if unknown := {*names} - {*SPLIT_NAMES}:
            raise UsageError(f"{path}: a split is {min(unknown)!r}: it should be train, val or test")
        for s, t in torch.stack([split, task], 1).unique(dim=0).tolist():
            splits[SPLIT_NAMES[names[s]]].append(tasks[t])
    elif shares:
        splits = split_at_random(tasks, shares)
    positions = {split: part.sort().values for split, part in as_positions(splits, tasks, str(path)).items()}
    return Table(x, y, task, tasks, classes, positions, columns.inputs, str(path))


def _read(path: Path) -> Any:
    """Return a file as a pyarrow.Table; the columns of a CSV file are text, trimmed, null where missing."""
    import pyarrow as pa  # slow to import, and for tables alone
    from pyarrow import compute, csv, parquet

    if not path.exists():
        raise UsageError(f"{path}: there is no such file")
    try:
        if path.suffix.lower() == ".parquet":
            return parquet.read_table(path, partitioning=None)  # names of folders are no columns
        with pa.input_stream(path) as stream:  # unpacks .gz
            header = stream.read(1 << 16).partition(b"\n")[0]
        form = csv.ParseOptions(delimiter=max(",;\t", key=lambda mark: header.count(mark.encode())))
        with csv.open_csv(path, parse_options=form) as reader:
            types = dict.fromkeys(reader.schema.names, pa.string())
        options = csv.ConvertOptions(column_types=types)
        data, missing = csv.read_csv(path, None, form, options), pa.array(options.null_values)
        texts = [compute.utf8_trim_whitespace(column) for column in data.columns]
        texts = [compute.if_else(compute.is_in(text, missing), None, text) for text in texts]
        return pa.table(texts, [name.strip() for name in data.column_names])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{path} is not readable ({one_line(error)[:300]}): mend the file") from error


def _complete(columns: Columns, path: Path, header: list[str], *, prediction: bool) -> Columns:
    """Return the roles of a file's columns, the inputs by name; refuse missing and repeated columns."""
    task = None if prediction and columns.task not in header else columns.task
    roles = [*columns.targets, *([task] if task else [])]
    inputs = columns.inputs or tuple(name for name in header if name not in (*roles, "split"))
    for name in (*roles, *inputs):
        if name not in header:
            raise UsageError(f"{path} has no column {name!r}, but {header}: name yours with --columns")
        if header.count(name) > 1 or (*roles, *inputs).count(name) > 1:
            raise UsageError(f"{path}: column {name!r} is repeated, or has more than one role: leave one")
    if not inputs:
        raise UsageError(f"{path} has no input column, but {header}: add one")
    if not columns.inputs and {"", "__index_level_0__"} & {*inputs}:  # in CSV and in Parquet
        raise UsageError(f"{path} has pandas' index as a column: write it with index=False")
    return Columns(task, columns.targets, inputs)


def _cast(path: Path, data: Any, name: str, kind: str) -> Any:
    column, row = data.column(name), 1
    try:
        return column.cast(kind, safe=False).combine_chunks()
    except (ValueError, NotImplementedError) as error:  # pyarrow's, which name no row
        with suppress(type(error)):
            for cell in column:
                cell.cast(kind, safe=False)
                row += 1
        where = f"{path}: column {name!r}, data row {row}"
        raise UsageError(f"{where}: {one_line(error)}: mend it, or leave it out") from error


def _read_numbers(path: Path, data: Any, names: Iterable[str], dtype: torch.dtype, missing: bool) -> Tensor:
    """Return columns as `[rows, columns]`, NaN where a value may be missing."""
    columns = []
    for name in names:
        column = torch.tensor(_cast(path, data, name, "float64").to_numpy(zero_copy_only=False)).to(dtype)
        bad = column.isinf() if missing else ~column.isfinite()
        if bad.any():
            where = f"{path}: column {name!r}, data row {int(bad.nonzero()[0]) + 1}"
            raise UsageError(f"{where} is empty, infinite or too large for {dtype}: mend or leave it out")
        columns.append(column)
    return torch.stack(columns, 1)


def _read_names(path: Path, data: Any, name: str, *, missing: bool = False) -> tuple[list[str], Tensor]:
    """Return a column's names in order of appearance, and each row's int64 position, -1 where missing."""
    from pyarrow import compute

    texts = compute.utf8_trim_whitespace(_cast(path, data, name, "string"))
    encoded = compute.if_else(compute.equal(texts, ""), None, texts).dictionary_encode()
    row = encoded.is_null().index(True).as_py() + 1  # 0: none is missing
    if row and not missing:
        raise UsageError(f"{path}: column {name!r}, data row {row} is empty: fill it")
    positions = encoded.indices.fill_null(-1).cast("int64").to_numpy()
    return encoded.dictionary.to_pylist(), torch.tensor(positions)


def _sort_classes(names: list[str], labels: Tensor) -> tuple[list[str], Tensor]:
    """Return the classes in sorted order, numbers by their size, and the labels that go with it."""
    try:
        classes = sorted(names, key=float)
    except ValueError:
        classes = sorted(names)
    position = torch.tensor([*map(classes.index, names), -1])  # the last is that of -1, the missing class
    return classes, position[labels]


@dataclass(eq=False, kw_only=True)
class TableTasks(TaskDistribution):
    """Tasks drawn, with replacement, from a table; UsageError for a task with too few rows or classes.

    Rows of a task are drawn without replacement; the query does not depend on the number of shots. Inputs are
    `[tasks, examples, inputs]`, targets `[tasks, examples, targets]`. With `ways`, a task draws that many of
    its classes, then rows of each. Labels, int64 `[tasks, ways * examples]`, number the drawn classes at
    random, or in sorted order if the table has no other classes.
    """

    table: Table
    ways: int | None
    shots: int
    queries: int
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        # Rows are grouped by (task, class), or by task alone. Examples are drawn from a group.
        table, classes = self.table, max(len(self.table.classes), 1)
        group = table.task * classes + (table.y if self.classification else 0)
        order = group.argsort(stable=True)
        numbers, rows = group[order].unique_consecutive(return_counts=True)
        groups = torch.bincount(numbers // classes)
        task, label = divmod(int(numbers[rows.argmin()]), classes)
        where = f"{table.source}: task {table.tasks[task]!r}"
        if self.ways and groups.min() < self.ways:
            where = f"{table.source}: task {table.tasks[int(groups.argmin())]!r}"
            raise UsageError(f"{where} has {groups.min()} classes: lower -n, {self.ways}, or leave it out")
        if rows.min() < (needed := self.shots + self.queries):
            where += f", class {table.classes[label]!r}," if self.classification else ""
            raise UsageError(f"{where} has {rows.min()} rows: lower -k plus -q, {needed}, or leave it out")
        self.x = table.x[order].to(self.device, self.dtype)
        self.y = None if self.classification else table.y[order].to(self.device, self.dtype)
        self.splits = {split: positions.to(self.device) for split, positions in table.splits.items()}
        self.groups = groups.to(self.device)  # [tasks], the number of groups of each
        self.first_group = self.groups.cumsum(0) - self.groups
        self.rows = rows.to(self.device)  # [groups], the number of rows of each
        self.first_row = self.rows.cumsum(0) - self.rows
        self.most_groups, self.most_rows = int(groups.max()), int(rows.max())

    @property
    def split_names(self) -> dict[str, list[str]]:
        names, splits = self.table.tasks, self.table.splits.items()
        parts = {split: sorted(names[i] for i in part.tolist()) for split, part in splits}
        return parts | {"input": list(self.table.inputs)}

    def resized(self, shots: int) -> TableTasks:
        return replace(self, shots=shots)

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        candidates = self.splits[split]
        if not len(candidates):
            raise UsageError(f"{self.table.source} has no {split} tasks: it needs some in every split")
        task = candidates[stream.at("task").words(1)[:, 0] * len(candidates) >> 32]  # a word is below 2^32
        ways = self.ways or 1
        classes = draw_distinct(stream.at("classes").words(self.most_groups), self.groups[task], ways)
        if len(self.table.classes) == ways:
            classes = classes.sort().values
        group = self.first_group[task][:, None] + classes  # [tasks, ways]
        words = stream.at("rows").words(ways * self.most_rows).view(len(tasks), ways, -1)
        drawn = draw_distinct(words, self.rows[group], self.queries + self.shots)
        query, support = (self.first_row[group][..., None] + drawn).split([self.queries, self.shots], -1)
        return TaskBatch(*self._examples(support), *self._examples(query))

    def _examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of rows `[tasks, ways, examples]`."""
        x, labels = with_labels(self.x[rows])
        return x, labels if self.y is None else self.y[rows].flatten(1, 2)

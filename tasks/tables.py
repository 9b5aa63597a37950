"""Read a user's table, a row for each example, and draw tasks from it: path -> `Table` -> `TableTasks`.

A task is the rows of one name in the task column. With `--columns class=NAME` the classes are the material
instead: they are split, and a task draws some of one split's classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from common.batch import TABLE, DataRecord, TaskBatch, TaskDistribution
from common.errors import UsageError
from common.random import SPLITS, task_stream
from common.sizes import Size
from tasks.drawn_sizes import DrawnSizes
from tasks.file_tasks import say_too_few
from tasks.options import parse_roles
from tasks.scales import Scales, apply_scale, measure_scale
from tasks.splits import PLAIN_WORDS, as_positions, check_disjoint, split_at_random
from tasks.table_files import TableFile

LIKE_SPLIT = ("split", "splits", "subset", "fold", "folds", "partition")  # no inputs, unless they are named


@dataclass(frozen=True)
class Columns:
    """The roles of a table's columns."""

    task: str | None = "task"  # None: all rows are one task
    targets: tuple[str, ...] = ("y",)
    inputs: tuple[str, ...] = ()  # empty: all other columns but "split"
    _: KW_ONLY
    excluded: tuple[str, ...] = ()
    by_class: bool = False  # the target's classes are split and drawn; there is no task column

    @classmethod
    def parse(cls, pairs: Iterable[str], excluded: str | None = None) -> Columns:
        """Return the roles that the flags --columns and --exclude-columns give."""
        roles = parse_roles(pairs)
        left_out = tuple(map(str.strip, excluded.split(","))) if excluded else ()
        inputs = roles.get("input", ())
        if "class" in roles:
            return cls(None, roles["class"], inputs, excluded=left_out, by_class=True)
        (task,) = roles.get("task", ("task",))
        return cls(task, roles.get("target", ("y",)), inputs, excluded=left_out)


@dataclass(frozen=True)
class Table:
    """The rows of a file that have a target, in its order; for prediction, all rows."""

    x: Tensor  # float64 [rows, inputs]
    y: Tensor  # float64 [rows, targets], NaN where missing; in classification int64 [rows], -1 where missing
    task: Tensor  # int64 [rows], positions in `tasks`
    tasks: list[str]  # names, in order of first appearance; with `by_class`, the splits
    classes: list[str]  # all classes, sorted, numbers as numbers; empty for regression
    splits: dict[str, Tensor]  # int64 positions of the tasks of each split, disjoint
    split_names: dict[str, list[str]]  # names of each split's tasks, or classes, sorted
    inputs: tuple[str, ...]  # names of the input columns, in order
    source: str  # for messages
    by_class: bool = False
    left_out: dict[str, int] = field(default_factory=dict)  # what was left out, in words -> how many

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.x, self.y, self.task):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def measure_scales(self, *, targets: bool) -> dict[str, Tensor]:
        """Return means and deviations over the rows of training tasks; nothing if there are none."""
        rows = torch.isin(self.task, self.splits["train"])
        if not rows.any():
            return {}
        target = {"target": measure_scale(self.y[rows])} if targets and not self.classes else {}
        return {"input": measure_scale(self.x[rows]), **target}


def load_table(
    path: Path,
    columns: Columns,
    dtype: torch.dtype,
    *,
    classification: bool,
    shares: dict[str, int] | None,
    min_examples: int = 0,
    min_classes: int = 1,
) -> Table:
    """Read a .csv, .csv.gz or .parquet file.

    Args:
        dtype: numbers must be finite in it.
        shares: of each split where the file has no column "split". None is for prediction: targets may be
            missing, and without a task column all rows are one task.
        min_examples, min_classes: leave out tasks, and in classification classes, with fewer rows or classes.
    """
    file, prediction = TableFile.open(path), shares is None
    header = file.data.column_names
    if not file.data.num_rows:
        raise UsageError(f"{path} has a header, {header}, and no rows: add some")
    columns = _complete(columns, path, header, prediction=prediction, classification=classification)
    classes, y, has_target = _read_targets(file, columns, dtype, classification)
    keep = torch.ones_like(has_target) if prediction else has_target.clone()
    x = file.numbers(columns.inputs, () if classification else columns.targets)
    file.check_finite(columns.inputs, x, keep, dtype)
    tasks, task = ["task"], torch.zeros_like(keep, dtype=torch.int64)
    if columns.task:
        tasks, task = file.names(columns.task, keep)
    by_class = columns.by_class and not prediction
    if by_class:
        tasks, task = classes, y
    if not keep.any():
        raise UsageError(f"{path}: column {', '.join(columns.targets)}: no row has a target: fill it")
    left_out = {"rows without a target": int((~keep).sum())}
    if min_examples and not prediction:
        left_out |= _leave_out_small(task, y if classification else None, keep, min_examples, min_classes)
    if not keep.any():
        raise UsageError(f"{path}: --min-examples {min_examples} leaves no rows: lower it")
    tasks, task = _drop_unused(tasks, task[keep])
    y, inputs = y[keep], columns.inputs
    if classification and not prediction:
        classes, y = _drop_unused(classes, y)
    splits = _split(file, columns, tasks, task, keep, shares) if shares else {}
    positions = {split: part.sort().values for split, part in as_positions(splits, tasks).items()}
    names = {split: sorted(part) for split, part in splits.items()}
    if by_class:
        tasks, task, positions = _tasks_of_splits(positions, y)
    return Table(x[keep], y, task, tasks, classes, positions, names, inputs, str(path), by_class, left_out)


def _tasks_of_splits(classes: dict[str, Tensor], y: Tensor) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    """Return a task for each split that has classes: names, each row's position, those of the splits."""
    tasks = [split for split in SPLITS if len(classes[split])]
    task = torch.stack([torch.isin(y, classes[split]) for split in tasks]).int().argmax(0)
    one = {split: [number] for number, split in enumerate(tasks)}
    return tasks, task, {split: torch.tensor(one.get(split, []), dtype=torch.int64) for split in SPLITS}


def _read_targets(
    file: TableFile, columns: Columns, dtype: torch.dtype, classification: bool
) -> tuple[list[str], Tensor, Tensor]:
    """Return the classes, the targets or labels, and which rows have one."""
    names = columns.targets
    if classification:
        if len(names) > 1:
            raise UsageError(f"classification takes one target column, not {len(names)}: name one")
        classes, y = sort_classes(*file.names(names[0]))
        has_target = y >= 0
    else:
        classes, y = [], file.numbers(names, columns.inputs)
        has_target = ~y.isnan().any(1)
        file.check_finite(names, y, has_target, dtype)
    return classes, y, has_target


def _leave_out_small(task: Tensor, y: Tensor | None, keep: Tensor, rows: int, classes: int) -> dict[str, int]:
    """Unmark rows of tasks, or of their classes, with fewer rows, and of tasks with fewer such classes.

    Returns what was left out, in words, and how many.
    """
    group = task if y is None else task * (int(y.max()) + 1) + y
    small = keep & (torch.bincount(group[keep], minlength=int(group.max()) + 1)[group.clamp(min=0)] < rows)
    what = "tasks" if y is None else "classes"
    left_out = {f"{what} with fewer than {rows} rows": len(group[small].unique())}
    keep &= ~small
    if y is not None and not torch.equal(task, y):  # the classes are those of tasks
        of_groups = torch.stack([task[keep], y[keep]], 1).unique(dim=0)[:, 0]
        few = keep & (torch.bincount(of_groups, minlength=int(task.max()) + 1)[task.clamp(min=0)] < classes)
        left_out[f"tasks with fewer than {classes} classes of them"] = len(task[few].unique())
        keep &= ~few
    return left_out


def _drop_unused(names: list[str], positions: Tensor) -> tuple[list[str], Tensor]:
    """Return the names that have rows, in their order, and the rows' new positions."""
    used, positions = positions.unique(return_inverse=True)
    return [names[position] for position in used.tolist()], positions


def _split(
    file: TableFile, columns: Columns, tasks: list[str], task: Tensor, keep: Tensor, shares: dict[str, int]
) -> dict[str, list[str]]:
    """Return the names of each split: as the column "split" says, or at random."""
    if "split" not in {*file.data.column_names} - {*columns.inputs, *columns.targets, columns.task}:
        return split_at_random(tasks, shares)
    names, split = file.names("split", keep)
    split_names = {name: PLAIN_WORDS[name.lower()] for name in names if name.lower() in PLAIN_WORDS}
    if unknown := {*names} - split_names.keys():
        raise UsageError(f"{file.path}: a split is {min(unknown)!r}: it should be train, val or test")
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    pairs = torch.stack([split[keep], task], 1).unique(dim=0).tolist()
    for name, t in dict.fromkeys((split_names[names[s]], t) for s, t in pairs):
        splits[name].append(tasks[t])
    check_disjoint(splits, str(file.path))
    return splits


def _complete(
    columns: Columns, path: Path, header: list[str], *, prediction: bool, classification: bool
) -> Columns:
    """Return the roles of a file's columns, the inputs by name; refuse missing and repeated columns."""
    task = None if prediction and columns.task not in header else columns.task
    roles = [*columns.targets, *([task] if task else [])]
    if not prediction and (unknown := [name for name in columns.excluded if name not in header]):
        raise UsageError(f"{path} has no column {unknown[0]!r} to exclude, but {header}")
    others = tuple(name for name in header if name not in (*roles, "split", *columns.excluded))
    inputs = columns.inputs or others
    for name in (*roles, *inputs):
        if name not in header:
            way = ", or class=NAME if tasks are to be made of its classes"
            way = f"name yours with --columns{way * (classification and name == task)}"
            raise UsageError(f"{path} has no column {name!r}, but {header}: {way}")
        if header.count(name) > 1 or (*roles, *inputs).count(name) > 1:
            raise UsageError(f"{path}: column {name!r} is repeated, or has more than one role: leave one")
        if name in columns.excluded:
            raise UsageError(f"{path}: column {name!r} has a role and is excluded: leave one")
    if not inputs:
        raise UsageError(f"{path} has no input column, but {header}: add one")
    if not columns.inputs and {"", "Unnamed: 0", "__index_level_0__"} & {*inputs}:
        way = "write pandas' tables with index=False, and no separator at the ends of lines"
        raise UsageError(f"{path} has pandas' index, or another column without a name, as an input: {way}")
    if not columns.inputs and (suspects := [name for name in inputs if name.lower() in LIKE_SPLIT]):
        way = "call it split, with train, val and test in it, or leave it out with --exclude-columns"
        raise UsageError(f"{path}: column {suspects[0]!r} looks like a split: {way}")
    return replace(columns, task=task, inputs=inputs)


def sort_classes(names: list[str], labels: Tensor) -> tuple[list[str], Tensor]:
    """Return the classes in sorted order, numbers by their size, and the labels that go with it."""
    try:
        classes = sorted(names, key=float)
    except ValueError:
        classes = sorted(names)
    places = {name: place for place, name in enumerate(classes)}
    position = torch.tensor([*map(places.get, names), -1])  # the last is that of -1, the missing class
    return classes, position[labels]


@dataclass(eq=False, kw_only=True)
class TableTasks(TaskDistribution):
    """Tasks drawn, with replacement, from a table; UsageError for a task with too few rows or classes.

    Inputs and targets are standardised by `scales` (tasks/scales.py). Rows of a task are drawn without
    replacement; the query does not depend on the number of shots. Inputs are `[tasks, examples, inputs]`,
    targets `[tasks, examples, targets]`. With `ways`, a task draws that many of its classes, then rows of
    each. Labels, int64 `[tasks, examples]`, number the drawn classes at random, or in sorted order if the
    table has no other classes.
    """

    table: Table
    ways: Size | None
    shots: Size
    queries: Size
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    scales: Scales = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = DrawnSizes.of(self.ways, self.shots, self.queries)
        # Rows are grouped by (task, class), or by task alone. Examples are drawn from a group.
        table, classes = self.table, max(len(self.table.classes), 1)
        group = table.task * classes + (table.y if self.classification else 0)
        order = group.argsort(stable=True)
        numbers, rows = group[order].unique_consecutive(return_counts=True)
        groups = torch.bincount(numbers // classes)
        self._check_sizes(numbers, rows, groups)
        self.x = self._scale("input", table.x[order])
        self.y = None if self.classification else self._scale("target", table.y[order])
        self.splits = {split: positions.to(self.device) for split, positions in table.splits.items()}
        self.groups = groups.to(self.device)  # [tasks], the number of groups of each
        self.first_group = self.groups.cumsum(0) - self.groups
        self.rows = rows.to(self.device)  # [groups], the number of rows of each
        self.first_row = self.rows.cumsum(0) - self.rows
        self.most_groups, self.most_rows = int(groups.max()), int(rows.max())

    def _check_sizes(self, numbers: Tensor, rows: Tensor, groups: Tensor) -> None:
        """Raise UsageError, with their number, if tasks have too few classes or groups too few rows."""
        table, needed, ways = self.table, self.sizes.needed, self.sizes.ways.least
        task = "" if table.by_class else "task "
        if groups.min() < ways:
            name, few = table.tasks[int(groups.argmin())], say_too_few(groups, ways, "classes", "-n")
            way = "share classes otherwise, by --split-shares" if table.by_class else "leave those out"
            raise UsageError(f"{table.source}: {task}{name!r} has {few}: lower -n, or {way}")
        if rows.min() < needed:
            number, label = divmod(int(numbers[rows.argmin()]), max(len(table.classes), 1))
            least = [] if table.by_class else [f"task {table.tasks[number]!r}"]
            least += [f"class {table.classes[label]!r}"] if table.classes else []
            few = say_too_few(rows, needed, "rows", "-k plus -q")
            instead = f"leave those out with --min-examples {needed}"
            if rows.max() < needed:
                instead = "leave -n out if the targets are numbers" * bool(table.classes)
            way = f"lower them{', or ' * bool(instead)}{instead}"
            raise UsageError(f"{table.source}: {', '.join(least)} has {few}: {way}")

    def _scale(self, part: str, values: Tensor) -> Tensor:
        """Return inputs or targets as tasks have them, on the device."""
        source = self.table.source
        scaled = apply_scale(values, self.scales, part, source).to(self.dtype)
        if not scaled.isfinite().all():
            problem = f"an {part} is too large for {self.dtype}, standardised or not"
            raise UsageError(f"{source}: {problem}: mend it")
        return scaled.to(self.device)

    @property
    def record(self) -> DataRecord:
        table = self.table
        return DataRecord(table.split_names, list(table.inputs), fingerprint={TABLE: [table.digest]})

    @property
    def summary(self) -> list[str]:
        table = self.table
        sizes = ", ".join(f"{len(table.split_names[split]):,} {split}" for split in SPLITS)
        lines = [f"{len(table.x):,} rows; {'classes' if table.by_class else 'tasks'}: {sizes}"]
        lines.append(f"inputs: {shorten(', '.join(table.inputs), 100)}")  # where a row number would show
        if left_out := [f"{count:,} {words}" for words, count in table.left_out.items() if count]:
            lines.append(f"left out: {', '.join(left_out)}")
        if self.scales:
            target = self.scales.get("target")
            what = "inputs" if target is None else "inputs and targets"
            lines.append(f"{what} standardised by the mean and deviation of the training rows")
            if target is not None:
                mean, deviation = target[:, 0].tolist()
                lines[-1] += f" (the first target's: {mean:.4g} and {deviation:.4g})"
            constant = int((self.scales["input"][1] == 1).logical_and((table.x == table.x[:1]).all(0)).sum())
            lines += [f"{constant} constant inputs, which tell nothing"] if constant else []
        return lines

    def with_scales(self, scales: Scales) -> TableTasks:
        return replace(self, scales=scales)

    def resized(self, shots: Size) -> TableTasks:
        return replace(self, shots=shots)

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        candidates = self.splits[split]
        if not len(candidates):
            what = "classes" if self.table.by_class else "tasks"
            raise UsageError(f"{self.table.source} has no {split} {what}: it needs some in every split")
        task = candidates[stream.at("task").words(1)[:, 0] * len(candidates) >> 32]  # a word is below 2^32
        words, groups, sizes = stream.at("classes").words(self.most_groups), self.groups[task], self.sizes
        classes = sizes.draw(words, groups, sizes.ways.most)  # [tasks, ways]
        if [len(self.table.classes)] * 2 == [*sizes.ways] and not self.table.by_class:
            classes = classes.sort().values
        group = self.first_group[task][:, None] + classes
        words = stream.at("rows").words(classes.shape[1] * self.most_rows).view(*classes.shape, -1)
        totals = self.rows[group]
        rows = self.first_row[group][..., None] + sizes.draw_examples(words, totals)
        support, query, ways = sizes.divide(stream, rows, totals, groups, query_first=True)
        parts: dict[str, Tensor | None] = {}
        for name, part in (("support", support), ("query", query)):
            y = part.labels if self.y is None else self.y[part.drawn]
            parts |= {f"{name}_x": self.x[part.drawn], f"{name}_y": y, f"{name}_mask": part.mask}
        return TaskBatch(**parts, ways=ways)

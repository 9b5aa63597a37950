"""Draw tasks from a table. The rows lie on the device, and a batch is one index operation."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from common.batch import TaskBatch, TaskDistribution
from common.errors import UsageError
from common.random import task_stream
from tasks.tables import Table


@dataclass(eq=False, kw_only=True)
class TableTasks(TaskDistribution):
    """Tasks drawn, with replacement, from those of a table.

    Support and query rows of a task are drawn without replacement and never meet; the query does not depend
    on the number of shots. Inputs `[tasks, examples, inputs]` are the file's. Rows without a target are left
    out.

    Regression: targets `[tasks, examples, targets]`.
    Classification: a task draws `ways` of its classes and then rows of each. Labels, int64
    `[tasks, ways * examples]`, are ordered by class and follow the random order of the classes. Only where
    the table has no more classes than `ways` do they keep their sorted order: there a label has a meaning.

    Args:
        ways: classes of a task; None in regression.
        shots, queries: rows of the support and of the query set, per class in classification.

    Raises UsageError for a task with too few rows or classes.
    """

    table: Table
    ways: int | None
    shots: int
    queries: int
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        table = self.table
        # Rows are grouped by (task, class), or by task alone. Examples are drawn from a group.
        classes = max(len(table.classes), 1)
        task = torch.arange(len(table.tasks)).repeat_interleave(table.count)
        group = task * classes + (table.y if self.classification else 0)
        known = table.known.nonzero()[:, 0]
        known = known[group[known].argsort(stable=True)]
        self.group_numbers, rows = group[known].unique_consecutive(return_counts=True)
        groups = torch.bincount(self.group_numbers // classes, minlength=len(table.tasks))
        self._groups_and_rows = groups, rows
        self._check_sizes()
        self.x = table.x[known].to(self.device, self.dtype)
        self.y = None if self.classification else table.y[known].to(self.device, self.dtype)
        for values in (self.x, self.y):
            if values is not None and not values.isfinite().all():
                raise UsageError(f"the table has numbers beyond the range of {self.dtype}: scale its columns")
        self.splits = {split: positions.to(self.device) for split, positions in table.splits.items()}
        self.groups = groups.to(self.device)  # [tasks], the number of groups of each
        self.first_group = self.groups.cumsum(0) - self.groups
        self.rows = rows.to(self.device)  # [groups], the number of rows of each
        self.first_row = self.rows.cumsum(0) - self.rows
        self.most_groups, self.most_rows = int(groups.max()), int(rows.max())

    @property
    def examples(self) -> int:
        return (self.ways or 1) * (self.shots + self.queries)

    @property
    def split_names(self) -> dict[str, list[str]]:
        names = self.table.tasks
        return {split: sorted(names[i] for i in part.tolist()) for split, part in self.table.splits.items()}

    def resized(self, shots: int) -> TableTasks:
        other = copy.copy(self)
        other.shots = shots
        other._check_sizes()
        return other

    def sample(self, split: str, seed: int, iteration: int | Tensor, tasks: range) -> TaskBatch:
        stream = task_stream(split, seed, iteration, tasks, self.device)
        candidates = self.splits[split]
        if not len(candidates):
            raise UsageError(f"{self.table.source} has no {split} tasks: it needs some in every split")
        task = candidates[stream.at("task").words(1)[:, 0] * len(candidates) >> 32]  # a word is below 2^32
        ways = self.ways or 1
        classes = _draw_distinct(stream.at("classes").words(self.most_groups), self.groups[task], ways)
        if len(self.table.classes) == ways:
            classes = classes.sort().values
        group = self.first_group[task][:, None] + classes  # [tasks, ways]
        words = stream.at("rows").words(ways * self.most_rows).view(len(tasks), ways, -1)
        drawn = _draw_distinct(words, self.rows[group], self.queries + self.shots)
        query, support = (self.first_row[group][..., None] + drawn).split([self.queries, self.shots], -1)
        return TaskBatch(*self._examples(support), *self._examples(query))

    def _examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of rows `[tasks, ways, examples]`."""
        tasks, ways, examples = rows.shape
        x = self.x[rows].flatten(1, 2)
        if self.y is not None:
            return x, self.y[rows].flatten(1, 2)
        labels = torch.arange(ways, device=rows.device).repeat_interleave(examples)
        return x, labels.expand(tasks, -1)

    def _check_sizes(self) -> None:
        """Refuse a task with fewer classes, and a class with fewer rows, than a task of this size takes."""
        groups, rows = self._groups_and_rows
        names, classes = self.table.tasks, self.table.classes
        for task in (groups < (self.ways or 1)).nonzero()[:1, 0].tolist():
            if not self.classification:
                raise UsageError(f"no row of task {names[task]!r} has a target: leave out the task")
            raise UsageError(
                f"-n {self.ways}, but task {names[task]!r} has {groups[task]} classes: lower -n, or leave "
                "it out"
            )
        needed = self.shots + self.queries
        for group in (rows < needed).nonzero()[:1, 0].tolist():
            task, label = divmod(int(self.group_numbers[group]), max(len(classes), 1))
            where = f"class {classes[label]!r} of " if self.classification else ""
            raise UsageError(
                f"-k {self.shots} plus -q {self.queries} is {needed}, but {where}task {names[task]!r} has "
                f"{rows[group]} rows: lower -k or -q, or leave it out"
            )


def _draw_distinct(words: Tensor, totals: Tensor, count: int) -> Tensor:
    """Return `count` different numbers below each total, in random order: `[..., count]`.

    Args:
        words: different random words `[..., at least the largest total]`.
        totals: `[...]`, at least `count` each.
    """
    positions = torch.arange(words.shape[-1], device=words.device)
    ranked = words.masked_fill(positions >= totals[..., None], 1 << 32)  # above every word
    return ranked.topk(count, largest=False).indices  # sorted, so the order is that of the words

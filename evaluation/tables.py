"""Results and learning of one run or many, by setting, as tables for the terminal and records for files.

Runs of one setting differ in their seed alone. The spread over seeds (lowest to highest) and the interval
over test tasks are two different things, and are reported apart. All JSON and CSV files are written here.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_bytes
from evaluation.meta_test import Evaluation, mean_and_interval

ALL = "all"  # name of the only setting
MEAN = "mean over data sets"
WITHOUT = "without them"  # heading of the means without diverged tasks
MOST_COLUMNS = 3  # settings that a table has as columns; more are rows
MOST_SIZES = 8  # rows of a table by size; more sizes are put together
Units = tuple[str, float, int]  # of a measure in tables: its name, the factor of its numbers, their digits
FURTHER: dict[str, Units] = {  # of measures alongside the loss
    "mse": ("MSE of the mean", 1, 4),
    "coverage_50": ("% in the 50 % band", 100, 1),
    "coverage_90": ("% in the 90 % band", 100, 1),
}
WHOLE, LARGE = 1e3, 1e6  # from which on a number has no decimals, and is a power of ten
Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def write_json(path: Path, record: Mapping[str, Any], digits: int = 7) -> None:
    """Write a record as JSON, whole or not at all."""
    write_bytes(path, (json.dumps(plain_values(record, digits), indent=1) + "\n").encode())


def plain_values(value: Any, digits: int = 7) -> Any:
    """Return a value as JSON has it: tensors as lists, numbers with these digits, non-finite ones as null."""
    if isinstance(value, Tensor):
        return plain_values(value.tolist(), digits)
    if isinstance(value, Mapping):
        return {str(key): plain_values(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows of cells as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_bytes(path, text.getvalue().encode())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return right-aligned columns as text, their "±" below each other.

    Columns without any text below their heading are left out.
    """
    filled = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    columns = [(heading, *_align(cells)) for heading, *cells in filled]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def _align(cells: Sequence[str]) -> list[str]:
    parts = [cell.partition(" ± ") for cell in cells]
    before, after = (max(len(part[side]) for part in parts) for side in (0, 2))
    words = any(" " in rest for *_, rest in parts)
    ends = (rest.ljust(after) if words else rest.rjust(after) for *_, rest in parts)
    return [
        f"{mean:>{before}}{mark or ' ' * (3 if after else 0)}{end}"
        for (mean, mark, _), end in zip(parts, ends, strict=True)
    ]


@dataclass(frozen=True)
class Caption:
    """Words of tables and figures about results."""

    title: str
    loss_name: str
    trained_steps: int | None  # None: several runs that were trained for different numbers
    test_steps: tuple[int, ...]  # whose results are quoted: of several runs, each has one of them

    @property
    def title_of_examples(self) -> str:
        return self.title.rpartition(", ")[0]  # without the number of tasks

    @property
    def marks(self) -> dict[int, str]:
        """Return words for the numbers of steps that matter."""
        if self.test_steps == (self.trained_steps,):
            return {self.test_steps[0]: "trained for, the result"}
        trained = {} if self.trained_steps is None else {self.trained_steps: "trained for"}
        return {step: "the result" for step in self.test_steps if not self.test_steps[1:]} | trained


def choose_units(measure: str) -> Units:
    """Return how a table shows "accuracy" or a loss."""
    return ("accuracy %", 100, 2) if measure == "accuracy" else (measure, 1, 4)


def format_decimal(value: float, digits: int, sign: str = "") -> str:
    """Return a number for people: with these decimals, without any from 1,000 on; `4.6e33`; `not finite`."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= LARGE:
        mantissa, exponent = f"{value:{sign}.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:{sign},.{digits if abs(value) < WHOLE else 0}f}"


def after_steps(steps: int) -> str:
    """Return "after 1 step", "after 2 steps", ..."""
    return f"after {steps} step{'s' * (steps != 1)}"


@dataclass(frozen=True)
class Spread:
    """One number over several runs; NaN where it is NaN in one of them."""

    runs: int
    mean: float
    standard_deviation: float | None
    lowest: float
    highest: float

    @classmethod
    def over(cls, values: Sequence[float] | Tensor) -> Spread:
        """Return the spread of these values, of which there is at least one."""
        v = torch.as_tensor(values, dtype=torch.float64)
        deviation = v.std().item() if len(v) > 1 and v.isfinite().all() else None
        return cls(len(v), v.mean().item(), deviation, v.min().item(), v.max().item())

    def text(self, scale: float, digits: int, interval: float | None = None, sign: str = "") -> str:
        """Return `mean ± interval (lowest to highest)`, the latter for several runs."""
        mean, *ends = (
            format_decimal(scale * v, digits, sign) for v in (self.mean, self.lowest, self.highest)
        )
        if interval is not None and math.isfinite(interval):
            mean += f" ± {format_decimal(scale * interval, digits)}"
        return mean + f" ({' to '.join(ends)})" * (self.runs > 1)


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers of one run behind table and picture, and the values of each task behind them."""
    titles = {name: evaluation.measure if name == "metric" else name for name in evaluation.measures}
    per_step: list[dict[str, Any]] = []
    for norm, losses in evaluation.losses.items():
        diverged, tasks = evaluation.find_diverged(norm), len(losses)
        ordered = losses.sort(0).values  # NaN last
        numbers = {"diverged_tasks": diverged.sum(0)}
        numbers["loss_median"] = ordered[(tasks - 1) // 2 : tasks // 2 + 1].mean(0)
        numbers["loss_without_worst_percent"] = ordered[: math.ceil(0.99 * tasks)].mean(0)
        if evaluation.quoted != "loss":
            numbers["undefined_tasks"] = evaluation.measured(norm).isnan().sum(0)
        measures = {"loss": (losses, None), "loss_without_diverged": (losses, ~diverged)}
        for name, title in titles.items():
            if name != "loss":
                values = evaluation.measures[name][norm]
                measures[title] = values, ~values.isnan() if name in ("accuracy", "metric") else None
        for title, (values, mask) in measures.items():
            numbers[title], numbers[f"{title}_interval_95"] = mean_and_interval(values, mask)
        for step in range(losses.shape[1]):
            row = {key: values[step].item() for key, values in numbers.items()}
            per_step.append({"normalisation": norm, "steps": step} | row)
    per_task = {titles[name]: evaluation.measures[name] for name in (evaluation.quoted, *titles)}
    record: dict[str, Any] = {"per_step": per_step, "per_task": per_task}
    if evaluation.sizes:
        record["sizes"] = evaluation.sizes  # of each task
    if evaluation.parts:
        record["by_dataset"] = {name: evaluation_record(part) for name, part in evaluation.parts.items()}
    return record


@dataclass(frozen=True)
class StepResults:
    """Results of the runs of one setting, with one normalisation, after 0, 1, ... inner steps.

    An interval belongs to the mean over the runs: it is computed from each task's mean over them.
    """

    means: Tensor  # [steps + 1, runs], over all tasks, or those for which the measure is defined
    intervals: Tensor  # [steps + 1], half widths over tasks
    diverged: list[int]  # [steps + 1], tasks of all runs
    kept_means: Tensor  # [steps + 1, runs], over the tasks that have not diverged; accuracies keep all
    kept_mean: Tensor  # [steps + 1], over tasks: each one's mean over the runs in which it has not diverged
    kept_intervals: Tensor  # [steps + 1], half widths over tasks, of `kept_mean`
    others: dict[str, Tensor]  # [steps + 1], means of the other measures over tasks and runs, by name
    undefined: list[int]  # [steps + 1], tasks of all runs for which the measure is undefined
    tasks: int
    measured: str  # "accuracy", "loss", or the metric's name
    more_is_better: bool

    @classmethod
    def over(
        cls, evaluations: Sequence[Evaluation], norm: str, tasks: Tensor | slice = slice(None)
    ) -> StepResults:
        """Return the results of runs that were measured on the same tasks, or on some of these tasks."""

        def stack(name: str) -> Tensor:
            return torch.stack([e.measures[name][norm][tasks] for e in evaluations])

        first = evaluations[0]
        measured, is_loss = stack(first.quoted), first.quoted == "loss"  # [runs, tasks, steps + 1]
        diverged = torch.stack([e.find_diverged(norm)[tasks] for e in evaluations])
        undefined = measured.isnan() & (not is_loss)
        mean = Tensor.mean if is_loss else Tensor.nanmean
        valid = ~diverged if is_loss else measured.isfinite()  # a metric is infinite where outputs overflow
        of_tasks = measured.where(valid, 0).sum(0) / valid.sum(0)  # NaN where a task diverged in all runs
        kept_mean, kept_intervals = mean_and_interval(of_tasks, valid.any(0))
        kept_means = (measured.where(valid, 0).sum(1) / valid.sum(1)).T
        others = {name: stack(name) for name in first.measures if name != first.quoted}
        return cls(
            means=mean(measured, 1).T,
            intervals=mean_and_interval(mean(measured, 0), ~undefined.all(0))[1],
            diverged=diverged.sum((0, 1)).tolist(),
            kept_means=kept_means,
            kept_mean=kept_mean,
            kept_intervals=kept_intervals,
            others={
                name: (values.nanmean(1) if name == "accuracy" else values.mean(1)).mean(0)
                for name, values in others.items()
            },
            undefined=undefined.sum((0, 1)).tolist(),
            tasks=measured.shape[1],
            measured=first.measure,
            more_is_better=first.more_is_better,
        )

    @property
    def is_loss(self) -> bool:
        return self.measured == "loss"

    def measure(self, loss_name: str) -> str:
        """Return the name of the measure for people."""
        return loss_name if self.is_loss else self.measured

    def cells(self, step: int, scale: float, digits: int) -> dict[str, str]:
        """Return the result after a step as text, by heading; "" beyond the last.

        The mean over all tasks comes first; then how many diverged and, of losses, the mean without them.
        """
        if step >= len(self.means):
            return dict.fromkeys(("", "undefined", "diverged", WITHOUT), "")
        without = Spread.over([self.kept_mean[step].item()]).text(1, digits, self.kept_intervals[step].item())
        over_tasks, diverged = self.intervals[step].item() if self.tasks > 1 else None, self.diverged[step]
        return {
            "": Spread.over(self.means[step]).text(scale, digits, over_tasks),
            "undefined": str(self.undefined[step] or ""),
            "diverged": f"{diverged:,}" if diverged else "",
            WITHOUT: without if diverged and self.is_loss else "",
        }

    def cell(self, step: int, scale: float, digits: int) -> str:
        """Return the result after a step as one text."""
        text, undefined, diverged, without = self.cells(step, scale, digits).values()
        text += f", {undefined} undefined" if undefined else ""
        if without:
            return f"{text}; {without} without {diverged} diverged"
        return text + (f", {diverged} diverged" if diverged else "")

    def record(self) -> list[dict[str, Any]]:
        """Return the numbers after each step as plain values."""
        columns = {"interval_95_over_tasks": self.intervals.tolist(), "diverged_tasks": self.diverged}
        if self.is_loss:
            columns["mean_without_diverged"] = self.kept_mean.tolist()
            columns["interval_95_without_diverged"] = self.kept_intervals.tolist()
        else:
            columns["undefined_tasks"] = self.undefined
        return [
            {"steps": step} | asdict(Spread.over(means)) | {name: c[step] for name, c in columns.items()}
            for step, means in enumerate(self.means)
        ]


def by_dataset(evaluation: Evaluation) -> dict[str, Evaluation]:
    """Return the result of each data set of a mixture, and the mean over them; of a single one its own."""
    return {**evaluation.parts, MEAN: evaluation} if evaluation.parts else {ALL: evaluation}


def results_of(settings: Mapping[str, Sequence[Evaluation]]) -> dict[str, StepResults]:
    """Return the results of each setting's runs with each normalisation, by a label."""
    results = {}
    for setting, runs in settings.items():
        for norm in runs[0].losses:
            label = norm if setting == ALL else f"{setting}, {norm}"
            results[label if len(runs[0].losses) > 1 else setting] = StepResults.over(runs, norm)
    return results


def results_table(results: Mapping[str, StepResults], caption: Caption, *, losses: bool = False) -> str:
    """Return few settings as columns with all steps, or many as rows after 0, the quoted, the last step.

    With `losses`, columns of accuracies are followed by columns of losses. Measures alongside the loss are
    columns too or, of several settings, a second table of the quoted step.
    """
    parts = list(results.values())
    measure, scale, digits = choose_units(parts[0].measure(caption.loss_name))
    last = max(len(part.means) for part in parts) - 1
    further = [_format_others(part, FURTHER) for part in parts]
    if len(parts) <= MOST_COLUMNS:
        names, cells = ["steps"], [[*map(str, range(last + 1))]]
        for name, part in results.items():
            columns = [part.cells(step, scale, digits) for step in range(last + 1)]
            names += [heading or (measure if name == ALL else name) for heading in columns[0]]
            cells += [[column[heading] for column in columns] for heading in columns[0]]
        beside = {"accuracy": choose_units("accuracy"), "loss": choose_units(caption.loss_name)}
        for name, part in results.items() if losses else ():
            for title, column in _format_others(part, beside).items():
                names.append(title if name == ALL else f"{name}, {title}")
                cells.append(column)
        if len(parts) == 1:
            names += further[0].keys()
            cells += further[0].values()
        marks = [caption.marks.get(step, "") for step in range(last + 1)]
        text = table([*names, ""], list(zip(*cells, marks, strict=True)))
    else:
        steps = sorted({0, *caption.test_steps, last})
        rows = [[name, *(part.cell(s, scale, digits) for s in steps)] for name, part in results.items()]
        text = table(["", *map(after_steps, steps)], rows)
    for quoted in caption.test_steps if len(parts) > 1 and further[0] else ():
        shown = [[column[: quoted + 1][-1] for column in part.values()] for part in further]
        rows = [[name, *cells] for name, cells in zip(results, shown, strict=True)]
        text += "\n" + table([after_steps(quoted), *further[0]], rows)
    unit = "".join(caption.loss_name.partition(" of ")[1:])  # of the loss, where that is not the data's
    remark = f" The MSE is that{unit}." if unit and FURTHER["mse"][0] in further[0] else ""
    return f"{text}\nQuery {measure}: {describe_means(parts, text)}.{remark}"


def _format_others(part: StepResults, units: Mapping[str, Units]) -> dict[str, list[str]]:
    """Return measures that are not the quoted one as text after each step, by their titles."""
    return {
        title: [format_decimal(scale * value, digits) for value in part.others[name].tolist()]
        for name, (title, scale, digits) in units.items()
        if name in part.others
    }


def describe_means(results: Sequence[StepResults], table: str) -> str:
    """Return what the cells of a table with these results hold, in words."""
    tasks, places = f"{results[0].tasks} tasks", {WITHOUT: f"{WITHOUT!r} is", ";": "after the semicolon"}
    place = next((words for mark, words in places.items() if mark in table), None)
    after = f"; {place} the mean without those that diverged" if place else ""
    after += ", without those for which it is undefined" * ("undefined" in table)
    if any(part.means.shape[1] > 1 for part in results):
        return f"mean over seeds ± its 95 % interval over {tasks} (lowest to highest seed){after}"
    return f"mean ± 95 % interval over {tasks}{after}"


def sizes_table(runs: Sequence[Evaluation], caption: Caption, step: int) -> str:
    """Return the results of runs on the same tasks, after an inner step, by each size that varies."""
    texts = []
    for name, sizes in runs[0].sizes.items():
        rows = []
        for label, tasks in _group_sizes(sizes):
            results = [StepResults.over(runs, norm, tasks) for norm in runs[0].losses]
            measure, scale, digits = choose_units(results[0].measure(caption.loss_name))
            cells = [one.cell(step, scale, digits) for one in results]
            rows.append([label, f"{results[0].tasks:,}", *cells])
        names = list(runs[0].losses)
        texts.append(table([name, "tasks", *(names if len(names) > 1 else [measure])], rows))
    return "\n\n".join(texts)


def sizes_record(runs: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the numbers behind the table, after all steps."""
    return {
        name: {
            label: {"tasks": int(tasks.sum())}
            | {norm: StepResults.over(runs, norm, tasks).record() for norm in runs[0].losses}
            for label, tasks in _group_sizes(sizes)
        }
        for name, sizes in runs[0].sizes.items()
    }


def _group_sizes(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a label of each size, or of some that follow each other, and its tasks, bool `[tasks]`."""
    sizes = values.unique()
    for group in sizes.tensor_split(min(len(sizes), MOST_SIZES)):
        ends = dict.fromkeys((int(group[0]), int(group[-1])))
        yield "-".join(map(str, ends)), torch.isin(values, group)


# How a run was trained: "name", "setting", "seed", "iteration", "failure" (why it stopped), "measure"
# of validation ("accuracy", or the loss's name), its curve "validation", and these numbers, or None.
Summary = dict[str, Any]
NUMBERS = ("final_training_loss", "best_validation", "best_iteration")


def find_measure(runs: Sequence[Summary]) -> str:
    """Return the measure of all runs: "accuracy", a loss's name; "" where they have different ones."""
    return runs[0]["measure"] if len({run["measure"] for run in runs}) == 1 else ""


def _by_setting(runs: Sequence[Summary]) -> dict[str, list[Summary]]:
    settings = dict.fromkeys(run["setting"] for run in runs)
    return {setting: [run for run in runs if run["setting"] == setting] for setting in settings}


def _collect_spreads(runs: Sequence[Summary]) -> dict[str, Spread]:
    """Return the spread of each number over the runs that ended with it; one that failed is left out."""
    ended = [run for run in runs if run["failure"] is None]
    numbers = {name: [run[name] for run in ended if run[name] is not None] for name in NUMBERS}
    return {name: Spread.over(values) for name, values in numbers.items() if values}


def training_table(runs: Sequence[Summary]) -> str:
    """Return final training loss and best validation of each setting, over its seeds."""
    rows, common = [], find_measure(runs)
    for setting, group in _by_setting(runs).items():
        ended, spreads = sum(run["failure"] is None for run in group), _collect_spreads(group)
        measure, scale, digits = choose_units(group[0]["measure"])
        forms = zip(NUMBERS, ((1, 4), (scale, digits), (1, 0)), strict=True)
        cells = [spreads[name].text(*form) if name in spreads else "-" for name, form in forms]
        cells[1] += "" if common else f" {measure}"
        rows.append([setting, f"{ended} of {len(group)}", *cells])
    best = f"best validation {choose_units(common)[0]}".rstrip()
    return table(["", "ended", "training loss", best, "at iteration"], rows)


def training_record(runs: Sequence[Summary]) -> dict[str, Any]:
    """Return the numbers behind the table, and the runs behind the numbers."""
    spreads = {setting: _collect_spreads(group) for setting, group in _by_setting(runs).items()}
    settings = {setting: {name: asdict(s) for name, s in part.items()} for setting, part in spreads.items()}
    return {"settings": settings, "runs": [*runs]}


def learning_curves(runs: Sequence[Summary]) -> dict[str, list[Curve]]:
    """Return the validation curves of each setting's runs, by a label."""
    curves, common = {}, find_measure(runs)
    for setting, group in _by_setting(runs).items():
        measure = "" if common else f" {group[0]['measure']}"
        curves[f"{setting}{measure}: mean of {len(group)}"] = [run["validation"] for run in group]
    return curves

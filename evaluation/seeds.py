"""Several runs at once: mean and spread over seeds, as tables, records and pictures.

Runs of one setting differ in their seed alone. The spread over seeds (lowest to highest) and the interval
over test tasks are two different things, and are reported apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation import style
from evaluation.figures import mark_trained_steps
from evaluation.meta_test import Evaluation
from evaluation.tables import Caption, Column, after_steps, table, units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = "all"  # name of the only setting
MOST_COLUMNS = 3  # settings that a table has as columns; more are rows


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

    def text(self, digits: int, interval: str = "") -> str:
        """Return `mean interval (lowest to highest)`, the latter for several runs."""
        ends = f" ({self.lowest:,.{digits}f} to {self.highest:,.{digits}f})" * (self.runs > 1)
        return f"{self.mean:,.{digits}f}{interval}{ends}"


def spread_text(values: Sequence[float], scale: float, digits: int) -> str:
    """Return mean and spread of these values as text; "-" for none."""
    return Spread.over([scale * value for value in values]).text(digits) if values else "-"


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSummary:
    """How one run was trained."""

    name: str
    setting: str  # "" if there is but one
    seed: int
    iteration: int
    failure: str | None  # a run that failed is no part of a mean over seeds
    final_training_loss: float | None
    measure: str  # of validation, "query_accuracy" or "query_loss"
    loss: str  # name of the loss
    validation: dict[str, list[float]]  # curves by name: "iteration" and the measure

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Return validation while training: iterations and values."""
        return self.validation.get("iteration", []), self.validation.get(self.measure, [])

    @property
    def accuracy(self) -> bool:
        """Return whether validation measures accuracy, of which more is better."""
        return self.measure == "query_accuracy"

    def facts(self, level: float | None = None) -> dict[str, Any]:
        """Return final training loss, best validation, and the iteration that first reached `level`."""
        points = [(v, i) for i, v in zip(*self.curve, strict=True) if math.isfinite(v)]
        best, reaches = (max, operator.ge) if self.accuracy else (min, operator.le)
        value, iteration = best(points, key=lambda point: point[0], default=(None, None))
        reached = next((i for v, i in points if level is not None and reaches(v, level)), None)
        facts = {"final_training_loss": self.final_training_loss, "best_validation": value}
        facts |= {"best_iteration": iteration, "reaches_common_level": reached}
        return facts if self.failure is None else dict.fromkeys(facts)


def common_level(runs: Sequence[RunSummary]) -> float | None:
    """Return the best validation result that every run has reached; None where one has none."""
    best = [run.facts()["best_validation"] for run in runs]
    return None if None in best else (min if runs[0].accuracy else max)(best)


def _facts_by_setting(runs: Sequence[RunSummary]) -> dict[str, dict[str, list[float]]]:
    """Return the facts of the runs that have them, by setting and name."""
    level = common_level(runs)
    groups: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        group = groups.setdefault(run.setting or ALL, {})
        for name, value in run.facts(level).items():
            group.setdefault(name, []).extend([] if value is None else [value])
    return groups


def _loss_name(runs: Sequence[RunSummary]) -> str:
    """Return the name of the loss, or "loss" if the runs have different ones."""
    return runs[0].loss if len({run.loss for run in runs}) == 1 else "loss"


def training_table(runs: Sequence[RunSummary]) -> str:
    """Return how the runs of each setting learned: final training loss and best validation, over their seeds."""
    groups, level = _facts_by_setting(runs), common_level(runs)
    measure, scale, digits = units(_loss_name(runs), accuracy=runs[0].accuracy)

    def column(heading: str, name: str, scale: float = 1, digits: int = 0) -> Column:
        known = any(facts[name] for facts in groups.values())
        return heading, [spread_text(facts[name], scale, digits) * known for facts in groups.values()]

    failures = [[run.failure for run in runs if (run.setting or ALL) == setting] for setting in groups]
    counts = [(group.count(None), len(group)) for group in failures]
    columns = [
        ("", ["" if setting == ALL else setting for setting in groups]),
        ("runs", [f"{n}" if n == count else f"{n} of {count}" for n, count in counts]),
        column("training loss", "final_training_loss", 1, 4),
        column(f"best validation {measure}", "best_validation", scale, digits),
        column("at iteration", "best_iteration"),
    ]
    if level is not None and len(runs) > 1:
        columns.append(column(f"first at {scale * level:.{digits}f}", "reaches_common_level"))
    return table(columns)


def training_record(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Return the numbers behind the table, and the runs behind the numbers."""
    settings = {
        setting: {name: asdict(Spread.over(values)) for name, values in facts.items() if values}
        for setting, facts in _facts_by_setting(runs).items()
    }
    level = common_level(runs)
    records = [asdict(run) | run.facts(level) for run in runs]
    return {"common_validation_level": level, "settings": settings, "runs": records}


@style.styled()
def training_figure(runs: Sequence[RunSummary]) -> Figure:
    """Draw validation over iterations: each run, and the mean of each setting."""
    figure = style.new_figure(6.5, 3.6)
    panel = figure.subplots()
    draw_training(panel, runs)
    style.add_legend(figure, panel)
    return figure


def draw_training(panel: Axes, runs: Sequence[RunSummary]) -> None:
    """Draw validation over iterations: each run as a thin line, and the mean of each setting."""
    for number, setting in enumerate(dict.fromkeys(run.setting for run in runs)):
        curves = [run.curve for run in runs if run.setting == setting]
        _draw_runs(panel, number, setting or ALL, curves)
    style.set_iteration_axis(panel)
    name = "accuracy" if runs[0].accuracy else _loss_name(runs)
    style.set_measure_axis(panel, f"validation {name}", accuracy=runs[0].accuracy)


def _draw_runs(
    panel: Axes, number: int, setting: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> None:
    """Draw each run of a setting (x and y) as a thin line, and their mean as far as all of them go."""
    look = style.curve_style(number)
    for x, y in curves:
        panel.plot(x, y, color=look["color"], alpha=0.35, linewidth=0.8)
    length = min(len(x) for x, _ in curves)
    mean = torch.tensor([list(y[:length]) for _, y in curves], dtype=torch.float64).mean(0)
    label = f"mean of {len(curves)}" if setting == ALL else f"{setting}: mean of {len(curves)}"
    panel.plot(curves[0][0][:length], mean.tolist(), label=label, **look)


# ---- test ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResults:
    """Results of the runs of one setting, with one normalisation, after 0, 1, ... inner steps.

    Tasks that have diverged are left out of means and intervals.
    """

    means: Tensor  # [steps + 1, runs], over tasks
    intervals: Tensor  # [steps + 1], half widths over tasks, mean over the runs
    diverged: list[int]  # [steps + 1], tasks of all runs

    @classmethod
    def over(cls, evaluations: Sequence[Evaluation], normalisation: str) -> StepResults:
        """Return the results of these runs."""
        means, intervals = zip(*(e.intervals(normalisation) for e in evaluations), strict=True)
        diverged = torch.stack([e.diverged(normalisation).sum(0) for e in evaluations]).sum(0)
        return cls(torch.stack(means, 1), torch.stack(intervals).mean(0), diverged.tolist())

    def cell(self, step: int, scale: float, digits: int) -> str:
        """Return the result after a step as text, with the number of diverged tasks; "" beyond the last."""
        if step >= len(self.means):
            return ""
        spread, interval = Spread.over(scale * self.means[step]), scale * self.intervals[step]
        diverged = f", {self.diverged[step]} diverged" * bool(self.diverged[step])
        return spread.text(digits, f" ± {interval:.{digits}f}") + diverged

    def record(self) -> list[dict[str, Any]]:
        """Return the numbers after each step as plain values."""
        rows = zip(self.means, self.intervals.tolist(), self.diverged, strict=True)
        return [
            {"steps": step} | asdict(Spread.over(m)) | {"interval_95_over_tasks": i, "diverged_tasks": d}
            for step, (m, i, d) in enumerate(rows)
        ]


def test_table(results: Mapping[str, Sequence[Evaluation]], caption: Caption) -> str:
    """Return mean over seeds, interval over tasks and spread over seeds of each setting.

    Few settings are columns, with a row for each inner step. Many settings are rows, with the steps that
    matter: before adaptation, as quoted, and the last.
    """
    first = next(iter(results.values()))[0]
    measure, scale, digits = units(caption.loss_name, accuracy=bool(first.accuracies))
    settings = {}
    for setting, evaluations in results.items():
        for norm in evaluations[0].losses:
            name = measure if setting == ALL else setting
            heading = f"{name}\n{norm}" if len(first.losses) > 1 else name
            settings[heading] = StepResults.over(evaluations, norm)
    few, last = len(settings) <= MOST_COLUMNS, max(len(setting.means) for setting in settings.values()) - 1
    steps = range(last + 1) if few else sorted({0, min(caption.test_steps, last), last})
    cells = [[setting.cell(step, scale, digits) for step in steps] for setting in settings.values()]
    columns: list[Column]
    if few:
        marks = ["trained for" * (step == caption.trained_steps) for step in steps]
        columns = [("steps", list(map(str, steps))), *zip(settings, cells, strict=True), ("", marks)]
    else:
        names = [name.replace("\n", ", ") for name in settings]
        columns = [("setting", names), *zip(map(after_steps, steps), zip(*cells, strict=True), strict=True)]
    runs = " or ".join(map(str, sorted({len(evaluations) for evaluations in results.values()})))
    footer = f"mean and 95 % interval over {first.tasks} tasks"
    if runs != "1":
        over = f"mean over {runs} runs" + " of each setting" * (len(results) > 1)
        footer = f"{over} ± the mean 95 % interval over {first.tasks} tasks (lowest to highest run)"
    diverged = any(any(setting.diverged) for setting in settings.values())
    left_out = "Diverged tasks are left out, and counted." if diverged else "No task diverged."
    return f"{table(columns)}\nQuery {measure}: {footer}.\n{left_out}"


def test_record(results: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """Return the results by setting and normalisation, after each inner step."""
    return {
        setting: {norm: StepResults.over(evaluations, norm).record() for norm in evaluations[0].losses}
        for setting, evaluations in results.items()
    }


@style.styled()
def test_figure(results: Mapping[str, Sequence[Evaluation]], caption: Caption) -> Figure:
    """Draw each run over inner steps, and the mean of each setting, with the first normalisation."""
    figure = style.new_figure(5.5, 3.6)
    figure.suptitle(caption.title)
    panel = figure.subplots()
    for number, (setting, evaluations) in enumerate(results.items()):
        means = StepResults.over(evaluations, next(iter(evaluations[0].losses))).means.T.tolist()
        _draw_runs(panel, number, setting, [(range(len(mean)), mean) for mean in means])
    style.set_step_axis(panel)
    first = next(iter(results.values()))[0]
    style.set_measure_axis(panel, caption.measure(first), accuracy=bool(first.accuracies))
    mark_trained_steps(panel, caption.trained_steps)
    style.add_legend(figure, panel)
    return figure

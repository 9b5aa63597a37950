"""Many runs side by side: mean and spread over seeds, as tables, plain values and pictures.

The spread over seeds (lowest to highest) and the interval over test tasks are two things, and stand apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evaluation.figures import (
    DASHES,
    LIGHT,
    Theme,
    curve_style,
    measured,
    new_figure,
    over_iterations,
    over_steps,
    style,
    trained_for,
)
from evaluation.meta_test import Evaluation
from evaluation.tables import Words, of_the_rest, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Outcome = Mapping[str, Any]  # of a run: see `several.outcome_of`
ALL = "all"  # where there is but one setting
MOST_COLUMNS = 3  # of a table, each of some 35 characters
MOST_IN_LEGEND = len(DASHES) * len(LIGHT.palette)  # so many curves can be told apart


def by_setting(runs: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Runs that differ in their seed alone, by setting."""
    found: dict[str, list[Outcome]] = {}
    for run in runs:
        found.setdefault(run["setting"] or ALL, []).append(run)
    return found


def _mean_and_ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lowest and highest; all NaN where one is."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan, math.nan
    return statistics.fmean(values), min(values), max(values)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Of the same number in several runs."""
    mean, low, high = _mean_and_ends(values)
    finite = len(values) > 1 and all(map(math.isfinite, values))
    return {
        "runs": len(values),
        "mean": mean,
        "standard_deviation": statistics.stdev(values) if finite else None,
        "lowest": low,
        "highest": high,
    }


def _in_words(values: Sequence[float], scale: float, digits: int) -> str:
    """`mean (lowest to highest)`."""
    if not values:
        return "-"
    mean, low, high = (scale * v for v in _mean_and_ends(values))
    return f"{mean:.{digits}f}" + f" ({low:.{digits}f} to {high:.{digits}f})" * (len(values) > 1)


def _drawn(
    panel: Axes,
    number: int,
    setting: str,
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    theme: Theme,
) -> None:
    """Each run of a setting as a thin line (x and y), and their mean as far as all of them go."""
    kind = curve_style(number, theme)
    for ends, values in curves:
        panel.plot(ends, values, color=kind["color"], alpha=0.35, linewidth=0.8)
    length = min(len(ends) for ends, _ in curves)
    means = [statistics.fmean(values[position] for _, values in curves) for position in range(length)]
    label = f"{'' if setting == ALL else setting + ': '}mean of {len(curves)}"
    panel.plot(curves[0][0][:length], means, label=label, **kind)


def _legend(figure: Figure, panel: Axes, settings: int) -> None:
    """Below, in as many columns as the longest name leaves room for; of too many settings, none."""
    if settings > MOST_IN_LEGEND:
        return
    labels = panel.get_legend_handles_labels()[1]
    columns = max(1, min(3, int(figure.get_figwidth() * 17) // (max(map(len, labels)) + 8)))
    lines = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.15 * (lines - 1))
    figure.legend(loc="outside lower center", ncols=columns)


# ---- training ------------------------------------------------------------------------------------


def _known(runs: Sequence[Outcome], name: str) -> list[float]:
    return [run[name] for run in runs if run[name] is not None]


def _loss_name(runs: Sequence[Outcome]) -> str:
    names = {run["loss"] for run in runs}
    return names.pop() if len(names) == 1 else "loss"


def training_table(runs: Sequence[Outcome]) -> str:
    """A row a setting: training loss at the end and best validation, mean and spread over its seeds."""
    groups = by_setting(runs)
    accuracy = runs[0]["measure"] == "query_accuracy"
    scale, digits = (100, 2) if accuracy else (1, 4)
    best = "best validation " + ("accuracy %" if accuracy else _loss_name(runs))
    columns: list[tuple[str, str, Sequence[str]]] = [
        ("setting", "", list(groups)),
        ("runs", "", [_number_of(group) for group in groups.values()]),
        ("training loss", "", [_in_words(_known(g, "final_training_loss"), 1, 4) for g in groups.values()]),
        (best, "", [_in_words(_known(g, "best_validation"), scale, digits) for g in groups.values()]),
        ("at iteration", "", [_in_words(_known(g, "best_iteration"), 1, 0) for g in groups.values()]),
    ]
    if list(groups) == [ALL]:
        columns = columns[1:]
    return f"{table(columns)}\nMean over runs that differ in their seed (lowest to highest)."


def _number_of(group: Sequence[Outcome]) -> str:
    whole = sum(run["failure"] is None for run in group)
    return f"{whole}" if whole == len(group) else f"{whole} of {len(group)}"


def training_record(runs: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers behind the table, and the runs behind the numbers."""
    names = ("final_training_loss", "best_validation", "best_iteration")
    settings = {
        setting: {n: spread(_known(group, n)) for n in names if _known(group, n)}
        for setting, group in by_setting(runs).items()
    }
    return {"settings": settings, "runs": list(runs)}


def training_figure(runs: Sequence[Outcome], theme: Theme = LIGHT) -> Figure:
    """Validation over iterations: each run, and the mean of each setting's."""
    measure = runs[0]["measure"]
    with style(theme):
        figure = new_figure(6.5, 3.6)
        panel = figure.subplots()
        groups = by_setting(runs)
        for number, (setting, group) in enumerate(groups.items()):
            curves = [(r["validation"]["iteration"], r["validation"][measure]) for r in group]
            _drawn(panel, number, setting, curves, theme)
        over_iterations(panel)
        accuracy = measure == "query_accuracy"
        name = "validation accuracy" if accuracy else f"validation {_loss_name(runs)}"
        measured(panel, name, accuracy=accuracy)
        _legend(figure, panel, len(groups))
    return figure


# ---- test ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The runs of a setting, with one normalisation, over inner steps."""

    setting: str
    norm: str  # empty where there is but one
    means: list[list[float]]  # by step and run, over the tasks that have not diverged
    intervals: list[float]  # by step, half widths of the interval over tasks; means over the runs
    diverged: list[int]  # by step, tasks of all runs

    def cell(self, step: int, scale: float, digits: int) -> str:
        """`mean ± interval (lowest to highest)`, the latter of several runs; empty beyond the last step."""
        if step >= len(self.means):
            return ""
        mean, low, high = (scale * v for v in _mean_and_ends(self.means[step]))
        spread = f" ({low:.{digits}f} to {high:.{digits}f})" * (len(self.means[step]) > 1)
        return f"{mean:.{digits}f} ± {scale * self.intervals[step]:.{digits}f}{spread}"

    def count(self, step: int) -> str:
        return str(self.diverged[step]) if step < len(self.diverged) else ""


def columns_of(results: Mapping[str, Sequence[Evaluation]]) -> list[Column]:
    found = []
    for setting, evaluations in results.items():
        for norm in evaluations[0].losses:
            by_step = list(zip(*(of_the_rest(each, norm) for each in evaluations), strict=True))
            found.append(
                Column(
                    setting,
                    norm * (len(evaluations[0].losses) > 1),
                    [[mean.item() for mean, _ in of_runs] for of_runs in by_step],
                    [statistics.fmean(half.item() for _, half in of_runs) for of_runs in by_step],
                    torch.stack([each.diverged(norm).sum(0) for each in evaluations]).sum(0).tolist(),
                )
            )
    return found


def test_table(results: Mapping[str, Sequence[Evaluation]], words: Words) -> str:
    """Mean over seeds, ± the interval over tasks, and the spread: a row an inner step and a column a setting;
    of many settings, a row each, with but the steps that matter.

    Tasks that have diverged are left out, and counted where there are any.
    """
    some = next(iter(results.values()))[0]
    found = columns_of(results)
    rows = max(len(column.means) for column in found)
    scale, digits = (100, 2) if some.accuracies else (1, 4)
    measure = "accuracy %" if some.accuracies else words.loss_name
    columns: list[tuple[str, str, Sequence[str]]]
    if len(found) <= MOST_COLUMNS:
        columns = [("steps", "", [str(step) for step in range(rows)])]
        for each in found:
            title = measure if each.setting == ALL else each.setting
            columns.append((title, each.norm, [each.cell(step, scale, digits) for step in range(rows)]))
            if any(each.diverged):
                columns.append(("diverged", "", [each.count(step) for step in range(rows)]))
        columns.append(("", "", ["trained for" * (step == words.trained_steps) for step in range(rows)]))
    else:
        shown = sorted({0, min(words.test_steps, rows - 1), rows - 1})
        columns = [("setting", "", [each.setting for each in found])]
        if any(each.norm for each in found):
            columns.append(("statistics", "", [each.norm for each in found]))
        for step in shown:
            title = f"after {step} step{'s' * (step != 1)}"
            columns.append((title, "", [each.cell(step, scale, digits) for each in found]))
            if any(each.count(step) not in ("", "0") for each in found):
                columns.append(("diverged", "", [each.count(step) for each in found]))
    tasks = len(next(iter(some.losses.values())))
    runs = " or ".join(map(str, sorted({len(each) for each in results.values()})))
    over = f"mean over {runs} runs" + (" of each setting" * (len(results) > 1))
    footer = f"Query {measure}: {over} ± the mean 95 % interval over {tasks} tasks (lowest to highest run)"
    if runs == "1":
        footer = f"Query {measure}: mean and 95 % interval over {tasks} tasks"
    count = any(any(each.diverged) for each in found)
    left_out = "Diverged tasks are left out, and counted." if count else "No task diverged."
    return f"{table(columns)}\n{footer}.\n{left_out}"


def test_record(results: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """By setting and normalisation, after each inner step: the spread of the runs' means, over the tasks that
    have not diverged."""
    found: dict[str, Any] = {}
    norms = [norm for evaluations in results.values() for norm in evaluations[0].losses]
    for norm, each in zip(norms, columns_of(results), strict=True):
        found.setdefault(each.setting, {})[norm] = [
            spread(means) | {"interval_95_over_tasks": interval, "diverged_tasks": diverged}
            for means, interval, diverged in zip(each.means, each.intervals, each.diverged, strict=True)
        ]
    return found


def test_figure(results: Mapping[str, Sequence[Evaluation]], words: Words, theme: Theme = LIGHT) -> Figure:
    """The runs' means over inner steps, and their mean, by setting; with the first normalisation."""
    accuracies = bool(next(iter(results.values()))[0].accuracies)
    with style(theme):
        figure = new_figure(5.5, 3.6)
        panel = figure.subplots()
        panel.set_title(words.title)
        for number, (setting, evaluations) in enumerate(results.items()):
            norm = next(iter(evaluations[0].losses))
            curves = [[mean.item() for mean, _ in of_the_rest(each, norm)] for each in evaluations]
            _drawn(panel, number, setting, [(range(len(curve)), curve) for curve in curves], theme)
        over_steps(panel)
        measured(panel, "query accuracy" if accuracies else f"query {words.loss_name}", accuracy=accuracies)
        if words.trained_steps is not None:
            trained_for(panel, words.trained_steps, theme)
        _legend(figure, panel, len(results))
    return figure

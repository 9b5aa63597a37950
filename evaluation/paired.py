"""Runs side by side (--compare): paired differences on the same tasks, as tables, a record and a picture.

A pair is one task that two runs adapted to, of the same seed where there are several. The interval over tasks
and the spread over seeds (lowest to highest) are two different things, and are reported apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from evaluation import style
from evaluation.figures import draw_over_steps
from evaluation.meta_test import Evaluation, mean_and_interval
from evaluation.seeds import RunSummary, StepResults, draw_training, training_record
from evaluation.tables import table, units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OFF = ("no", "none", "0", "0.0")  # a setting with such a value is as if it were not there
MOST_COLUMNS = 4  # sides that the table of settings has as columns
LONGEST = 40  # characters of a name or a setting in a table


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, or the runs of a setting by seed, with one normalisation."""

    name: str
    settings: Mapping[str, str]  # values in words by flag, without the seed
    training: Mapping[int, RunSummary]
    evaluations: Mapping[int, Evaluation]  # on the same tasks as all other sides'
    normalisation: str
    steps: int  # inner steps whose result is quoted

    @property
    def accuracy(self) -> bool:
        """Return whether it is measured by accuracy, of which more is better."""
        return bool(next(iter(self.evaluations.values())).accuracies)

    @property
    def short_name(self) -> str:
        """Return the name, shortened in the middle."""
        return _shorten(self.name)

    @cached_property
    def results(self) -> StepResults:
        """Return the results over inner steps."""
        return StepResults.over(list(self.evaluations.values()), self.normalisation)


def trained_runs(sides: Sequence[Side]) -> list[RunSummary]:
    """Return how the runs of all sides learned, with the side as their setting."""
    return [replace(run, setting=side.name) for side in sides for run in side.training.values()]


def readings(sides: Sequence[Side]) -> dict[str, list[Side]]:
    """Return what is compared, in words: each side as it was trained, then all with the same normalisation.

    The latter for each normalisation that all sides were measured with.
    """
    trained = [side.normalisation for side in sides]
    alike = len(set(trained)) == 1
    compared = {f"{trained[0]}, as trained" if alike else "as trained": list(sides)}
    measured = [next(iter(side.evaluations.values())).losses for side in sides]
    for name in measured[0]:
        if not (alike and name == trained[0]) and all(name in losses for losses in measured):
            compared[name] = [replace(side, normalisation=name) for side in sides]
    return compared


# ---- differences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One side minus the first, on tasks that have diverged in neither and in no seed."""

    mean: float  # over seeds and tasks
    interval_95_over_tasks: float  # half width, of the mean over seeds
    by_seed: dict[int, float]  # means over tasks
    tasks: int
    left_out: int  # tasks that have diverged

    @property
    def excludes_0(self) -> bool:
        """Return whether the interval excludes 0; False where there is none."""
        return abs(self.mean) > self.interval_95_over_tasks

    def text(self, scale: float, digits: int) -> str:
        """Return `mean ± interval (lowest to highest seed)`, the latter for several seeds."""
        values = [scale * value for value in self.by_seed.values()]
        ends = f" ({min(values):+.{digits}f} to {max(values):+.{digits}f})" * (len(values) > 1)
        return f"{scale * self.mean:+.{digits}f} ± {scale * self.interval_95_over_tasks:.{digits}f}{ends}"

    def verdict(self, *, more_is_better: bool) -> str:
        """Return in words whether the side is better than the first."""
        if self.left_out > self.tasks:
            return "of few tasks: most have diverged"
        if not self.excludes_0:
            return "same" if self.mean == self.interval_95_over_tasks == 0.0 else "not told apart"
        word = "better" if (self.mean > 0) == more_is_better else "worse"
        agreeing = all((value > 0) == (self.mean > 0) for value in self.by_seed.values())
        return word if agreeing else f"{word}, but not in every seed"

    def record(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        return asdict(self) | {"excludes_0": self.excludes_0}


def shared_seeds(one: Collection[int], other: Collection[int]) -> list[tuple[int, int]]:
    """Return the pairs of seeds: those that both have; of two single runs, whatever they are."""
    if len(one) == len(other) == 1:
        return list(zip(one, other, strict=True))
    return [(seed, seed) for seed in one if seed in other]


def difference(side: Side, first: Side, step: int | None = None) -> Difference:
    """Return `side` minus `first`, after this inner step; None: each after its quoted steps."""
    seeds = shared_seeds(side.evaluations, first.evaluations)
    values, diverged = [], []  # [tasks] of side and first, by pair of seeds
    for pair in seeds:
        for one, seed in zip((side, first), pair, strict=True):
            evaluation, at = one.evaluations[seed], one.steps if step is None else step
            values.append(evaluation.measures[one.normalisation][:, at])
            diverged.append(evaluation.diverged(one.normalisation)[:, at])
    kept = ~torch.stack(diverged).any(0)
    differences = (torch.stack(values[::2]) - torch.stack(values[1::2]))[:, kept]  # [seeds, tasks]
    mean, interval = mean_and_interval(differences.mean(0))
    by_seed = dict(zip((seed for seed, _ in seeds), differences.mean(1).tolist(), strict=True))
    return Difference(mean.item(), interval.item(), by_seed, int(kept.sum()), int((~kept).sum()))


# ---- tables --------------------------------------------------------------------------------------


def _shorten(text: str) -> str:
    half = LONGEST // 2 - 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def differing_settings(sides: Sequence[Side]) -> list[str]:
    """Return the flags in which the sides differ."""
    flags = dict.fromkeys(flag for side in sides for flag in side.settings)
    values = {flag: [side.settings.get(flag, "no") for side in sides] for flag in flags}
    return [f for f, row in values.items() if len({"no" if v in OFF else v for v in row}) > 1]


def settings_table(sides: Sequence[Side]) -> str:
    """Return the settings in which the sides differ: of few sides a row a setting, of many a row a side."""
    flags, names = differing_settings(sides), [side.short_name for side in sides]
    if not flags:
        return "All settings are the same."
    values = [[_shorten(side.settings.get(flag, "-")) for flag in flags] for side in sides]
    if len(sides) <= MOST_COLUMNS:
        return table([("differing", flags), *zip(names, values, strict=True)])
    return table([("", names), *zip(flags, zip(*values, strict=True), strict=True)])


def differences_table(sides: Sequence[Side], loss_name: str, tasks: str) -> str:
    """Return each side's result after the quoted steps and its difference to the first, by normalisation.

    Args:
        tasks: what the tasks are, in words.
    """
    compared, several = readings(sides), any(len(side.evaluations) > 1 for side in sides)
    rows = [
        {"": side.short_name, "statistics": words * (len(compared) > 1)}
        | _cells(side, group[0], loss_name, several)
        for words, group in compared.items()
        for side in group
    ]
    result = pairs = "mean ± 95 % interval over tasks"
    if several:
        result = "mean over seeds ± the mean 95 % interval over tasks (lowest to highest seed)"
        pairs = "mean over shared seeds ± its 95 % interval over tasks (lowest to highest seed)"
    measure, *_ = units(loss_name, accuracy=sides[0].accuracy)
    diverged = any("diverged" in row[measure] for row in rows)
    left_out = "Diverged tasks are left out, and counted." if diverged else "No task diverged."
    return (
        f"{table([(name, [row[name] for row in rows]) for name in rows[0]])}\n"
        f"Query {measure} on {tasks}: {result}. {left_out}\n"
        f"Difference to {sides[0].short_name} on the same tasks: {pairs}; better or worse where the "
        "interval excludes 0."
    )


def _cells(side: Side, first: Side, loss_name: str, several: bool) -> dict[str, str]:
    """Return the cells of a side by heading; `several`: a side has more than one seed."""
    measure, scale, digits = units(loss_name, accuracy=side.accuracy)
    cells = {"steps": str(side.steps), measure: side.results.cell(side.steps, scale, digits)}
    if side is first:
        seeds = len(side.evaluations)
        return cells | {
            "seeds": str(seeds) * several,
            "difference": "the first",
            "left out": "",
            "verdict": "",
        }
    paired = difference(side, first)
    return cells | {
        "seeds": str(len(paired.by_seed)) * several,
        "difference": paired.text(scale, digits),
        "left out": f"{paired.left_out} pairs" if paired.left_out else "",
        "verdict": paired.verdict(more_is_better=side.accuracy),
    }


def record(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Return the numbers behind tables and picture, and each task's result after the quoted steps."""
    differing = differing_settings(sides)
    learning = training_record(trained_runs(sides))["settings"]
    return [
        {
            "name": side.name,
            "steps": side.steps,
            "seeds": list(side.evaluations),
            "differing_settings": {f: v for f, v in side.settings.items() if f in differing},
            "learning": learning[side.name],
            "results": {
                words: _record_results(compared[number], compared[0])
                for words, compared in readings(sides).items()
            },
        }
        for number, side in enumerate(sides)
    ]


def _record_results(side: Side, first: Side) -> dict[str, Any]:
    """Return results of a side, and its differences to the first."""
    steps = range(min(len(side.results.means), len(first.results.means)))
    return {
        "normalisation": side.normalisation,
        "difference": difference(side, first).record(),
        "per_step": side.results.record(),
        "difference_per_step": [{"steps": s} | difference(side, first, s).record() for s in steps],
        "per_task": {s: e.measures[side.normalisation][:, side.steps] for s, e in side.evaluations.items()},
    }


# ---- figure --------------------------------------------------------------------------------------


@style.styled()
def figure(sides: Sequence[Side], loss_name: str, title: str) -> Figure:
    """Draw validation over iterations, the result over inner steps and, below, the paired differences.

    A side has one colour and marker in all panels; its quoted steps have a larger marker.
    """
    accuracy = sides[0].accuracy
    measure = "accuracy" if accuracy else loss_name
    figure = style.new_figure(9.0, 3.9 + 0.3 * len(sides))
    figure.suptitle(title)
    heights = [3.1, 0.8 + 0.3 * len(sides)]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    learning, steps = top.subplots(1, 2)
    for number, side in enumerate(sides):
        mean = side.results.means.mean(1)
        draw_over_steps(steps, mean, side.results.intervals, side.short_name, number)
        steps.plot([side.steps], [mean[side.steps]], **style.curve_style(number) | {"markersize": 7})
    draw_training(learning, trained_runs(sides))
    style.set_measure_axis(steps, f"query {measure} on these tasks", accuracy=accuracy)
    better = "right" if accuracy else "left"
    label = f"{measure}: paired difference to the first, 95 % interval over tasks (better: {better})"
    _draw_differences(bottom.subplots(), sides, label)
    return figure


def _draw_differences(panel: Axes, sides: Sequence[Side], label: str) -> None:
    """Draw a row a side: mean and interval over tasks, and below it a dot for each of several seeds."""
    panel.axvline(0.0, color=style.GREY, linestyle=":")
    for number, side in enumerate(sides):
        look, paired = style.curve_style(number), difference(side, sides[0])
        half = paired.interval_95_over_tasks if number else 0.0
        points = {"fmt": look["marker"], "color": look["color"], "capsize": 3, "markersize": 6}
        panel.errorbar([paired.mean], [number], xerr=[half], **points)
        if len(paired.by_seed) > 1 and number:
            seeds = list(paired.by_seed.values())
            panel.plot(seeds, [number + 0.25] * len(seeds), "o", color=look["color"], markersize=2.5)
    panel.set_yticks(range(len(sides)), [side.short_name for side in sides])
    panel.set(ylim=(len(sides) - 0.5, -0.5), xlabel=label)

"""Runs side by side (--compare): paired differences on the same tasks, as tables and a record.

A pair is one task that two runs adapted to, of the same seed where there are several. The interval over tasks
and the spread over seeds (lowest to highest) are two different things, and are reported apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from evaluation.meta_test import Evaluation, mean_and_interval
from evaluation.tables import Curve, Spread, StepResults, choose_units, describe_means, table

OFF = {"-", "no", "none", "0", "0.0"}  # values of a setting that are as good as its absence
MOST_COLUMNS = 4  # sides that the table of settings has as columns


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, or the runs of a setting by seed, with one normalisation."""

    name: str
    settings: Mapping[str, str]  # values in words by flag, without the seed
    curves: Mapping[int, Curve]  # validation while training, by seed
    evaluations: Mapping[int, Evaluation]  # on the same tasks as all other sides'
    normalisation: str
    steps: int  # inner steps whose result is quoted

    @cached_property
    def results(self) -> StepResults:
        return StepResults.over(list(self.evaluations.values()), self.normalisation)


def readings(sides: Sequence[Side]) -> dict[str, list[Side]]:
    """Return what is compared, in words: the sides as trained, and with each common normalisation."""
    trained = {side.normalisation for side in sides}
    compared = {f"{sides[0].normalisation}, as trained" if len(trained) == 1 else "as trained": list(sides)}
    measured = [next(iter(side.evaluations.values())).losses for side in sides]
    for name in measured[0]:
        if trained != {name} and all(name in losses for losses in measured):
            compared[name] = [replace(side, normalisation=name) for side in sides]
    return compared


@dataclass(frozen=True)
class Difference:
    """One side minus the first, on tasks that have diverged (or are undefined) in neither and in no seed."""

    mean: float  # over seeds and tasks
    interval_95_over_tasks: float  # half width, of the mean over seeds
    by_seed: dict[int, float]  # means over tasks
    tasks: int
    left_out: int  # tasks whose loss has diverged, or for which the measure is undefined or infinite

    def verdict(self, *, more_is_better: bool) -> str:
        """Return in words whether the side is better than the first."""
        if not abs(self.mean) > self.interval_95_over_tasks:  # or there is no interval
            return "not told apart"
        word = "better" if (self.mean > 0) == more_is_better else "worse"
        agreeing = all((value > 0) == (self.mean > 0) for value in self.by_seed.values())
        return word if agreeing else f"{word}, but not in every seed"


def shared_seeds(one: Collection[int], other: Collection[int]) -> list[tuple[int, int]]:
    """Return the pairs of seeds: those that both have; of two single runs, whatever they are."""
    if len(one) == len(other) == 1:
        return list(zip(one, other, strict=True))
    return [(seed, seed) for seed in one if seed in other]


def difference(side: Side, first: Side, step: int | None = None) -> Difference:
    """Return `side` minus `first`, after this inner step; None: each after its quoted steps."""
    seeds = shared_seeds(side.evaluations, first.evaluations)
    values, out = [], []  # [tasks] of side and first, by pair of seeds
    for pair in seeds:
        for part, seed in zip((side, first), pair, strict=True):
            evaluation, column = part.evaluations[seed], part.steps if step is None else step
            values.append(evaluation.measured(part.normalisation)[:, column])
            diverged = evaluation.find_diverged(part.normalisation)[:, column]
            out.append(diverged if side.results.is_loss else ~values[-1].isfinite())
    paired = ~torch.stack(out).any(0)
    differences = (torch.stack(values[::2]) - torch.stack(values[1::2]))[:, paired]  # [seeds, tasks]
    mean, interval = mean_and_interval(differences.mean(0))
    by_seed = dict(zip((seed for seed, _ in seeds), differences.mean(1).tolist(), strict=True))
    return Difference(mean.item(), interval.item(), by_seed, int(paired.sum()), int((~paired).sum()))


def list_differing_settings(sides: Sequence[Side]) -> list[str]:
    flags = dict.fromkeys(flag for side in sides for flag in side.settings)
    values = {flag: {side.settings.get(flag, "-") for side in sides} for flag in flags}
    return [flag for flag in flags if len(values[flag]) > 1 and not values[flag] <= OFF]


def settings_table(sides: Sequence[Side]) -> str:
    """Return the settings in which the sides differ: of few sides a row a setting, of many a row a side."""
    flags = list_differing_settings(sides)
    if not flags:
        return "All settings are the same."
    rows = [["differing", *flags]]
    rows += [[side.name, *(side.settings.get(flag, "-") for flag in flags)] for side in sides]
    if len(sides) <= MOST_COLUMNS:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return table(rows[0], rows[1:])


def differences_table(sides: Sequence[Side], loss_name: str, split: str) -> str:
    """Return each side's result after the quoted steps and its difference to the first, by normalisation."""
    measure, scale, digits = choose_units(sides[0].results.measure(loss_name))
    several = any(len(side.evaluations) > 1 for side in sides)
    compared, rows, left_out = readings(sides), [], 0
    for words, (first, *others) in compared.items():
        for side in (first, *others):
            row = [side.name, words * (len(compared) > 1), str(side.steps)]
            row.append(side.results.cell(side.steps, scale, digits))
            paired = difference(side, first)
            spread = Spread.over(list(paired.by_seed.values()))
            text = spread.text(scale, digits, paired.interval_95_over_tasks, sign="+")
            left_out += paired.left_out
            counts = [str(spread.runs) * several, str(paired.left_out or "")]
            verdict = paired.verdict(more_is_better=side.results.more_is_better)
            rows.append([*row, *(["the first", "", "", ""] if side is first else [text, *counts, verdict])])
    header = ["", "statistics", "steps", measure, "difference", "seeds", "left out", "verdict"]
    pairs = "mean over shared seeds ± its" if several else "mean ±"
    pairs += f" 95 % interval over tasks{' (lowest to highest seed)' * several}"
    reason = "that diverged" if sides[0].results.is_loss else "for which it is undefined or not finite"
    pairs += f", without tasks {reason} in either" * bool(left_out)
    text = table(header, rows)
    means = describe_means([side.results for side in sides], text)
    return (
        f"{text}\nQuery {measure}, {split}: {means}.\n"
        f"Difference to {sides[0].name} on the same tasks: {pairs}; better or worse where the interval "
        "excludes 0."
    )


def record(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Return the numbers behind tables and picture, and each task's result after the quoted steps."""
    differing, compared = list_differing_settings(sides), readings(sides).items()
    return [
        {
            "name": side.name,
            "steps": side.steps,
            "seeds": list(side.evaluations),
            "differing_settings": {f: v for f, v in side.settings.items() if f in differing},
            "results": {words: _record_results(group[number], group[0]) for words, group in compared},
        }
        for number, side in enumerate(sides)
    ]


def _record_results(side: Side, first: Side) -> dict[str, Any]:
    steps = range(min(len(side.results.means), len(first.results.means)))
    return {
        "normalisation": side.normalisation,
        "difference": asdict(difference(side, first)),
        "per_step": side.results.record(),
        "difference_per_step": [{"steps": step} | asdict(difference(side, first, step)) for step in steps],
        "per_task": {s: e.measured(side.normalisation)[:, side.steps] for s, e in side.evaluations.items()},
    }

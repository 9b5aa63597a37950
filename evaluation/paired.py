"""Runs side by side: paired differences on the same tasks, as tables, plain values and a picture.

A pair is one task, adapted to by two runs, of the same seed where there are several. The interval over tasks
and the spread over seeds (lowest to highest) are two things, and stand apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from evaluation.figures import LIGHT, Theme, curve_style, new_figure, over_iterations, style
from evaluation.meta_test import Evaluation, mean_and_interval
from evaluation.seeds import Column, columns_of, spread
from evaluation.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[float], list[float]]  # iterations, values

MOST_COLUMNS = 4  # runs that a table of settings has beside each other
OFF = ("no", "none", "0", "0.0")  # values of a setting
LONGEST = 40  # characters of a name or a setting that is shown


@dataclass(frozen=True)
class Side:
    """One of those that are compared: a run, or the runs of a setting, by seed."""

    name: str
    settings: Mapping[str, str]  # in words, by flag; the seed is none of them
    validation: Mapping[int, Curve]  # while it was trained
    evaluations: Mapping[int, Evaluation]  # on the same tasks as all others'
    norm: str  # whose statistics it was trained with
    steps: int  # inner steps whose result is quoted

    @property
    def accuracies(self) -> bool:
        """Whether more is better."""
        return bool(next(iter(self.evaluations.values())).accuracies)

    @property
    def columns(self) -> dict[str, Column]:
        """Its results over inner steps, by normalisation."""
        results = list(self.evaluations.values())
        return dict(zip(results[0].losses, columns_of({self.name: results}), strict=True))


# ---- differences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A side less the first, on tasks that have diverged in neither, in no seed."""

    mean: float  # over seeds and tasks
    interval: float  # half width over tasks, of the mean over seeds
    by_seed: dict[int, float]  # means over tasks
    tasks: int
    left_out: int  # tasks that have diverged

    @property
    def seen(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.interval  # False where there is none

    def in_words(self, scale: float, digits: int) -> str:
        """`mean ± interval (lowest to highest)`, the latter of several seeds."""
        values = [scale * value for value in self.by_seed.values()]
        ends = f" ({min(values):+.{digits}f} to {max(values):+.{digits}f})" * (len(values) > 1)
        return f"{scale * self.mean:+.{digits}f} ± {scale * self.interval:.{digits}f}{ends}"

    def verdict(self, *, more_is_better: bool) -> str:
        if self.left_out > self.tasks:
            return "of few tasks: most have diverged"
        if not self.seen:
            return "same" if self.mean == self.interval == 0.0 else "not told apart"
        agreeing = {value > 0 for value in self.by_seed.values()} == {self.mean > 0}
        word = "better" if (self.mean > 0) == more_is_better else "worse"
        return word if agreeing else f"{word}, but not in every seed"


def shared_seeds(one: Collection[int], other: Collection[int]) -> list[tuple[int, int]]:
    """The seeds that are paired: those that both have; of single runs, whatever they are."""
    if len(one) == len(other) == 1:
        return list(zip(one, other, strict=True))
    return [(seed, seed) for seed in one if seed in other]


def difference(
    one: Side, first: Side, norms: tuple[str, str], steps: tuple[int, int] | None = None
) -> Difference:
    """`one` less `first`, each with its normalisation and after its inner steps, by default the quoted."""
    steps = (one.steps, first.steps) if steps is None else steps
    pairs = shared_seeds(one.evaluations, first.evaluations)
    values, diverged = [], []
    for seeds in pairs:
        evaluations = one.evaluations[seeds[0]], first.evaluations[seeds[1]]
        mine, theirs = (
            (each.accuracies or each.losses)[norm][:, step]
            for each, norm, step in zip(evaluations, norms, steps, strict=True)
        )
        values.append(mine - theirs)
        diverged += [
            each.diverged(norm)[:, step] for each, norm, step in zip(evaluations, norms, steps, strict=True)
        ]
    kept = ~torch.stack(diverged).any(0)
    differences = torch.stack(values)[:, kept]  # [seeds, tasks]
    mean, interval = mean_and_interval(differences.mean(0))
    by_seed = {seeds[0]: d.item() for seeds, d in zip(pairs, differences.mean(1), strict=True)}
    return Difference(mean.item(), interval.item(), by_seed, int(kept.sum()), int((~kept).sum()))


def normalisations(sides: Sequence[Side]) -> dict[str, list[str]]:
    """What is compared, in words: the normalisation of each side. As they were trained, and where all have
    them, the others."""
    trained = [side.norm for side in sides]
    alike = len(set(trained)) == 1
    found = {f"{trained[0]}, as trained" if alike else "as trained": trained}
    for norm in sides[0].columns:
        if not (alike and norm == trained[0]) and all(norm in side.columns for side in sides):
            found[norm] = [norm] * len(sides)
    return found


# ---- learning ------------------------------------------------------------------------------------


def _best(curve: Curve, *, more_is_better: bool) -> tuple[float, float] | None:
    """The best value of a curve, and its iteration."""
    sign = 1 if more_is_better else -1
    points = [(v, i) for i, v in zip(*curve, strict=True) if math.isfinite(v)]
    return max(points, key=lambda point: sign * point[0], default=None)


def common_level(sides: Sequence[Side]) -> float | None:
    """The best validation result that every run has come to; None where one has none."""
    more = sides[0].accuracies
    best = [_best(curve, more_is_better=more) for side in sides for curve in side.validation.values()]
    reached = [each[0] for each in best if each is not None]
    return (min if more else max)(reached) if len(reached) == len(best) else None


def _reaches(curve: Curve, level: float, *, more_is_better: bool) -> float:
    """The first iteration whose result is as good as that."""
    sign = 1 if more_is_better else -1
    return next(i for i, v in zip(*curve, strict=True) if sign * v >= sign * level)


def learning_of(side: Side, level: float | None) -> dict[str, list[float]]:
    """By run: the last iteration, the best validation result, where it was, and where the run first came to
    the level of all."""
    more = side.accuracies
    best = [_best(curve, more_is_better=more) for curve in side.validation.values()]
    found = [each for each in best if each is not None]
    curves = side.validation.values()
    return {
        "validated_until": [ends[-1] for ends, _ in curves if ends],
        "best_validation": [value for value, _ in found],
        "best_iteration": [iteration for _, iteration in found],
        "reaches_common_level": []
        if level is None
        else [_reaches(curve, level, more_is_better=more) for curve in curves],
    }


# ---- tables and record ---------------------------------------------------------------------------


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}...{text[-(LONGEST // 2 - 2) :]}"


def _spread_in_words(values: Sequence[float], scale: float, digits: int) -> str:
    """`mean (lowest to highest)`."""
    if not values:
        return "-"
    found = spread([scale * value for value in values])
    ends = f" ({found['lowest']:,.{digits}f} to {found['highest']:,.{digits}f})"
    return f"{found['mean']:,.{digits}f}{ends * (len(values) > 1)}"


def settings_table(sides: Sequence[Side]) -> str:
    """The settings in which they differ: a column a side, or of many sides, a row."""
    flags = [f for f in dict.fromkeys(f for s in sides for f in s.settings) if differs(sides, f)]
    if not flags:
        return "All settings are the same."
    cells = {side.name: [_shown(side.settings.get(flag, "-")) for flag in flags] for side in sides}
    if len(sides) <= MOST_COLUMNS:
        return table([("differing", "", flags), *((_shown(name), "", c) for name, c in cells.items())])
    by_flag = zip(flags, zip(*cells.values(), strict=True), strict=True)
    return table([("", "", [_shown(side.name) for side in sides]), *((f, "", c) for f, c in by_flag)])


def differs(sides: Sequence[Side], flag: str) -> bool:
    """Whether a setting is not the same; where it means nothing, it is as if it were off."""
    values = {side.settings.get(flag, "no") for side in sides}
    return len({"no" if value in OFF else value for value in values}) > 1


def learning_table(sides: Sequence[Side], loss_name: str) -> str:
    """A row a side: how it learned."""
    level = common_level(sides)
    scale, digits = _units(sides)
    rows = [learning_of(side, level) for side in sides]
    measure = "accuracy %" if sides[0].accuracies else loss_name

    def column(name: str, scale: float = 1, digits: int = 0) -> list[str]:
        return [_spread_in_words(row[name], scale, digits) for row in rows]

    columns: list[tuple[str, str, Sequence[str]]] = [
        ("", "", [_shown(side.name) for side in sides]),
        ("runs", "", [str(len(side.evaluations)) for side in sides]),
        ("validated until", "", column("validated_until")),
        (f"best validation {measure}", "", column("best_validation", scale, digits)),
        ("at iteration", "", column("best_iteration")),
    ]
    if level is not None:
        title = f"first at {scale * level:.{digits}f}"
        columns.append((title, "", column("reaches_common_level")))
    return table(columns)


def _units(sides: Sequence[Side]) -> tuple[float, int]:
    """What a result is multiplied by where it is shown, and the digits."""
    return (100, 2) if sides[0].accuracies else (1, 4)


def differences_table(sides: Sequence[Side], loss_name: str, tasks: str) -> str:
    """A row a side and normalisation: its result after the quoted steps, and the difference to the first."""
    scale, digits = _units(sides)
    more = sides[0].accuracies
    measure = "accuracy %" if more else loss_name
    ways, many = normalisations(sides), any(len(side.evaluations) > 1 for side in sides)
    rows = []
    for words, norms in ways.items():
        for number, (side, norm) in enumerate(zip(sides, norms, strict=True)):
            column = side.columns[norm]
            found = difference(side, sides[0], (norm, norms[0]))
            row = {
                "": _shown(side.name),
                "statistics": words * (len(ways) > 1),
                "steps": str(side.steps),
                measure: column.cell(side.steps, scale, digits),
                "diverged": column.count(side.steps),
                "seeds": str(len(found.by_seed) if number else len(side.evaluations)) if many else "",
                "difference": found.in_words(scale, digits) if number else "the first",
                "pairs left out": str(found.left_out * bool(number)),
                "that is": found.verdict(more_is_better=more) if number else "",
            }
            rows.append(row)
    shown = [name for name in rows[0] if any(row[name] not in ("", "0") for row in rows) or name == ""]
    left_out = "Diverged tasks are left out, and counted." if "diverged" in shown else "No task diverged."
    result = pairs = "mean ± 95 % interval over tasks"
    if many:
        result = "mean over seeds ± the mean 95 % interval over tasks (lowest to highest seed)"
        pairs = "mean over shared seeds ± its 95 % interval over tasks (lowest to highest seed)"
    return (
        f"{table([(name, '', [row[name] for row in rows]) for name in shown])}\n"
        f"Query {measure} on {tasks}: {result}. {left_out}\n"
        f"Difference to {_shown(sides[0].name)} on the same tasks: {pairs}; better or worse where the "
        "interval excludes 0."
    )


def _difference_record(found: Difference) -> dict[str, Any]:
    return {
        "mean": found.mean,
        "interval_95_over_tasks": found.interval,
        "excludes_0": found.seen,
        "by_seed": found.by_seed,
        "tasks": found.tasks,
        "left_out": found.left_out,
    }


def record(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The numbers behind tables and picture, and each task's result after the quoted steps."""
    ways, level, first = normalisations(sides), common_level(sides), sides[0]
    found = []
    for number, side in enumerate(sides):
        results = {}
        for words, norms in ways.items():
            column, pair = side.columns[norms[number]], (norms[number], norms[0])
            over_steps = zip(column.means, column.intervals, column.diverged, strict=True)
            steps = range(min(len(column.means), len(first.columns[norms[0]].means)))
            results[words] = {
                "normalisation": norms[number],
                "difference": _difference_record(difference(side, first, pair)),
                "per_step": [
                    spread(means) | {"steps": step, "interval_95_over_tasks": half, "diverged_tasks": n}
                    for step, (means, half, n) in enumerate(over_steps)
                ],
                "difference_per_step": [
                    {"steps": step} | _difference_record(difference(side, first, pair, (step, step)))
                    for step in steps
                ],
                "per_task": {
                    seed: (each.accuracies or each.losses)[norms[number]][:, side.steps]
                    for seed, each in side.evaluations.items()
                },
            }
        found.append(
            {
                "name": side.name,
                "steps": side.steps,
                "seeds": list(side.evaluations),
                "differing_settings": {f: v for f, v in side.settings.items() if differs(sides, f)},
                "learning": {n: spread(v) for n, v in learning_of(side, level).items() if v},
                "results": results,
            }
        )
    return found


# ---- figure --------------------------------------------------------------------------------------


def figure(sides: Sequence[Side], loss_name: str, title: str, theme: Theme = LIGHT) -> Figure:
    """Validation over iterations, the result over inner steps, and below the paired differences; a colour a
    side, as it was trained."""
    import matplotlib

    more = sides[0].accuracies
    measure = "accuracy" if more else loss_name
    norms = next(iter(normalisations(sides).values()))
    with style(theme), matplotlib.rc_context({"text.parse_math": False}):  # a name may have a $ in it
        figure = new_figure(9.0, 3.9 + 0.3 * len(sides))
        figure.suptitle(title)
        heights = [3.1, 0.8 + 0.3 * len(sides)]
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        learning, steps = top.subplots(1, 2)
        for number, (side, norm) in enumerate(zip(sides, norms, strict=True)):
            line = curve_style(number, theme) | {"markersize": 3, "linewidth": 1.2}
            _draw_learning(learning, side, line)
            _draw_steps(steps, side, side.columns[norm], line)
        if not any(ends for side in sides for ends, _ in side.validation.values()):
            learning.text(0.5, 0.5, "no curves were kept", ha="center", transform=learning.transAxes)
        over_iterations(learning)
        learning.set(ylabel=f"validation {measure} while trained")
        steps.set(xlabel="inner steps", ylabel=f"query {measure} on these tasks")
        _set_scale(learning, steps, more_is_better=more)
        _draw_differences(bottom.subplots(), sides, norms, measure, theme)
    return figure


def _draw_learning(panel: Axes, side: Side, line: Mapping[str, Any]) -> None:
    """Mean over seeds, and a band from the lowest to the highest, at the iterations that all seeds have."""
    curves = [dict(zip(*curve, strict=True)) for curve in side.validation.values()]
    ends = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = [spread([curve[end] for curve in curves]) for end in ends]
    panel.plot(ends, [each["mean"] for each in found], **line)
    if len(curves) > 1:
        low, high = ([each[name] for each in found] for name in ("lowest", "highest"))
        panel.fill_between(ends, low, high, color=line["color"], alpha=0.15, linewidth=0)


def _draw_steps(panel: Axes, side: Side, column: Column, line: Mapping[str, Any]) -> None:
    """With the interval over tasks; the quoted steps have a larger mark."""
    means = [spread(of_runs)["mean"] for of_runs in column.means]
    steps = range(len(means))
    panel.plot(steps, means, **line)
    panel.plot([side.steps], [means[side.steps]], **{**line, "markersize": 7})
    ends = list(zip(means, column.intervals, strict=True))
    low, high = [m - h for m, h in ends], [m + h for m, h in ends]
    panel.fill_between(steps, low, high, color=line["color"], alpha=0.2, linewidth=0)


def _set_scale(learning: Axes, steps: Axes, *, more_is_better: bool) -> None:
    """Of losses a logarithmic one, where it can be: they differ by orders of magnitude."""
    from matplotlib.ticker import LogFormatter, MaxNLocator

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # not all ticks have room for it

    steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (learning, steps):
        low = panel.dataLim.ymin
        if more_is_better:
            panel.set_ylim(top=1.0)
        elif 0 < low < math.inf:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(Plain())
            panel.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.4)))


def _draw_differences(
    panel: Axes, sides: Sequence[Side], norms: Sequence[str], measure: str, theme: Theme
) -> None:
    """A row a side: mean and interval over tasks, and below it a dot for each of several seeds."""
    better = "right" if sides[0].accuracies else "left"
    panel.axvline(0.0, color=theme.grey, linestyle=":")
    for number, (side, norm) in enumerate(zip(sides, norms, strict=True)):
        look = curve_style(number, theme)
        colour, marker = look["color"], look["marker"]
        found = difference(side, sides[0], (norm, norms[0]))
        half = [found.interval if number else 0.0]
        panel.errorbar([found.mean], [number], xerr=half, fmt=marker, color=colour, capsize=3, markersize=6)
        if len(found.by_seed) > 1 and number:
            seeds = list(found.by_seed.values())
            panel.plot(seeds, [number + 0.25] * len(seeds), "o", color=colour, markersize=2.5)
    panel.set_yticks(range(len(sides)), [_shown(side.name) for side in sides])
    panel.set_ylim(len(sides) - 0.5, -0.5)
    panel.set_xlabel(
        f"{measure}: paired difference to the first, 95 % interval over tasks (better: {better})"
    )

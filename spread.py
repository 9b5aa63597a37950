"""Many runs side by side: mean and spread over seeds, as tables, plain values and pictures.

The spread over seeds (lowest to highest) and the interval over test tasks are two things, and stand apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation import Evaluation
from report import BLUE, GREEN, GREY, ORANGE, RED, Words, new_figure, of_the_rest, style, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outcome = Mapping[str, Any]  # of a run: see `several.outcome_of`
COLOURS = [BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#F0E442", GREY]
ALL = "all"  # where there is but one setting


def by_setting(runs: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Runs that differ in their seed alone, by setting."""
    found: dict[str, list[Outcome]] = {}
    for run in runs:
        found.setdefault(run["setting"] or ALL, []).append(run)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Of the same number in several runs."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "runs": len(values),
        "mean": statistics.fmean(values),
        "standard_deviation": deviation,
        "lowest": min(values),
        "highest": max(values),
    }


def _in_words(values: Sequence[float], scale: float, digits: int) -> str:
    """`mean (lowest to highest)`."""
    if not values:
        return "-"
    mean, low, high = (scale * v for v in (statistics.fmean(values), min(values), max(values)))
    return f"{mean:.{digits}f}" + f" ({low:.{digits}f} to {high:.{digits}f})" * (len(values) > 1)


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
        ("runs", "", [str(len(group)) for group in groups.values()]),
        ("training loss", "", [_in_words(_known(g, "final_training_loss"), 1, 4) for g in groups.values()]),
        (best, "", [_in_words(_known(g, "best_validation"), scale, digits) for g in groups.values()]),
        ("at iteration", "", [_in_words(_known(g, "best_iteration"), 1, 0) for g in groups.values()]),
    ]
    if list(groups) == [ALL]:
        columns = columns[1:]
    return f"{table(columns)}\nMean over runs that differ in their seed (lowest to highest)."


def training_record(runs: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers behind the table, and the runs behind the numbers."""
    names = ("final_training_loss", "best_validation", "best_iteration")
    settings = {
        setting: {n: spread(_known(group, n)) for n in names if _known(group, n)}
        for setting, group in by_setting(runs).items()
    }
    return {"settings": settings, "runs": list(runs)}


def training_figure(runs: Sequence[Outcome]) -> Figure:
    """Validation over iterations: each run, and the mean of each setting's."""
    measure = runs[0]["measure"]
    with style():
        figure = new_figure(6.5, 3.6)
        panel = figure.subplots()
        groups = by_setting(runs)
        for number, (setting, group) in enumerate(groups.items()):
            colour = COLOURS[number % len(COLOURS)]
            for run in group:
                curve = run["validation"]
                panel.plot(curve["iteration"], curve[measure], color=colour, alpha=0.35, linewidth=0.8)
            length = min(len(run["validation"]["iteration"]) for run in group)
            means = [statistics.fmean(r["validation"][measure][i] for r in group) for i in range(length)]
            ends = group[0]["validation"]["iteration"][:length]
            label = f"{'' if setting == ALL else setting + ', '}mean of {len(group)}"
            panel.plot(ends, means, "o-", color=colour, markersize=3, label=label)
        panel.set(xlabel="iteration")
        panel.set_ylabel(
            "validation accuracy" if measure == "query_accuracy" else f"validation {_loss_name(runs)}"
        )
        if len(groups) <= 12:
            figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure


# ---- test ----------------------------------------------------------------------------------------


def test_table(results: Mapping[str, Sequence[Evaluation]], words: Words) -> str:
    """A row an inner step, a column a setting: mean over seeds, ± the interval over tasks, and the spread.

    Tasks that have diverged are left out, and counted where there are any.
    """
    some = next(iter(results.values()))[0]
    rows = max(losses.shape[1] for of_seeds in results.values() for losses in of_seeds[0].losses.values())
    scale, digits = (100, 2) if some.accuracies else (1, 4)
    columns: list[tuple[str, str, Sequence[str]]] = [("steps", "", [str(step) for step in range(rows)])]
    for setting, evaluations in results.items():
        for norm in evaluations[0].losses:
            pairs = [of_the_rest(each, norm) for each in evaluations]  # by seed and step
            cells = []
            for step in range(len(pairs[0])):
                means = [of_seed[step][0].item() for of_seed in pairs]
                interval = statistics.fmean(of_seed[step][1].item() for of_seed in pairs)
                inside = f" ({scale * min(means):.{digits}f} to {scale * max(means):.{digits}f})"
                mean = f"{scale * statistics.fmean(means):.{digits}f} ± {scale * interval:.{digits}f}"
                cells.append(mean + inside * (len(means) > 1))
            title = setting if setting != ALL else "accuracy %" if some.accuracies else words.loss_name
            missing = [""] * (rows - len(cells))
            columns.append((title, norm * (len(evaluations[0].losses) > 1), [*cells, *missing]))
            diverged = sum(each.diverged(norm).sum(0) for each in evaluations)
            counts = [int(n) for n in diverged]  # type: ignore[union-attr]
            if any(counts):
                columns.append(("diverged", "", [*map(str, counts), *missing]))
    marks = ["trained for" if step == words.trained_steps else "" for step in range(rows)]
    columns.append(("", "", marks))
    measure = "accuracy %" if some.accuracies else words.loss_name
    tasks = len(next(iter(some.losses.values())))
    runs = sorted({len(each) for each in results.values()})
    of_runs = " or ".join(map(str, runs))
    return (
        f"{table(columns)}\nQuery {measure}: mean over {of_runs} runs of each setting ± the mean 95 % "
        f"interval over {tasks} tasks\nthat have not diverged (lowest to highest run)."
    )


def test_record(results: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """By setting and normalisation, after each inner step: the spread of the runs' means."""
    found: dict[str, Any] = {}
    for setting, evaluations in results.items():
        for norm in evaluations[0].losses:
            pairs = [of_the_rest(each, norm) for each in evaluations]
            found.setdefault(setting, {})[norm] = [
                spread([of_seed[step][0].item() for of_seed in pairs])
                | {"interval_95_over_tasks": statistics.fmean(s[step][1].item() for s in pairs)}
                for step in range(len(pairs[0]))
            ]
    return found


def test_figure(results: Mapping[str, Sequence[Evaluation]], words: Words) -> Figure:
    """The runs' means over inner steps, and their mean, by setting; with the first normalisation."""
    from matplotlib.ticker import MaxNLocator

    accuracies = bool(next(iter(results.values()))[0].accuracies)
    with style():
        figure = new_figure(5.5, 3.6)
        panel = figure.subplots()
        panel.set_title(words.title)
        for number, (setting, evaluations) in enumerate(results.items()):
            colour = COLOURS[number % len(COLOURS)]
            norm = next(iter(evaluations[0].losses))
            curves = [[mean.item() for mean, _ in of_the_rest(each, norm)] for each in evaluations]
            for curve in curves:
                panel.plot(range(len(curve)), curve, color=colour, alpha=0.35, linewidth=0.8)
            means = [statistics.fmean(at) for at in zip(*curves, strict=True)]
            label = f"{'' if setting == ALL else setting + ', '}mean of {len(curves)}"
            panel.plot(range(len(means)), means, "o-", color=colour, markersize=3, label=label)
        if words.trained_steps is not None:
            panel.axvline(words.trained_steps, color=GREY, linestyle=":", label="trained for")
        panel.set(xlabel="inner steps", ylabel="accuracy" if accuracies else words.loss_name)
        panel.set_ylim(bottom=None if accuracies else 0.0, top=1.0 if accuracies else None)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(results) <= 12:
            figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure

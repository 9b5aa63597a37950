"""Pictures of results: over inner steps (--eval), of methods side by side (--baselines), and while learning.

Tasks that have diverged are left out of every mean, and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from evaluation import style
from evaluation.examples import Examples, draw_fits
from evaluation.meta_test import Evaluation
from evaluation.tables import Caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@style.styled()
def evaluation_figure(evaluation: Evaluation, caption: Caption, curves: Examples | None = None) -> Figure:
    """Draw the result over inner steps with its 95 % interval and, for curves, example fits."""
    tasks = len(curves.outputs) if curves else 0
    figure = style.new_figure(4.2 + 2.6 * tasks, 3.1)
    figure.suptitle(caption.title)
    panels = figure.subplots(1, 1 + tasks, squeeze=False, width_ratios=[1.5] + [1] * tasks)[0]
    results = {name: evaluation.select(name) for name in evaluation.losses}
    _draw_results(panels[0], results if len(results) > 1 else {"mean and 95 % interval": evaluation}, caption)
    mark_trained_steps(panels[0], caption.trained_steps)
    if curves:
        draw_fits(panels[1:], curves)
        style.add_legend(figure, panels[1], "right")
    style.add_legend(figure, panels[0], "left" if curves else "center")
    return figure


def _draw_results(panel: Axes, results: Mapping[str, Evaluation], caption: Caption) -> None:
    """Draw results with one normalisation over inner steps; one that is not adapted is a horizontal line."""
    for number, (label, evaluation) in enumerate(results.items()):
        (normalisation,) = evaluation.losses
        mean, interval = evaluation.intervals(normalisation)
        diverged = int(evaluation.diverged(normalisation).any(1).sum())
        if diverged:
            label += f"\n(without the {diverged} task{'s' * (diverged > 1)} that diverged)"
        if evaluation.steps:
            draw_over_steps(panel, mean, interval, label, number)
        else:
            panel.axhline(mean.item(), color=style.GREY, linestyle="--", label=label)
    first = next(iter(results.values()))
    style.set_measure_axis(panel, caption.measure(first), accuracy=bool(first.accuracies))


def draw_over_steps(panel: Axes, mean: Tensor, interval: Tensor, label: str, number: int) -> None:
    """Draw curve number `number`: mean and half width of the interval, `[steps + 1]` each."""
    look, steps = style.curve_style(number), range(len(mean))
    panel.plot(steps, mean.numpy(), label=label, **look)
    low, high = (mean - interval).numpy(), (mean + interval).numpy()
    panel.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
    style.set_step_axis(panel)


def mark_trained_steps(panel: Axes, steps: int | None) -> None:
    """Mark the number of inner steps that the learner was trained for."""
    if steps is not None:
        panel.axvline(steps, color=style.GREY, linestyle=":", label="trained for")


@style.styled()
def comparison_figure(
    results: Mapping[str, Evaluation],
    caption: Caption,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
) -> Figure:
    """Draw methods over inner steps and, where there are any, their losses while training.

    Args:
        results: by method, with one normalisation.
        curves: by method, the last iteration of each window and the mean loss in it.
    """
    figure = style.new_figure(5.5 + 4.5 * bool(curves), 3.6)
    figure.suptitle(caption.title)
    panels = figure.subplots(1, 1 + bool(curves), squeeze=False)[0]
    _draw_results(panels[0], results, caption)
    style.add_legend(figure, panels[0])
    for number, (name, (ends, losses)) in enumerate(curves.items()):
        look = style.curve_style(number) | ({"marker": None} if len(ends) > 1 else {})
        panels[1].plot(ends, losses, linewidth=1.2, label=name, **look)
        label = f"query {caption.loss_name}, means of {ends[0]:,} iterations"
        style.set_measure_axis(panels[1], label, accuracy=False)
    if curves:
        style.set_iteration_axis(panels[1])
        panels[1].legend()
    return figure


@style.styled()
def learning_figure(
    training: Mapping[str, Sequence[float]],
    validation: Mapping[str, Sequence[float]],
    *,
    measure: str,
    label: str,
    log_every: int,
) -> Figure:
    """Draw training means over consecutive windows of `log_every` iterations, and validation.

    Args:
        training, validation: values by name; "iteration" and `measure` are drawn.
    """
    figure = style.new_figure(6, 3.4)
    panel = figure.subplots()
    window = f"training, means of {log_every:,} iteration{'s' * (log_every > 1)}"
    panel.plot(training["iteration"], training[measure], color=style.BLUE, linewidth=0.9, label=window)
    panel.plot(validation["iteration"], validation[measure], "o-", color=style.ORANGE, label="validation")
    style.set_iteration_axis(panel)
    style.set_measure_axis(panel, label, accuracy=measure == "query_accuracy")
    style.add_legend(figure, panel)
    return figure

"""What people look at: TensorBoard, figures, tables and result files. Nothing else writes them.

Functions take plain numbers and CPU tensors; matplotlib and TensorBoard are imported when used.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation import Evaluation, mean_and_interval
from files import write_whole
from tasks import TaskBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from using import Task

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
DPI = 120


# ---- TensorBoard ----------------------------------------------------------------------------


class RunLog:
    """The event files of a run's folder.

    `begin_at` is the first iteration that this process writes: points from there on that a killed
    predecessor left behind are dropped.
    """

    def __init__(self, folder: Path, *, begin_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _drop_events(folder, begin_at)
        _wait_for_a_later_second(folder)
        self.writer = SummaryWriter(str(folder), purge_step=begin_at)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # one event for all: `add_scalar` for each would cost a fast run a tenth of its time
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        self.writer._get_file_writer().add_summary(summary, iteration)

    def text(self, tag: str, text: str, iteration: int) -> None:
        self.writer.add_text(tag, text, iteration)

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None:
        """Shows a figure, and writes the same picture to a PNG file; drawing it is the slow part."""
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.writer.add_image(tag, pixels, iteration, dataformats="HWC")
        write_whole(file, lambda opened: Image.fromarray(pixels).save(opened, format="png"))

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class NoLog:
    """The log of a process that writes none."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None: ...

    def text(self, tag: str, text: str, iteration: int) -> None: ...

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _drop_events(folder: Path, begin_at: int) -> None:
    """Removes what lies at or after an iteration from the folder's event files.

    TensorBoard's own way, `purge_step`, is unknown to the server that `tensorboard` starts by default.
    A file with nothing to drop, or that cannot be read, stays as it is.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in filter(Path.is_file, folder.glob("events.out.tfevents.*")):
        try:
            records = [(record, Event.FromString(record)) for record in RawEventFileLoader(str(path)).Load()]
        except DecodeError:
            continue
        kept = [r for r, event in records if event.step < begin_at or event.HasField("file_version")]
        if len(kept) == len(records):
            continue

        def write(file: IO[bytes], kept: list[bytes] = kept) -> None:
            writer = RecordWriter(file)
            for record in kept:
                writer.write(record)

        write_whole(path, write)


def _wait_for_a_later_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the second of their birth.

    A run that goes on within the second in which its predecessor began would be read before it.
    """
    stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    births = [int(stamp) for stamp in stamps if stamp.isdigit()]
    while births and 0 <= max(births) - int(time.time()) <= 1:
        time.sleep(0.05)


def settings_as_markdown(settings: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"| setting | value |\n|-|-|\n{rows}"


# ---- result files ---------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON has neither tensors nor NaN: lists with seven digits, and null."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    text = json.dumps(_plain(result), indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    import csv

    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def write_figure(path: Path, figure: Figure) -> None:
    write_whole(path, lambda file: figure.savefig(file, dpi=DPI, format="png"))


# ---- evaluation: table and record -----------------------------------------------------------


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers behind table and picture, and the per-task values behind the numbers."""
    per_step: list[dict[str, Any]] = []
    for name, losses in evaluation.losses.items():
        diverged = evaluation.diverged(name)
        for step in range(losses.shape[1]):
            row: dict[str, Any] = {"normalisation": name, "steps": step}
            measures = {"loss": losses}
            if name in evaluation.accuracies:
                measures["accuracy"] = evaluation.accuracies[name]
            for measure, values in measures.items():
                mean, interval = mean_and_interval(values[:, step])
                row |= {measure: mean.item(), f"{measure}_interval_95": interval.item()}
            kept = losses[~diverged[:, step], step]
            ordered = losses[:, step].nan_to_num(nan=math.inf).sort().values
            row |= {
                "loss_median": ordered[len(ordered) // 2].item(),
                "loss_without_worst_percent": ordered[: math.ceil(0.99 * len(ordered))].mean().item(),
                "diverged_tasks": int(diverged[:, step].sum()),
                "loss_without_diverged": kept.mean().item() if len(kept) else None,
                "loss_without_diverged_interval_95": mean_and_interval(kept)[1].item() if len(kept) else None,
            }
            per_step.append(row)
    per_task: dict[str, Any] = {"loss": evaluation.losses}
    if evaluation.accuracies:
        per_task["accuracy"] = evaluation.accuracies
    return {"per_step": per_step, "per_task": per_task}


def _with_interval(values: Tensor, scale: float, digits: int) -> list[str]:
    """`mean ± half width` for each inner step of `[tasks, steps + 1]`."""
    mean, interval = mean_and_interval(values * scale)
    pairs = zip(mean.tolist(), interval.tolist(), strict=True)
    return [f"{m:.{digits}f} ± {i:.{digits}f}" for m, i in pairs]


def table(columns: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Right-aligned columns of (title, subtitle, cells)."""
    rows = [row for row in zip(*([t, s, *cells] for t, s, cells in columns), strict=True) if any(row)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@dataclass(frozen=True)
class Words:
    """What tables and figures say about an evaluation."""

    loss_name: str
    trained_steps: int | None  # None: of several runs, not the same for all
    test_steps: int  # whose result is quoted
    title: str


def evaluation_table(evaluation: Evaluation, words: Words) -> str:
    """A row an inner step: mean and 95 % interval over tasks, and the tasks that diverged, if any did."""
    loss_name, test_steps = words.loss_name, words.test_steps
    tasks, rows = next(iter(evaluation.losses.values())).shape
    subtitles = {name: name if len(evaluation.losses) > 1 else "" for name in evaluation.losses}
    columns: list[tuple[str, str, Sequence[str]]] = [("steps", "", [str(step) for step in range(rows)])]
    quoted: list[str] = []
    measures = [("accuracy %", evaluation.accuracies, 100, 2), (loss_name, evaluation.losses, 1, 4)]
    for title, results, scale, digits in measures:
        for name, values in results.items():
            cells = _with_interval(values, scale, digits)
            columns.append((title, subtitles[name], cells))
            quoted.append(f"{title} {cells[test_steps]}" + f" ({name})" * bool(subtitles[name]))
    diverged_at_all = False
    for name, losses in evaluation.losses.items():
        diverged = evaluation.diverged(name)
        if diverged.any():
            diverged_at_all = True
            kept = losses.where(~diverged, torch.nan).nanmean(0).tolist()
            columns.append(("diverged", subtitles[name], [str(n) for n in diverged.sum(0).tolist()]))
            columns.append((f"{loss_name} of the rest", subtitles[name], [f"{value:.4f}" for value in kept]))
    marks = ["trained for" if step == words.trained_steps else "" for step in range(rows)]
    columns.append(("", "", marks))
    footer = f"Mean and 95 % interval over {tasks} tasks"
    footer += "." if diverged_at_all else "; none of them diverged."
    steps = f"{test_steps} step{'s' * (test_steps != 1)}"
    return f"{table(columns)}\n{footer}\nAfter {steps}: {', '.join(quoted)}"


def comparison_table(results: Mapping[str, Evaluation], normalisation: str, words: Words) -> str:
    """Methods side by side, a row an inner step: mean and 95 % interval over the same tasks.

    Tasks that have diverged are left out, and counted where there are any. `results` by name, with the
    second line of the title behind a line break.
    """
    rows = max(next(iter(e.losses.values())).shape[1] for e in results.values())
    columns: list[tuple[str, str, Sequence[str]]] = [("steps", "", [str(step) for step in range(rows)])]
    for name, evaluation in results.items():
        title, _, subtitle = name.partition("\n")
        scale, digits = (100, 2) if evaluation.accuracies else (1, 4)
        pairs = [[x.item() * scale for x in pair] for pair in of_the_rest(evaluation, normalisation)]
        cells = [f"{mean:.{digits}f} ± {interval:.{digits}f}" for mean, interval in pairs]
        missing = [""] * (rows - len(cells))
        columns.append((title, subtitle, [*cells, *missing]))
        diverged = evaluation.diverged(normalisation).sum(0).tolist()
        if any(diverged):
            columns.append(("diverged", "", [*map(str, diverged), *missing]))
    measure = "accuracy %" if next(iter(results.values())).accuracies else words.loss_name
    tasks = len(next(iter(next(iter(results.values())).losses.values())))
    return (
        f"{table(columns)}\nQuery {measure} over {tasks} test tasks: mean and 95 % interval of those that "
        "have not diverged."
    )


def of_the_rest(evaluation: Evaluation, normalisation: str) -> list[tuple[Tensor, Tensor]]:
    """Mean and half width of the interval after each step, over the tasks that have not diverged."""
    values = (evaluation.accuracies or evaluation.losses)[normalisation]
    kept = ~evaluation.diverged(normalisation)
    return [mean_and_interval(v[k]) for v, k in zip(values.unbind(1), kept.unbind(1), strict=True)]


# ---- figures --------------------------------------------------------------------------------


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def fits_figure(batch: TaskBatch, outputs: Tensor, steps: Sequence[int], title: str) -> Figure:
    """Curves before and after adaptation, a panel a task.

    `batch` has a dense query; `outputs` is `[tasks, all steps + 1, points, 1]`, of which `steps` are
    shown.
    """
    with style():
        tasks = len(outputs)
        figure = new_figure(3.0 * tasks, 2.7)
        figure.suptitle(title)
        panels = figure.subplots(1, tasks, squeeze=False)[0]
        _draw_fits(panels, batch, outputs, steps)
        _legend_below(figure, panels[0])
    return figure


def _draw_fits(panels: Sequence[Axes], batch: TaskBatch, outputs: Tensor, steps: Sequence[int]) -> None:
    for task, panel in enumerate(panels):
        x = batch.query_x[task, :, 0].numpy()
        truth = batch.query_y[task, :, 0].numpy()
        panel.plot(x, truth, color=GREY, linewidth=3, alpha=0.5, label="task")
        colours = [GREEN, ORANGE, BLUE][-len(steps) :]
        for step, colour in zip(steps, colours, strict=True):
            line = ":" if step == 0 else "-"
            label = "before" if step == 0 else f"after {step} step{'s' * (step > 1)}"
            panel.plot(x, outputs[task, step, :, 0].numpy(), line, color=colour, label=label)
        support_x, support_y = batch.support_x[task, :, 0].numpy(), batch.support_y[task, :, 0].numpy()
        panel.scatter(support_x, support_y, color=RED, s=18, zorder=3, label="support")
        margin = 0.3 * float(truth.max() - truth.min()) + 0.5
        panel.set_ylim(float(truth.min()) - margin, float(truth.max()) + margin)
        panel.set_xlabel("x")
    panels[0].set_ylabel("y")


def _legend_below(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def tasks_figure(
    batch: TaskBatch, outputs: Tensor, *, ways: int, shots: int, queries: int, step: int, title: str
) -> Figure:
    """Image tasks side by side: support on the left, query with predictions on the right.

    A row a class; a query's border and label say which class was predicted, blue where it is right.
    `outputs` is `[tasks, all steps + 1, ways * queries, ways]`.
    """
    ways_shown, shots_shown, queries_shown = min(ways, 10), min(shots, 5), min(queries, 5)
    columns = shots_shown + queries_shown
    tasks = len(outputs)
    with style():
        figure = new_figure(tasks * (0.55 * columns + 0.6), 0.68 * ways_shown + 0.7)
        figure.suptitle(title)
        grid = figure.add_gridspec(1, tasks, wspace=0.08)
        for task in range(tasks):
            predicted = outputs[task, step].argmax(-1).view(ways, queries)
            support = batch.support_x[task].view(ways, shots, *batch.support_x.shape[2:]).numpy()
            query = batch.query_x[task].view(ways, queries, *batch.query_x.shape[2:]).numpy()
            panels = grid[task].subgridspec(ways_shown, columns).subplots(squeeze=False)
            for way in range(ways_shown):
                for column, panel in enumerate(panels[way]):
                    panel.set(xticks=[], yticks=[])
                    panel.grid(False)
                    panel.spines[:].set_visible(True)
                    if column < shots_shown:
                        _show_image(panel, support[way, column])
                        panel.spines[:].set_color(GREY)
                    else:
                        answer = int(predicted[way, column - shots_shown])
                        colour = BLUE if answer == way else RED
                        _show_image(panel, query[way, column - shots_shown])
                        panel.spines[:].set(color=colour, linewidth=2)
                        panel.set_xlabel(str(answer), color=colour, fontsize=7, labelpad=1)
                panels[way, 0].set_ylabel(str(way), rotation=0, fontsize=7, labelpad=6, va="center")
            panels[0, 0].set_title("support", fontsize=7)
            panels[0, shots_shown].set_title("query", fontsize=7)
    return figure


def _show_image(panel: Axes, image: Any) -> None:
    """`[channels, height, width]` in [0, 1]: grey with ink = 1, or colour."""
    if len(image) == 1:
        panel.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
    else:
        panel.imshow(image.transpose(1, 2, 0).clip(0, 1))


def evaluation_figure(
    evaluation: Evaluation,
    words: Words,
    fits: tuple[TaskBatch, Tensor, Sequence[int]] | None = None,
) -> Figure:
    """The result over inner steps with its 95 % interval and, for regression, example fits."""
    with style():
        tasks = len(fits[0].query_x) if fits else 0
        figure = new_figure(4.2 + 2.6 * tasks, 3.0)
        figure.suptitle(words.title)
        panels = figure.subplots(1, 1 + tasks, squeeze=False, width_ratios=[1.5] + [1] * tasks)[0]
        results = evaluation.accuracies or evaluation.losses
        for (name, values), colour in zip(results.items(), [BLUE, ORANGE, GREEN], strict=False):
            label = name if len(results) > 1 else "mean and 95 % interval"
            mean, interval = mean_and_interval(values)
            _draw_over_steps(panels[0], mean, interval, label, colour)
        panels[0].axvline(words.trained_steps, color=GREY, linestyle=":", label="trained for")
        panels[0].set_xlabel("inner steps")
        panels[0].set_ylabel("accuracy" if evaluation.accuracies else words.loss_name)
        panels[0].set_ylim(**({"top": 1.0} if evaluation.accuracies else {"bottom": 0.0}))
        panels[0].legend(fontsize=7)
        if fits:
            _draw_fits(panels[1:], *fits)
            _legend_below(figure, panels[1])
    return figure


def _draw_over_steps(panel: Axes, mean: Tensor, interval: Tensor, label: str, colour: str) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = range(len(mean))
    panel.plot(steps, mean.numpy(), "o-", color=colour, markersize=3, label=label)
    low, high = (mean - interval).numpy(), (mean + interval).numpy()
    panel.fill_between(steps, low, high, color=colour, alpha=0.2)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def comparison_figure(
    results: Mapping[str, Evaluation],
    normalisation: str,
    words: Words,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
) -> Figure:
    """Methods over inner steps and, where there are any, their losses over the iterations of training.

    Tasks that have diverged are left out.
    """
    with style():
        figure = new_figure(5.5 + 4.5 * bool(curves), 3.4)
        figure.suptitle(words.title)
        panels = figure.subplots(1, 1 + bool(curves), squeeze=False)[0]
        colours = dict(zip(results, [BLUE, ORANGE, GREEN, RED, "#CC79A7"], strict=False))
        for name, evaluation in results.items():
            mean, interval = (
                torch.stack(p) for p in zip(*of_the_rest(evaluation, normalisation), strict=True)
            )
            label = name.replace("\n", ", ")
            if len(mean) == 1:
                panels[0].axhline(mean.item(), color=GREY, linestyle="--", label=label)
            else:
                _draw_over_steps(panels[0], mean, interval, label, colours[name])
        accuracies = next(iter(results.values())).accuracies
        panels[0].set(
            xlabel="inner steps", ylabel="query accuracy" if accuracies else f"query {words.loss_name}"
        )
        panels[0].set_ylim(**({"top": 1.0} if accuracies else {"bottom": 0.0}))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
        for (name, (ends, losses)), colour in zip(curves.items(), [BLUE, ORANGE], strict=False):
            marker = "o" if len(ends) == 1 else None
            panels[1].plot(ends, losses, marker=marker, color=colour, linewidth=1.2, label=name)
            panels[1].set(
                xlabel="iteration", ylabel=f"query {words.loss_name}, means of {ends[0]} iterations"
            )
        if curves:
            panels[1].set_ylim(bottom=0.0)
            panels[1].legend(fontsize=7)
    return figure


def learning_figure(
    training: Mapping[str, Sequence[float]],
    validation: Mapping[str, Sequence[float]],
    *,
    measure: str,
    label: str,
    log_every: int,
) -> Figure:
    """Training means over consecutive, disjoint windows of iterations, and validation."""
    with style():
        figure = new_figure(6, 3.2)
        panel = figure.subplots()
        window = f"training, means of {log_every} iteration{'s' * (log_every > 1)}"
        panel.plot(training["iteration"], training[measure], color=BLUE, alpha=0.6, linewidth=1, label=window)
        panel.plot(
            validation["iteration"], validation[measure], "o-", color=ORANGE, markersize=3, label="validation"
        )
        panel.set_xlabel("iteration")
        panel.set_ylabel(label)
        panel.legend()
    return figure


# ---- predictions on one's own tasks ---------------------------------------------------------

ROWS_PRINTED = 20
IMAGES_SHOWN = 60


def predictions_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first predictions, as the terminal shows them."""
    shown = [[cell[:24] for cell in row] for row in rows[:ROWS_PRINTED]]
    columns = [(title, "", [row[i] for row in shown]) for i, title in enumerate(header)]
    more = f"\n... and {len(rows) - ROWS_PRINTED} more" if len(rows) > ROWS_PRINTED else ""
    return table(columns) + more


def predictions_figure(tasks: Sequence[Task], found: Sequence[Tensor], title: str) -> Figure:
    """A contact sheet of images, or a panel a task: curves, numbers by row, or probabilities by row.

    `found` is, by task, `[query examples, classes]` of probabilities or `[query examples, targets]`.
    """
    if tasks[0].support_x.dim() == 4:
        return _contact_sheet(tasks[0], found[0], title)
    with style():
        shown = min(len(tasks), 6)
        figure = new_figure(3.4 * shown + 0.6, 3.0)
        figure.suptitle(title)
        panels = figure.subplots(1, shown, squeeze=False)[0]
        for panel, task, predicted in zip(panels, tasks, found, strict=False):
            panel.set_title(task.name)
            if task.classes:
                _draw_shares(panel, task, predicted)
            elif task.support_x.shape[-1] == 1:
                _draw_curve(panel, task, predicted)
            else:
                for target, values in enumerate(predicted.unbind(1)):
                    panel.plot(range(len(values)), values.numpy(), "o", markersize=3, label=f"{target}")
                panel.set(xlabel="predicted row", ylabel="prediction")
        _legend_below(figure, panels[0])
    return figure


def _draw_curve(panel: Axes, task: Task, predicted: Tensor) -> None:
    order = task.query_x[:, 0].argsort()
    x = task.query_x[order, 0].numpy()
    for target in range(predicted.shape[-1]):
        panel.plot(x, predicted[order, target].numpy(), ".-", color=BLUE, markersize=3, label="predicted")
        panel.scatter(task.support_x[:, 0].numpy(), task.support_y[:, target].numpy(), color=RED, s=18,
                      zorder=3, label="support")  # fmt: skip
    panel.set(xlabel="x", ylabel="y")


def _draw_shares(panel: Axes, task: Task, shares: Tensor) -> None:
    bottom = torch.zeros(len(shares))
    for number, name in enumerate(task.classes):
        panel.bar(range(len(shares)), shares[:, number].numpy(), bottom=bottom.numpy(), width=1.0, label=name)
        bottom = bottom + shares[:, number]
    panel.set(xlabel="predicted row", ylabel="probability")


def _contact_sheet(task: Task, shares: Tensor, title: str) -> Figure:
    """Labelled images, a row a class, above those that were predicted, with class and probability."""
    columns, classes = 10, len(task.classes)
    queries = min(len(task.query_x), IMAGES_SHOWN)
    rows = classes + -(-queries // columns)
    left_out = f" (the first {queries} of {len(task.query_x)})" if queries < len(task.query_x) else ""
    with style():
        figure = new_figure(columns * 1.0, rows * 1.15 + 0.5)
        figure.suptitle(f"{title}{left_out}")
        panels = figure.subplots(rows, columns, squeeze=False)
        for panel in panels.flat:
            panel.set_axis_off()
        for label, name in enumerate(task.classes):
            images = task.support_x[task.support_y == label][:columns]
            for panel, image in zip(panels[label], images, strict=False):
                _show_image(panel, image.float().numpy())
            panels[label, 0].set_title(f"support: {name}", fontsize=7, loc="left", color=GREY)
        for number, panel in zip(range(queries), panels[classes:].flat, strict=False):
            _show_image(panel, task.query_x[number].float().numpy())
            best = int(shares[number].argmax())
            panel.set_title(
                f"{task.classes[best][:12]} {100 * float(shares[number, best]):.0f} %", fontsize=7
            )
    return figure

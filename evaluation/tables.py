"""What people look at: TensorBoard, figures, tables and result files. Nothing else writes them.

Functions take plain numbers and CPU tensors; matplotlib and TensorBoard are imported when used.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commands.config import CONFIG_FLAGS
from common.files import write_whole
from evaluation.meta_test import Evaluation, mean_and_interval
from training.tensorboard import EventFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.summary_pb2 import Summary


DPI = 200  # of pictures in files and in TensorBoard


# What the view of hyper-parameters has columns for, and shows at first.
METRICS = (
    "validation/best_query_accuracy",
    "validation/best_query_loss",
    "validation/query_accuracy",
    "validation/query_loss",
)
CHANGED_MOST = (
    "dataset", "algorithm", "learner", "ways", "shots", "steps", "inner_lr", "meta_lr", "meta_batch_size",
    "seed",
)  # fmt: skip


# Curves that belong together: patterns of tags, by chart and group of charts. They are the same for every
# run, since TensorBoard joins the layouts of all, and shows twice what differs.
CHARTS = {
    "learning": {
        "query accuracy": "^(train|validation)/query_accuracy$",
        "query loss": "^(train|validation)/query_loss$",
    },
    "validation after 0, 1, ... inner steps": {
        "query accuracy": r"^validation_by_step/query_accuracy/\d+$",
        "query loss": r"^validation_by_step/query_loss/\d+$",
    },
    "trouble": {
        "diverged validation tasks": "^validation/diverged_tasks$",
        "norm of the meta-gradient": "^train/meta_gradient_norm$",
        "skipped iterations": "^train/skipped$",
    },
    "outer loop": {
        "iterations a second": "^speed/iterations_per_second$",
        "meta-learning rate": "^optimizer/meta_lr$",
    },
    "learned inner rates": {"of weights and steps": "^inner_lr/"},
}


# ---- TensorBoard ----------------------------------------------------------------------------


class RunLog:
    """What TensorBoard shows of a run, in its folder (see events.py)."""

    def __init__(self, folder: Path, *, begin_at: int) -> None:
        self.events = EventFile(folder, begin_at=begin_at)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # one event for all: one for each would cost a fast run a tenth of its time
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
        self.events.add(summary, iteration)

    def text(self, tag: str, text: str, iteration: int) -> None:
        from torch.utils.tensorboard import summary

        self.events.add(summary.text(tag, text), iteration)

    def begin(self, settings: Mapping[str, Any], tags: Sequence[str]) -> None:
        """What the views of hyper-parameters and of custom scalars show of a run that begins."""
        for each in (experiment_summary(), session_summary(settings), layout_summary(tags)):
            self.events.add(each, 0)

    def end(self, iteration: int, *, failed: bool) -> None:
        """How it ended, for the view of hyper-parameters."""
        self.events.add(end_summary(failed=failed), iteration)

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None:
        """Shows a figure, and writes the same picture to a PNG file; drawing it is the slow part."""
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image
        from torch.utils.tensorboard import summary

        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.events.add(summary.image(tag, pixels, dataformats="HWC"), iteration)
        write_whole(file, lambda opened: Image.fromarray(pixels).save(opened, format="png"))

    def flush(self) -> None:
        """Brings it all to the disk; raises OSError where that cannot be, and keeps it."""
        self.events.flush()


class NoLog:
    """The log of a process that writes none."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None: ...

    def text(self, tag: str, text: str, iteration: int) -> None: ...

    def begin(self, settings: Mapping[str, Any], tags: Sequence[str]) -> None: ...

    def end(self, iteration: int, *, failed: bool) -> None: ...

    def figure(self, tag: str, figure: Figure, iteration: int, file: Path) -> None: ...

    def flush(self) -> None: ...


def _hparams_summary(tag: str, **content: Any) -> Summary:
    """What the plugin for hyper-parameters reads is in the metadata of a summary without a value."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])


def experiment_summary() -> Summary:
    """The columns of the view of hyper-parameters. The same from every run, since TensorBoard takes those of
    the first one for all: every setting that decides a result, those first that are changed most."""
    from tensorboard.plugins.hparams import api_pb2, metadata

    number, truth = api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_BOOL
    kinds: dict[type, Any] = {int: number, float: number, bool: truth}
    columns = [
        api_pb2.HParamInfo(
            name=name,
            description=flag.help,
            type=kinds.get(flag.kind, api_pb2.DATA_TYPE_STRING),
            differs=name in CHANGED_MOST,
        )
        for name, flag in CONFIG_FLAGS.items()
        if flag.group not in ("machine", "logging")
    ]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in METRICS]
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
    return _hparams_summary(metadata.EXPERIMENT_TAG, experiment=experiment)


def session_summary(settings: Mapping[str, Any]) -> Summary:
    """A row of that view: the settings of a run. None is an empty cell."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo()
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        elif value is not None:
            start.hparams[name].string_value = value if isinstance(value, str) else " ".join(value)
    return _hparams_summary(metadata.SESSION_START_INFO_TAG, session_start_info=start)


def end_summary(*, failed: bool) -> Summary:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status)
    return _hparams_summary(metadata.SESSION_END_INFO_TAG, session_end_info=end)


def layout_summary(tags: Sequence[str]) -> Summary:
    """The view of custom scalars: those of `CHARTS` that a run with these tags has curves for."""
    from torch.utils.tensorboard import summary

    charts = {
        group: {
            name: ["Multiline", [pattern]]
            for name, pattern in named.items()
            if any(re.match(pattern, tag) for tag in tags)
        }
        for group, named in CHARTS.items()
    }
    return summary.custom_scalars({group: named for group, named in charts.items() if named})


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


# ---- predictions on one's own tasks ---------------------------------------------------------

ROWS_PRINTED = 20


def predictions_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first predictions, as the terminal shows them."""
    shown = [[cell[:24] for cell in row] for row in rows[:ROWS_PRINTED]]
    columns = [(title, "", [row[i] for row in shown]) for i, title in enumerate(header)]
    more = f"\n... and {len(rows) - ROWS_PRINTED} more" if len(rows) > ROWS_PRINTED else ""
    return table(columns) + more

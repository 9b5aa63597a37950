"""Put a trained initialisation to use: adapt it to tasks of the user's own and predict the rest (--adapt).

    files -> tasks/user_tasks -> UserTask -> MAML.adapt -> predict -> CSV, JSON, picture, weights

From Python, `load` gives a checkpoint's algorithm and weights, `MAML.adapt` adapts them to tensors, and
`predict` applies the result. Tasks are adapted to one after another, since each has its own sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commands.build import build_algorithm, fit_weights, make_writable, print_once, print_settings
from commands.call import Call
from commands.config import Config
from commands.initialisation import Initialisation, Solution
from commands.initialisation import predict as predict
from commands.network import give_network
from commands.outputs import count_outputs, find_ignored_label
from common.batch import Tree, tree_map
from common.device import collect_versions
from common.errors import UsageError, escape_text
from common.files import write_whole
from common.names import as_file_name
from common.optimizers import Weights
from common.task import UserTask
from dataset import GRID_POINTS
from evaluation.predictions import Prediction, predictions_figure, predictions_table, read_predictions
from evaluation.style import write_figure
from evaluation.tables import after_steps, write_csv, write_json
from learners.losses import LOSSES
from learners.reading import Reading
from maml import MAML
from tasks.pixels import Form
from tasks.scales import Scales, undo_scale
from tasks.tables import Columns
from tasks.user_tasks import read_task_arrays, read_task_folder, read_task_table

DIGITS_PRINTED = 6  # of a prediction; files have all


def load(
    path: Path | str, example: Tree, *, outputs: int | None = None, device: str = "cpu", **own_code: str
) -> tuple[MAML, Weights, Weights]:
    """Return the algorithm, the meta-parameters and the running statistics of a checkpoint or run.

    Args:
        example: inputs of some examples, `[examples, ...]`; their shape determines the learner's.
        outputs: number of outputs; None: the classes of the training tasks, or those for one number. Another
            number of classes requires a run with another `--head-init` than learned.
        own_code: names of the user's `learner` and `loss`, where the checkpoint names some.

    Raises UsageError if the file is not a checkpoint, or does not fit.
    """
    start = Initialisation.read(path, own_code, device)
    example = tree_map(lambda part: part.to(start.runtime.device), example)
    outputs = outputs or count_outputs(start.config, torch.zeros(1, 1))
    _, maml = build_algorithm(start.config, start.runtime, outputs, example, saved=start.source)
    return maml, *fit_weights(start.file, start.source, maml, start.config)


def adapt(call: Call, flags: Mapping[str, Any], command: str) -> None:
    """Adapt a checkpoint to each task of --adapt; write predictions, a picture and the adapted weights."""
    assert call.load is not None and call.adapt is not None
    start = Initialisation.read(call.load, flags, call)
    config, scales = start.config, start.source.scales
    tasks = read_tasks(call.adapt, start)
    if call.save_weights and len(tasks) > 1:
        raise UsageError(f"--save-weights {call.save_weights}: there are {len(tasks)} tasks: give one")
    folder, steps = make_writable(call.out or call.load.parent), config.evaluation.test_steps
    print_settings(config, start.runtime, f"Adapting {call.load} to {call.adapt}: {after_steps(steps)}")
    predictions = []
    for task in tasks:
        solution = start.adapt(task)
        predictions.append(_predict(task, start, solution))
    stem, digits = f"{folder / call.load.stem}-adapted-{call.adapt.stem}", 10 if scales else 7
    header, rows = _tabulate(tasks, predictions, digits=digits)
    print(predictions_table(*_tabulate(tasks, predictions, digits=DIGITS_PRINTED)))
    if words := _describe_predictions(predictions[0], solution.reading, config):
        print(words)
    record = {
        "command": command,
        "checkpoint": call.load,
        "adapted_to": call.adapt,
        "steps": steps,
        "batch_norm": start.normalisation if solution.maml.has_batch_norm else None,
        "tasks": [
            {"task": t.name or None, "classes": t.classes, "query": t.query_names, "predicted": p.columns}
            for t, p in zip(tasks, predictions, strict=True)
        ],
        "settings": config.values(),
        "versions": collect_versions(),
        "device": start.runtime.describe(),
    }
    tasks = [_convert_units(task, scales) for task in tasks]
    write_csv(Path(f"{stem}.csv"), header, rows)
    title = f"{escape_text(call.adapt.name)}: {after_steps(steps)}"
    write_figure(Path(f"{stem}.png"), predictions_figure(tasks, predictions, title))
    write_json(Path(f"{stem}.json"), record, digits)
    arrays = write_arrays(stem, tasks, predictions)
    print(f"Written: {', '.join([f'{stem}.csv', *arrays])}, .png and .json")
    if len(tasks) == 1:
        print(give_network(call.save_weights, Path(f"{stem}-weights.pt"), start, solution, task))


def _predict(task: UserTask, start: Initialisation, solution: Solution) -> Prediction:
    """Return predictions of a task's query and, of a curve, those between its points."""
    prediction = _read(task, start, solution)
    if (grid := _make_grid(task)) is not None and not solution.maml.has_batch_norm:  # it sees its batch
        between = _read(replace(task, query_x=grid), start, solution)
        prediction.between = undo_scale(grid.cpu(), start.source.scales, "input")[:, 0], between
    return prediction


def _make_grid(task: UserTask) -> Tensor | None:
    """Return dense inputs over those of a curve's task, `[GRID_POINTS, 1]`; None if it has other inputs."""
    if task.classes or task.support_x.dim() != 2 or task.support_x.shape[1] != 1:
        return None
    inputs = torch.cat([task.support_x, task.query_x])
    ends = inputs.min().item(), inputs.max().item()
    return torch.linspace(*ends, GRID_POINTS, device=inputs.device, dtype=inputs.dtype)[:, None]


def _convert_units(task: UserTask, scales: Scales) -> UserTask:
    """Return a task of a table in the table's units."""
    support_x, query_x = (undo_scale(x.cpu(), scales, "input") for x in (task.support_x, task.query_x))
    support_y = task.support_y if task.classes else undo_scale(task.support_y.cpu(), scales, "target")
    return replace(task, support_x=support_x, query_x=query_x, support_y=support_y)


def _read(task: UserTask, start: Initialisation, solution: Solution) -> Prediction:
    """Return what the outputs for a task's query predict."""
    options, learner, count = start.config.tasks, start.config.learner, task.support_y[:1].numel()
    columns = Columns.parse(options.columns).targets
    has_names = options.dataset.startswith("table:") or len(columns) == count
    targets = columns if has_names else [f"y{n + 1}" for n in range(count)]
    predicts_targets = learner.loss in LOSSES or learner.outputs == "numbers"
    outputs, numbers, deviations = start.outputs(solution, task)
    parts = outputs, numbers, solution.reading, task.classes, targets
    return read_predictions(*parts, predicts_targets=predicts_targets, deviations=deviations)


def _describe_predictions(prediction: Prediction, reading: Reading, config: Config) -> str:
    """Return what the columns are where the loss is the user's, who alone knows it."""
    if config.learner.loss in LOSSES:
        return ""
    if reading.kind == "classes":
        return "p: the outputs if they sum to 1, else their softmax"
    if reading.kind == "numbers" and not prediction.of_targets:
        return "Outputs are as the learner gives them (--outputs says what they are)"
    return f"The outputs are {reading.describe()}"


def write_arrays(stem: str, tasks: Sequence[UserTask], predictions: Sequence[Prediction]) -> list[str]:
    """Write dense outputs as .npy files; return their names."""
    files = []
    for number, prediction in enumerate(predictions, 1):
        for name, array in prediction.arrays.items():
            task = f"-{number}" if len(tasks) > 1 else ""
            path = Path(f"{stem}{task}-{as_file_name(name)}.npy")
            write_whole(path, partial(np.save, arr=array.numpy()))
            files.append(str(path))
    return files


def read_tasks(path: Path, start: Initialisation) -> list[UserTask]:
    """Return the tasks of a folder of images, or of a table; UsageError unless the checkpoint fits them."""
    config, source, runtime = start.config, start.source, start.runtime
    options, place = config.tasks, (runtime.device, runtime.dtype)
    images = options.facts.inputs == "images"
    if not path.exists():
        raise UsageError(f"--adapt {path}: there is no such file or folder")
    arrays = path.suffix == ".npz"
    if path.suffix == ".npy":
        three = "numpy.savez('task.npz', support_x=..., support_y=..., query_x=...)"
        raise UsageError(f"--adapt {path} is one array: give three, which {three} writes")
    if images != path.is_dir() and not arrays:
        what = "images: give a folder" if images else "numbers: give a table"
        what += " or an .npz of support_x, support_y and query_x"
        raise UsageError(f"--adapt {path}: the checkpoint learned from {what}")
    if arrays:
        if images and options.invert:
            print_once(f"main.py: {path}: pixels are taken as the network gets them: ink is 1 (--invert)")
        fixed_head = config.choices.head_init == "learned"
        task = read_task_arrays(
            path,
            source.scales,
            *place,
            classification=options.classification,
            ways=options.ways if isinstance(options.ways, int) and fixed_head else None,
            ignored=find_ignored_label(config),
            images=images,
        )
        tasks = [task]
    elif images:
        tasks = [read_task_folder(path, Form.of(options), source.image_range, *place)]
    else:
        columns = Columns.parse(options.columns, options.exclude_columns)
        # the inputs are those of training, whatever their order here
        columns = replace(columns, inputs=columns.inputs or tuple(source.inputs))
        tasks = read_task_table(path, columns, source.scales, *place, classification=options.classification)
    for number in {len(task.classes) for task in tasks}:
        start.check_classes(number, f"--adapt {path}")
    return tasks


def _tabulate(
    tasks: Sequence[UserTask], predictions: Sequence[Prediction], *, digits: int
) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the rows of all tasks' predictions, as text."""
    rows = []
    for task, prediction in zip(tasks, predictions, strict=True):
        first = "file" if any(not name.isdigit() for name in task.query_names) else "row"
        start = {"task": task.name} if task.name else {}
        cells = prediction.rows(digits) if prediction.columns else ({} for _ in task.query_names)
        rows += [{first: name} | start | row for name, row in zip(task.query_names, cells, strict=True)]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return header, [[row.get(key, "") for key in header] for row in rows]

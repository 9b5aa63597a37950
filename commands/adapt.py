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
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from commands.build import build_algorithm, build_module, fit_weights, make_writable, prepare, print_settings
from commands.call import Call
from commands.config import Config
from commands.network import AdaptedNetwork, give_network, predict
from commands.outputs import count_outputs, ignored_by
from commands.resolve import config_of, resolve_from
from common.batch import Tree, tree_map
from common.device import Runtime, find_device, set_up, versions
from common.errors import UsageError, printable
from common.files import write_whole
from common.names import as_file_name
from common.optimizers import Weights
from common.processes import ALONE
from common.task import Adapted, UserTask
from evaluation.meta_test import randomness_of
from evaluation.predictions import Prediction, predictions_figure, read_predictions
from evaluation.style import write_figure
from evaluation.tables import predictions_table, write_csv, write_json
from learners.losses import LOSSES
from learners.reading import main_tensor
from maml import MAML
from tasks.options import data_facts
from tasks.pixels import Form
from tasks.scales import Scales, undo_scale
from tasks.tables import Columns
from tasks.user_tasks import read_task_arrays, read_task_folder, read_task_table
from training.checkpoint import Checkpoint, load_checkpoint
from training.folders import BEST, LAST, find_checkpoint


def load(
    path: Path | str, example: Tree, *, outputs: int | None = None, device: str = "cpu", **own_code: str
) -> tuple[MAML, Weights, Weights]:
    """Return the algorithm, the meta-parameters and the running statistics of a checkpoint or run.

    Args:
        example: inputs of some examples, `[examples, ...]`; their shape determines the learner's.
        outputs: number of outputs; None: the classes of the training tasks, or one number. Another number of
            classes requires a run with `--head-init zero` or `prototype`.
        own_code: names of the user's `learner` and `loss`, where the checkpoint names some.

    Raises UsageError if the file is not a checkpoint, or does not fit.
    """
    path = find_checkpoint(Path(path), BEST, LAST)
    source = load_checkpoint(path)
    config = _settings_of(source, path, own_code)
    runtime = set_up(find_device(device, ALONE), config.training.precision, small_tensors=False)
    example = tree_map(lambda part: part.to(runtime.device), example)
    _, maml = build_algorithm(config, runtime, outputs or config.tasks.ways or 1, example, saved=source)
    return maml, *fit_weights(path, source, maml, config)


def _settings_of(source: Checkpoint, file: Path, given: Mapping[str, Any]) -> Config:
    config = resolve_from(config_of(source.settings, file), given, evaluate=True, adapt=True)
    without = {"metric": None, "metric_mode": None}  # there is nothing to measure, and no code to import
    return config.replaced(convolution="grouped", tasks_at_once=None, **without)


def adapt(call: Call, given: Mapping[str, Any], command: str) -> int:
    """Adapt a checkpoint to each task of --adapt; write predictions, a picture and the adapted weights."""
    assert call.load is not None and call.adapt is not None
    source = load_checkpoint(call.load)
    config = _settings_of(source, call.load, given)
    runtime = prepare(config, call)
    tasks = read_tasks(call.adapt, config, runtime, source)
    norm = _normalisation_of(given, source, len(tasks))
    folder, steps = make_writable(call.out or call.load.parent), config.evaluation.test_steps
    print_settings(config, runtime, f"Adapting {call.load} to {call.adapt}, {steps} steps")
    predictions = []
    for task in tasks:
        learner, maml, adapted = _adapt_to(task, call.load, source, config, runtime, norm)
        predictions.append(_read(predict(maml, adapted, task.query_x, norm), task, maml, source, config))
    stem, digits = f"{folder / call.load.stem}-adapted-{call.adapt.stem}", 10 if source.scales else 7
    header, rows = _tabulate(tasks, predictions, digits=digits)
    print(predictions_table(header, rows))
    if words := _describe_predictions(predictions[0], maml, config):
        print(words)
    record = {
        "command": command,
        "checkpoint": call.load,
        "adapted_to": call.adapt,
        "steps": steps,
        "batch_norm": norm if maml.has_batch_norm else None,
        "tasks": [
            {"task": t.name or None, "classes": t.classes, "query": t.query_names, "predicted": p.columns}
            for t, p in zip(tasks, predictions, strict=True)
        ],
        "settings": config.values(),
        "versions": versions(),
        "device": runtime.describe(),
    }
    tasks = [_in_units(task, source.scales) for task in tasks]
    write_csv(Path(f"{stem}.csv"), header, rows)
    title = f"{printable(call.adapt.name)}: after {steps} inner steps"
    write_figure(Path(f"{stem}.png"), predictions_figure(tasks, predictions, title))
    write_json(Path(f"{stem}.json"), record, digits)
    arrays = write_arrays(stem, tasks, predictions)
    print(f"Written: {', '.join([f'{stem}.csv', *arrays])}, .png and .json")
    if len(tasks) == 1:
        x, seed = task.support_x, config.training.seed ^ 1
        outputs = len(task.classes) or count_outputs(config, task.support_y)
        fresh = build_module(config, runtime, outputs, x, seed, fetch_weights=False)
        files = call.save_weights, Path(f"{stem}-weights.pt")
        network = AdaptedNetwork(learner, fresh, maml, adapted, task.query_x, source.scales)
        print(give_network(*files, network, norm))
    return 0


def _in_units(task: UserTask, scales: Scales) -> UserTask:
    """Return a task of a table in the table's units."""
    support_x, query_x = (undo_scale(x.cpu(), scales, "input") for x in (task.support_x, task.query_x))
    support_y = task.support_y if task.classes else undo_scale(task.support_y.cpu(), scales, "target")
    return replace(task, support_x=support_x, query_x=query_x, support_y=support_y)


def _normalisation_of(given: Mapping[str, Any], source: Checkpoint, tasks: int) -> str:
    """Return how batch norm predicts; raise UsageError where the flags do not fit checkpoint or tasks."""
    if "save_weights" in given and tasks > 1:
        raise UsageError(f"--save-weights {given['save_weights']}: there are {tasks} tasks: give one")
    norm = given.get("batch_norm", "per-step" if source.statistics else "inductive")
    if norm == "per-step" and not source.statistics:
        raise UsageError("--batch-norm per-step: the checkpoint has no running statistics")
    return norm


def _read(outputs: Tree, task: UserTask, maml: MAML, source: Checkpoint, config: Config) -> Prediction:
    """Return what outputs predict, in the units of the task's files; UsageError if they are not finite."""
    assert maml.reading is not None
    outputs = tree_map(lambda t: t.float().cpu(), outputs)
    if not all(part.isfinite().all() for part in tree_leaves(outputs)):
        parts = {name: getattr(task, name) for name in ("support_x", "support_y", "query_x")}
        wrong = ", ".join(name for name, part in parts.items() if not part.isfinite().all())
        reason = f"{wrong} has numbers that are not: mend the file" if wrong else "take fewer --test-steps"
        raise UsageError(f"--adapt: the predictions are not finite: {reason}")
    columns = Columns.parse(config.tasks.columns).targets
    known = config.tasks.dataset.startswith("table:") or len(columns) == task.support_y[:1].numel()
    targets = columns if known else [f"y{n + 1}" for n in range(task.support_y[:1].numel())]
    numbers = main_tensor(outputs)
    if maml.reading.kind == "numbers":
        numbers = undo_scale(numbers, source.scales, "target")
    known = config.learner.loss in LOSSES or config.learner.outputs == "numbers"
    return read_predictions(outputs, numbers, maml.reading, task.classes, targets, predicts_targets=known)


def _describe_predictions(prediction: Prediction, maml: MAML, config: Config) -> str:
    """Return what the columns are where the loss is the user's, who alone knows it."""
    assert maml.reading is not None
    if config.learner.loss in LOSSES:
        return ""
    if maml.reading.kind == "classes":
        return "p: the outputs if they sum to 1, else their softmax"
    if maml.reading.kind == "numbers" and not prediction.of_targets:
        return "Outputs are as the learner gives them (--outputs says what they are)"
    return f"The outputs are {maml.reading.describe()}"


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


def _adapt_to(
    task: UserTask, file: Path, source: Checkpoint, config: Config, runtime: Runtime, normalisation: str
) -> tuple[nn.Module, MAML, Adapted]:
    """Return the learner as it was built, the algorithm, and a task's adapted weights."""
    x, steps, inner_batch = task.support_x, config.evaluation.test_steps, config.evaluation.eval_inner_batch
    outputs = len(task.classes) or count_outputs(config, task.support_y)
    learner, maml = build_algorithm(config, runtime, outputs, x, saved=source, targets=task.support_y)
    _check_labels(task.support_y, maml)
    parameters, running = fit_weights(file, source, maml, config)
    order, keys = randomness_of("test", x[None], range(1), inner_batch, steps)
    order, running = None if order is None else order[0], running if normalisation == "per-step" else {}
    return learner, maml, maml.adapt(parameters, x, task.support_y, steps, order, keys[0], running)


def _check_labels(labels: Tensor, maml: MAML) -> None:
    """Raise UsageError where labels are none of the classes that the learner gives scores of."""
    reading = maml.reading
    if reading is None or reading.kind not in ("classes", "ordinal") or labels.is_floating_point():
        return
    wrong = (labels < 0) | (labels >= reading.classes)
    wrong &= True if reading.ignored is None else labels != reading.ignored
    if wrong.any():
        left_out = "" if reading.ignored is None else f" ({reading.ignored} is left out)"
        expected = f"labels are 0 to {reading.classes - 1}{left_out}"
        raise UsageError(f"--adapt: support_y has a label {labels[wrong][0]}, and {expected}")


def read_tasks(path: Path, config: Config, runtime: Runtime, source: Checkpoint) -> list[UserTask]:
    """Return the tasks of a folder of images, or of a table; UsageError unless the checkpoint fits them."""
    options, place = config.tasks, (runtime.device, runtime.dtype)
    images = data_facts(options.dataset).inputs == "images"
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
        task = read_task_arrays(
            path,
            source.scales,
            *place,
            classification=options.classification,
            ways=options.ways if config.choices.head_init == "learned" else None,
            ignored=ignored_by(config),
            images=images,
        )
        tasks = [task]
    elif images:
        assert options.image_size and options.channels
        look = options.invert, options.resize, options.black_and_white
        form = Form(options.image_size, options.channels, *look)
        tasks = [read_task_folder(path, form, source.image_range, *place)]
    else:
        columns = Columns.parse(options.columns, options.exclude_columns)
        # the inputs are those of training, whatever their order here
        columns = replace(columns, inputs=columns.inputs or tuple(source.inputs))
        tasks = read_task_table(path, columns, source.scales, *place, classification=options.classification)
    numbers = {len(task.classes) for task in tasks} - {options.ways}
    if options.classification and config.choices.head_init == "learned" and numbers:
        raise UsageError(
            f"--adapt {path}: {min(numbers)} classes, and the checkpoint learned {options.ways}: give as "
            "many, or train with --head-init zero or prototype"
        )
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

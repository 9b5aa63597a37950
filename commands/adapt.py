"""Put a trained initialisation to use: adapt it to tasks of the user's own and predict the rest (--adapt).

    files -> tasks/user_tasks -> UserTask -> MAML.adapt -> predict -> CSV, JSON, picture, weights

From Python, `load` gives a checkpoint's algorithm and weights, `MAML.adapt` adapts them to tensors, and
`predict` applies the result. Tasks are adapted to one after another, since each has its own sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from commands.build import build_algorithm, build_module, fit_weights, make_writable, prepare, print_settings
from commands.call import Call
from commands.config import Config
from commands.network import AdaptedNetwork, give_network, predict
from commands.resolve import config_of, resolve_from
from common.batch import Tree, tree_map
from common.device import Runtime, find_device, set_up, versions
from common.errors import UsageError, printable
from common.optimizers import Weights
from common.processes import ALONE
from common.task import UserTask
from evaluation.examples import predictions_figure
from evaluation.meta_test import randomness_of
from evaluation.style import write_figure
from evaluation.tables import predictions_table, write_csv, write_json
from maml import MAML, Adapted
from tasks.options import data_facts
from tasks.pixels import RANGE, Form
from tasks.scales import Scales, undo_scale
from tasks.tables import Columns
from tasks.user_tasks import read_task_folder, read_task_table
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
    return config.replaced(convolution="grouped", tasks_at_once=None)


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
        predicted = predict(maml, adapted, task.query_x, norm).float().cpu()
        if not predicted.isfinite().all():
            raise UsageError("--adapt: the predictions are not finite: take fewer --test-steps")
        if task.classes:
            predicted = predicted.sigmoid() if config.learner.loss == "bce" else predicted.softmax(-1)
        predictions.append(predicted if task.classes else undo_scale(predicted, source.scales, "target"))
    stem = f"{folder / call.load.stem}-adapted-{call.adapt.stem}"
    header, rows = _tabulate(tasks, predictions, Columns.parse(config.tasks.columns).targets)
    print(predictions_table(header, rows))
    record = {
        "command": command,
        "checkpoint": call.load,
        "adapted_to": call.adapt,
        "steps": steps,
        "batch_norm": norm if maml.has_batch_norm else None,
        "tasks": [
            {"task": task.name or None, "classes": task.classes, "query": task.query_names, "predicted": p}
            for task, p in zip(tasks, predictions, strict=True)
        ],
        "settings": config.values(),
        "versions": versions(),
        "device": runtime.describe(),
    }
    tasks = [_in_units(task, source.scales) for task in tasks]
    write_csv(Path(f"{stem}.csv"), header, rows)
    title = f"{printable(call.adapt.name)}: after {steps} inner steps"
    write_figure(Path(f"{stem}.png"), predictions_figure(tasks, predictions, title))
    write_json(Path(f"{stem}.json"), record)
    print(f"Written: {stem}.csv, .png and .json")
    if len(tasks) == 1:
        x, seed = task.support_x, config.training.seed ^ 1
        fresh = build_module(config, runtime, count_outputs(task), x, seed, fetch_weights=False)
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


def count_outputs(task: UserTask) -> int:
    return len(task.classes) or task.support_y.shape[-1]


def _adapt_to(
    task: UserTask, file: Path, source: Checkpoint, config: Config, runtime: Runtime, normalisation: str
) -> tuple[nn.Module, MAML, Adapted]:
    """Return the learner as it was built, the algorithm, and a task's adapted weights."""
    x, steps, inner_batch = task.support_x, config.evaluation.test_steps, config.evaluation.eval_inner_batch
    learner, maml = build_algorithm(config, runtime, count_outputs(task), x, saved=source)
    parameters, running = fit_weights(file, source, maml, config)
    order, keys = randomness_of("test", x[None], range(1), inner_batch, steps)
    order, running = None if order is None else order[0], running if normalisation == "per-step" else {}
    return learner, maml, maml.adapt(parameters, x, task.support_y, steps, order, keys[0], running)


def read_tasks(path: Path, config: Config, runtime: Runtime, source: Checkpoint) -> list[UserTask]:
    """Return the tasks of a folder of images, or of a table; UsageError unless the checkpoint fits them."""
    options, place = config.tasks, (runtime.device, runtime.dtype)
    images = data_facts(options.dataset).inputs == "images"
    if not path.exists():
        raise UsageError(f"--adapt {path}: there is no such file or folder")
    if images != path.is_dir():
        what = "images: give a folder" if images else "numbers: give a table"
        raise UsageError(f"--adapt {path}: the checkpoint learned from {what}")
    if images:
        assert options.image_size and options.channels
        look = options.invert, options.resize, options.black_and_white
        form = Form(options.image_size, options.channels, *look)
        tasks = [read_task_folder(path, form, source.splits.get(RANGE), *place)]
    else:
        columns = Columns.parse(options.columns, options.exclude_columns)
        # the inputs are those of training, whatever their order here
        columns = replace(columns, inputs=columns.inputs or tuple(source.splits.get("input", ())))
        tasks = read_task_table(path, columns, source.scales, *place, classification=options.classification)
    numbers = {len(task.classes) for task in tasks} - {options.ways}
    if options.classification and config.choices.head_init == "learned" and numbers:
        raise UsageError(
            f"--adapt {path}: {min(numbers)} classes, and the checkpoint learned {options.ways}: give as "
            "many, or train with --head-init zero or prototype"
        )
    return tasks


def _tabulate(
    tasks: Sequence[UserTask], predictions: Sequence[Tensor], targets: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the rows of all tasks' predictions, as text."""
    rows = []
    for task, predicted in zip(tasks, predictions, strict=True):
        first = "file" if task.support_x.dim() > 2 else "row"
        digits = 10 if predicted.element_size() == 8 else 7  # in units of a table, or not
        for name, values in zip(task.query_names, predicted.tolist(), strict=True):
            row = {first: name} | ({"task": task.name} if task.name else {})
            if task.classes:
                row["prediction"] = task.classes[values.index(max(values))]
                row |= {f"p({c})": f"{value:.6f}" for c, value in zip(task.classes, values, strict=True)}
            else:
                row |= {target: f"{value:.{digits}g}" for target, value in zip(targets, values, strict=True)}
            rows.append(row)
    header = list(dict.fromkeys(key for row in rows for key in row))
    return header, [[row.get(key, "") for key in header] for row in rows]

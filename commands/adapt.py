"""Put a trained initialisation to use: adapt it to tasks of the user's own and predict the rest (--adapt).

    files -> tasks/user_tasks -> UserTask -> adapt_to -> Adapted.predict -> CSV, JSON, picture, weights

From Python, `load` gives a checkpoint's algorithm and weights, and `adapt_to` adapts them to tensors. Tasks
are adapted to one after another, since each has its own sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commands.build import build_algorithm, fit_weights, make_writable, prepare, print_settings
from commands.call import Call
from commands.config import Config
from commands.resolve import config_of, resolve_from
from common.batch import Tree, first_tensor, tree_map
from common.device import Runtime, find_device, set_up, versions
from common.errors import UsageError, printable
from common.optimizers import Weights
from common.processes import ALONE
from common.random import keys_of, minibatch_order, task_stream
from common.task import Task
from evaluation.examples import Prediction, predictions_figure
from evaluation.meta_test import SEED
from evaluation.style import write_figure
from evaluation.tables import predictions_table, write_csv, write_json
from learners.batch_norm import norm_layers, record_statistics
from maml import MAML, Adapted
from tasks.images import Form
from tasks.options import data_facts
from tasks.tables import Columns
from tasks.user_tasks import UserTask, read_task_folder, read_task_table
from training.checkpoint import Checkpoint, load_checkpoint, save_weights
from training.folders import BEST, LAST, find_checkpoint


@dataclass(frozen=True)
class AdaptedLearner:
    """A learner adapted to one task."""

    maml: MAML
    adapted: Adapted
    normalisation: str

    @torch.no_grad()
    def predict(self, x: Tree) -> Tree:
        """Return the outputs, logits or numbers, for examples `[examples, ...]`."""
        task = replace(self.adapted.task, query_x=x)
        with self.maml.running() if self.normalisation == "per-step" else nullcontext():
            return self.maml.predict(self.adapted._replace(task=task), self.normalisation)

    @torch.no_grad()
    def module(self, learner: nn.Module) -> nn.Module:
        """Return a copy of the learner with the adapted weights.

        Running statistics of its batch norm layers are those of the support set, or the per-step ones of a
        "per-step" prediction. In evaluation mode it predicts what `predict` does, unless "transductive".
        """
        learner, weights, task = copy.deepcopy(learner), self.adapted.weights, self.adapted.task
        learner.load_state_dict(weights | task.extras.buffers, strict=False)  # others stay as they were
        with self.maml.call.predicting(), record_statistics(self.maml.learner) as recorded:
            self.maml.call(weights, task.support_x, task.extras)
        statistics = weights if self.normalisation == "per-step" else recorded
        for name in norm_layers(self.maml.learner):
            layer = learner.get_submodule(name)
            key = f"{name}.statistics" if name else "statistics"
            if getattr(layer, "running_mean", None) is not None and key in statistics:
                mean, variance = statistics[key]
                layer.get_buffer("running_mean").copy_(mean)
                layer.get_buffer("running_var").copy_(variance)
        return learner


def adapt_to(
    maml: MAML,
    parameters: Weights,
    support_x: Tree,
    support_y: Tree,
    *,
    steps: int,
    normalisation: str = "inductive",
    inner_batch: int | None = None,
    statistics: Weights | None = None,
) -> AdaptedLearner:
    """Return the learner after `steps` inner steps on one task.

    Args:
        support_x, support_y: the examples, `[examples, ...]`.
        normalisation: whose statistics batch norm uses: "inductive", "transductive" or "per-step".
        inner_batch: examples in the minibatch of an inner step; None: all.
        statistics: running statistics of per-step batch norm.

    Raises:
        ValueError: "per-step" without the statistics.
    """
    maml.check_statistics([normalisation], statistics)
    labels = first_tensor(support_y)
    stream = task_stream("test", SEED, 0, range(1), labels.device)
    order = minibatch_order(stream.at("minibatches"), len(labels), inner_batch, steps)
    extras = tree_map(lambda part: part[0], maml.call.extras(1, keys_of(stream)))
    task = Task(support_x, support_y, order=None if order is None else order[0], extras=extras)
    running = normalisation == "per-step"
    with torch.no_grad(), maml.running() if running else nullcontext():
        *_, adapted = maml.inner_loop(parameters, task, steps, statistics if running else None)
    return AdaptedLearner(maml, adapted, normalisation)


def load(
    path: Path | str,
    example: Tree,
    *,
    outputs: int | None = None,
    learner: str | None = None,
    loss: str | None = None,
    device: str = "cpu",
) -> tuple[MAML, Weights, Weights]:
    """Return the algorithm, the meta-parameters and the running statistics of a checkpoint.

    Args:
        path: a checkpoint, or the folder of a run.
        example: inputs of some examples, `[examples, ...]`; their shape determines the learner's.
        outputs: number of outputs; None: the classes of the training tasks, or one number. Another number of
            classes requires a run with `--head-init zero` or `prototype`.
        learner, loss: names of the user's code, where the checkpoint names some.

    Raises:
        UsageError: the file is not a checkpoint, or does not fit.
    """
    path = find_checkpoint(Path(path), BEST, LAST)
    source = load_checkpoint(path)
    names = {"learner": learner, "loss": loss}
    config = _settings_of(source, path, {name: value for name, value in names.items() if value})
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
    tasks = read_tasks(call.adapt, config, runtime)
    norm = given.get("batch_norm", "per-step" if source.statistics else "inductive")
    if norm == "per-step" and not source.statistics:
        raise UsageError("--batch-norm per-step: the checkpoint has no running statistics")
    folder, steps = make_writable(call.out or call.load.parent, "--out"), config.evaluation.test_steps
    what = f"{call.load}, iteration {source.iteration:,}"
    print_settings(config, runtime, f"Adapting {what} to {call.adapt}, {steps} steps")
    predictions = []
    for task in tasks:
        x, outputs = task.support_x, len(task.classes) or task.support_y.shape[-1]
        learner, maml = build_algorithm(config, runtime, outputs, x, saved=source)
        parameters, statistics = fit_weights(call.load, source, maml, config)
        batch = config.evaluation.eval_inner_batch
        options: dict[str, Any] = {"steps": steps, "normalisation": norm, "inner_batch": batch}
        adapted = adapt_to(maml, parameters, x, task.support_y, statistics=statistics, **options)
        predictions.append(_predict(adapted, task, config.learner.loss))
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
            {"task": t.name or None, "classes": t.classes, "query": t.query_names, "predicted": p.predicted}
            for t, p in zip(tasks, predictions, strict=True)
        ],
        "settings": config.values(),
        "versions": versions(),
        "device": runtime.describe(),
    }
    title = f"{printable(call.adapt.name)}: after {steps} inner steps"
    write_csv(Path(f"{stem}.csv"), header, rows)
    write_figure(Path(f"{stem}.png"), predictions_figure(predictions, title))
    write_json(Path(f"{stem}.json"), record)
    written = f"Written: {stem}.csv, .png and .json"
    if len(tasks) == 1 and config.choices.fast_weights != "context":  # which is no module of its own
        save_weights(Path(f"{stem}-weights.pt"), adapted.module(learner))
        written += f", {stem}-weights.pt"
    print(written)
    return 0


def _predict(adapted: AdaptedLearner, task: UserTask, loss: str) -> Prediction:
    """Return a task's examples with the predictions of its query: probabilities, or numbers."""
    predicted = adapted.predict(task.query_x)
    if not predicted.isfinite().all():
        raise UsageError("--adapt: the predictions are not finite: take fewer --test-steps")
    if task.classes:
        predicted = predicted.sigmoid() if loss == "bce" else predicted.softmax(-1)
    examples = (part.float().cpu() for part in (task.support_x, task.support_y, task.query_x, predicted))
    return Prediction(task.name, task.classes, *examples)


def read_tasks(path: Path, config: Config, runtime: Runtime) -> list[UserTask]:
    """Return the tasks of a folder of images, or of a table; UsageError unless the checkpoint fits them."""
    options, place = config.tasks, (runtime.device, runtime.dtype)
    images = data_facts(options.dataset).inputs == "images"
    if not (path.is_dir() if images else path.is_file()):
        what = "images: give a folder" if images else "numbers: give a table"
        raise UsageError(f"--adapt {path}: the checkpoint learned from {what}")
    if images:
        assert options.image_size and options.channels
        form = Form(options.image_size, options.channels, options.invert, options.resize)
        tasks = [read_task_folder(path, form, *place)]
    else:
        columns = Columns.parse(options.columns)
        tasks = read_task_table(path, columns, *place, classification=options.classification)
    numbers = {len(task.classes) for task in tasks} - {options.ways}
    if options.classification and config.choices.head_init == "learned" and numbers:
        raise UsageError(
            f"--adapt {path}: {min(numbers)} classes, and the checkpoint learned {options.ways}: give as "
            "many, or train with --head-init zero or prototype"
        )
    return tasks


def _tabulate(
    tasks: Sequence[UserTask], predictions: Sequence[Prediction], targets: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the rows of all tasks' predictions, as text."""
    classes = list(dict.fromkeys(name for task in tasks for name in task.classes))
    header = ["file" if tasks[0].support_x.dim() > 2 else "row", *["task"] * bool(tasks[0].name)]
    header += ["prediction", *(f"p({name})" for name in classes)] if classes else targets
    rows = []
    for task, prediction in zip(tasks, predictions, strict=True):
        for name, values in zip(task.query_names, prediction.predicted.tolist(), strict=True):
            cells = [f"{value:.7g}" for value in values]
            if classes:
                shares = dict(zip(task.classes, values, strict=True))
                cells = [max(shares, key=shares.__getitem__)]
                cells += [f"{shares[name]:.6f}" if name in shares else "" for name in classes]
            rows.append([name, *[task.name] * bool(task.name), *cells])
    return header, rows

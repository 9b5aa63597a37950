"""Putting a trained initialisation to use: adapt to the examples of one's own task, predict the others.

A folder holds `support/<class>/` with labelled images and `query/` with images to predict; a table has rows
whose targets are known, and rows where they are missing, of one task or of several. Tasks are adapted to one
after another: each has sizes of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from commands.build import algorithm_of, module_of
from commands.config import Config, config_of
from commands.resolve import resolve_from
from common.batch import Tree, first_tensor, joined, tree_map
from common.device import Runtime, device_of, set_up, versions
from common.errors import UsageError, printable
from common.optimizers import Weights
from common.processes import ALONE
from common.random import keys_of, minibatch_order, task_stream
from common.task import Extras
from common.task import Task as InnerTask
from evaluation import tables as report
from evaluation.meta_test import SEED
from evaluation.predictions import Prediction, predictions_figure
from evaluation.style import write_figure
from learners.batch_norm import norm_layers, recorded_statistics
from maml import MAML
from tasks.images import Form, image_files, read_images
from tasks.options import data_facts
from tasks.tables import Columns, load_table
from training.checkpoint import (
    Checkpoint,
    fitting_parameters,
    load_checkpoint,
    save_weights,
)
from training.folders import BEST, LAST, find_checkpoint

MOST_NUMBERS = 2**30  # pixels of a folder's images, times channels
QUERIES_AT_ONCE = 256  # predictions that do not depend on each other bound memory so


@dataclass(frozen=True)
class Task:
    """One task of the user's."""

    name: str  # of a table's task; "" where there is one alone
    support_x: Tensor  # [support examples, ...]
    support_y: Tensor
    query_x: Tensor  # [query examples, ...]
    classes: list[str]  # names of the labels; empty for regression
    query_names: list[str]  # file names, or numbers of rows


class Loaded(NamedTuple):
    """What a checkpoint holds, to adapt with."""

    maml: MAML
    parameters: Weights
    statistics: Weights  # running ones of per-step batch norm, for "per-step"; empty without


@dataclass(frozen=True)
class Adapted:
    """A learner adapted to a task."""

    maml: MAML
    weights: Weights
    extras: Extras  # of the query's pass: buffers and keys
    support_x: Tree
    normalisation: str

    @torch.no_grad()
    def predict(self, x: Tree) -> Tree:
        """Outputs on examples `[examples, ...]`: logits, or numbers."""
        size = first_tensor(x).shape[0] if self.normalisation == "transductive" else QUERIES_AT_ONCE
        parts = [
            tree_map(lambda t, first=first: t[first : first + size], x)
            for first in range(0, len(first_tensor(x)), size)
        ]
        maml = self.maml
        with maml.call.predicting(), maml.running() if self.normalisation == "per-step" else nullcontext():
            outputs = [
                maml.call.query(self.weights, part, self.support_x, self.normalisation, self.extras)
                for part in parts
            ]
        return joined(outputs)

    def module(self, learner: nn.Module) -> nn.Module:
        """A copy of the learner with the adapted weights.

        Running statistics of its batch norm layers are those of the support set (per-step ones where these
        normalise): in evaluation mode it predicts what `predict` does, unless by "transductive".
        """
        learner = copy.deepcopy(learner)
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                if name in self.weights:
                    parameter.copy_(self.weights[name])
            for name, buffer in learner.named_buffers():
                if name in self.extras.buffers:  # as the inner steps have left it
                    buffer.copy_(self.extras.buffers[name])
            with self.maml.call.predicting(), recorded_statistics(self.maml.learner) as seen:
                self.maml.call(self.weights, self.support_x, self.extras)
            for name in norm_layers(self.maml.learner):
                layer = learner.get_submodule(name)
                key = f"{name}.statistics" if name else "statistics"
                used = self.weights if self.normalisation == "per-step" else seen
                if getattr(layer, "running_mean", None) is not None and key in used:
                    mean, variance = used[key]
                    layer.get_buffer("running_mean").copy_(mean)
                    layer.get_buffer("running_var").copy_(variance)
        return learner


def adapted_to(
    maml: MAML,
    parameters: Weights,
    support_x: Tree,
    support_y: Tree,
    *,
    steps: int,
    normalisation: str = "inductive",
    inner_batch: int | None = None,
    statistics: Weights | None = None,
) -> Adapted:
    """The learner after so many inner steps on the examples of one task, `[examples, ...]`.

    Raises ValueError for the normalisation "per-step" without the running `statistics` that it needs.
    """
    maml.check_statistics([normalisation], statistics)
    labels = first_tensor(support_y)
    stream = task_stream("test", SEED, 0, range(1), labels.device)
    order = minibatch_order(stream.at("minibatches"), len(labels), inner_batch, steps)
    extras = tree_map(lambda part: part[0], maml.call.extras(1, keys_of(stream)))
    task = InnerTask(support_x, support_y, order=None if order is None else order[0], extras=extras)
    running = normalisation == "per-step"
    with torch.no_grad(), maml.running() if running else nullcontext():
        *_, adapted = maml.inner_loop(parameters, task, steps, statistics if running else None)
    return Adapted(maml, adapted.weights, adapted.task.extras, support_x, normalisation)


def load(
    path: Path | str,
    example: Tree,
    *,
    outputs: int | None = None,
    learner: str | None = None,
    loss: str | None = None,
    device: str = "cpu",
) -> Loaded:
    """A checkpoint's algorithm, meta-parameters and running statistics, from Python.

    Raises UsageError where the file is no checkpoint, or does not fit.

    Arguments:
        example: inputs of some examples, `[examples, ...]`: their shape makes the learner.
        outputs: of the learner, where they are not the classes of the training tasks, or one number; another
            number of classes needs a run with `--head-init zero` or `prototype`.
        learner, loss: the names of the user's own code, where the checkpoint names some; it is not imported
            otherwise.
    """
    path = find_checkpoint(Path(path), BEST, LAST)
    source = load_checkpoint(path)
    given = {name: value for name, value in (("learner", learner), ("loss", loss)) if value is not None}
    config = resolve_from(config_of(source.settings, path), given, evaluate=True, adapt=True)
    config = config.replaced(convolution="grouped", tasks_at_once=None)
    runtime = set_up(device_of(device, ALONE), config.training.precision, small_tensors=False)
    example = tree_map(lambda part: part.to(runtime.device), example)
    module = module_of(config, runtime, outputs or config.tasks.ways or 1, example, saved=source)
    maml = algorithm_of(config, runtime, module, example)
    wanted = maml.initial_parameters()
    parameters = fitting_parameters(path, source.parameters, wanted, config.learner.learner)
    statistics = fitting_parameters(
        path, source.statistics, maml.initial_statistics(), config.learner.learner
    )
    return Loaded(maml, parameters, statistics)


# ---- from files to files --------------------------------------------------------------------


def adapt_to_files(
    source: Checkpoint,
    config: Config,
    tasks: list[Task],
    path: Path,
    load: Path,
    runtime: Runtime,
    *,
    normalisation: str,
    file: Path,
    weights_file: Path | None,
    record: Mapping[str, Any],
) -> list[Path]:
    """Adapts to each task of `path`; writes predictions (CSV, JSON) and a picture (PNG).

    Raises UsageError where tasks do not fit the checkpoint, or diverge. Gives the files.
    """
    if normalisation == "per-step" and not source.statistics:
        raise UsageError("--batch-norm per-step: the checkpoint has no running statistics")
    found: list[Tensor] = []
    for task in tasks:
        outputs = len(task.classes) or task.support_y.shape[-1]
        if task.classes:
            config = config.replaced(ways=len(task.classes))
        learner = module_of(config, runtime, outputs, task.support_x, saved=source)
        maml = algorithm_of(config, runtime, learner, task.support_x)
        parameters = fitting_parameters(
            load, source.parameters, maml.initial_parameters(), config.learner.learner
        )
        statistics = fitting_parameters(
            load, source.statistics, maml.initial_statistics(), config.learner.learner
        )
        adapted = adapted_to(
            maml, parameters, task.support_x, task.support_y, steps=config.evaluation.test_steps,
            normalisation=normalisation, inner_batch=config.evaluation.eval_inner_batch, statistics=statistics,
        )  # fmt: skip
        logits = adapted.predict(task.query_x)
        if not torch.isfinite(logits).all():
            raise UsageError(
                f"{path}: adapting to {task.name or 'it'} diverged; take fewer --test-steps than "
                f"{config.evaluation.test_steps}"
            )
        shares = torch.sigmoid if config.learner.loss == "bce" else lambda x: torch.softmax(x, -1)
        found.append((shares(logits) if task.classes else logits).float().cpu())
        module = adapted.module(learner) if weights_file else None
    written = [Path(f"{file}.{kind}") for kind in ("csv", "json", "png")]
    rows = list(_rows(tasks, found))
    report.write_csv(written[0], _header(tasks, config), rows)
    report.write_json(
        written[1],
        {
            **record,
            "adapted_to": path,
            "steps": config.evaluation.test_steps,
            "batch_norm": normalisation if maml.has_batch_norm else None,
            "tasks": [_summary(task, predicted) for task, predicted in zip(tasks, found, strict=True)],
            "settings": config.values(),
            "versions": versions(),
            "device": runtime.describe(),
        },
    )
    title = f"{printable(path.name)}: after {config.evaluation.test_steps} inner steps"
    pictured = [
        Prediction(
            task.name, task.classes, task.support_x.cpu(), task.support_y.cpu(), task.query_x.cpu(), predicted
        )
        for task, predicted in zip(tasks, found, strict=True)
    ]
    write_figure(written[2], predictions_figure(pictured, title))
    if weights_file and module is not None:
        save_weights(weights_file, module)
        written.append(weights_file)
    print(report.predictions_table(_header(tasks, config), rows))
    return written


def tasks_in(path: Path, config: Config, runtime: Runtime) -> list[Task]:
    """The tasks of a folder of images, or of a table.

    Raises UsageError for data that cannot be read, or that the checkpoint of these settings is not for, and
    where their weights could not be written to `weights_file`.
    """

    inputs = data_facts(config.tasks.dataset).inputs
    if not path.exists():
        raise UsageError(f"--adapt {path}: there is no such file or folder")
    if inputs == "images" and not path.is_dir():
        raise UsageError(f"--adapt {path} is a file: the checkpoint learned from images, give a folder")
    if inputs == "vectors" and path.is_dir():
        raise UsageError(f"--adapt {path} is a folder: the checkpoint learned from numbers, give a table")
    if inputs == "any" and path.is_dir():
        raise UsageError(
            f"--adapt {path} is a folder, and the checkpoint learned from tasks of your own: give a table, "
            "or adapt from Python (docs/using.md)"
        )
    tasks = [_folder(path, config, runtime)] if path.is_dir() else _table(path, config, runtime)
    for task in tasks:
        check_fit(task, config, path)
    tasks = [_shown(task) for task in tasks]
    return tasks


def _shown(task: Task) -> Task:
    """With names that can be printed and written."""
    return replace(
        task,
        name=printable(task.name),
        classes=[printable(name) for name in task.classes],
        query_names=[printable(name) for name in task.query_names],
    )


def _folder(path: Path, config: Config, runtime: Runtime) -> Task:
    support, query = path / "support", path / "query"
    for folder in (support, query):
        if not folder.is_dir():
            raise UsageError(
                f"--adapt {path}: it has no folder {folder.name}/: put labelled images into support/<class>/ "
                "and those to predict into query/"
            )
    folders = sorted(p for p in support.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise UsageError(f"--adapt {path}: {support} has {len(folders)} folders of classes: give two or more")
    by_class = {folder.name: image_files(folder) for folder in folders}
    for name, files in by_class.items():
        if not files:
            raise UsageError(f"--adapt {path}: the class {support / name} has no images")
    queries = image_files(query)
    if not queries:
        raise UsageError(f"--adapt {path}: {query} has no images")
    assert config.tasks.image_size and config.tasks.channels
    most = MOST_NUMBERS // (config.tasks.image_size**2 * config.tasks.channels)
    for place, count in ((support, sum(map(len, by_class.values()))), (query, len(queries))):
        if count > most:
            raise UsageError(f"--adapt {path}: {place} has {count:,} images: give {most:,} at most at a time")
    labelled = [file for files in by_class.values() for file in files]
    labels = [label for label, files in enumerate(by_class.values()) for _ in files]

    def pixels(files: list[Path]) -> Tensor:
        assert config.tasks.image_size and config.tasks.channels
        options = config.tasks
        form = Form(options.image_size, options.channels, options.invert, options.resize)
        return read_images(files, form).to(runtime.device, runtime.dtype) / 255

    return Task(
        "",
        pixels(labelled),
        torch.tensor(labels, device=runtime.device),
        pixels(queries),
        list(by_class),
        [file.name for file in queries],
    )


def _table(path: Path, config: Config, runtime: Runtime) -> list[Task]:
    table = load_table(
        path,
        Columns.parse(config.tasks.columns),
        classification=config.tasks.classification,
        shares={"test": 1},
        missing_targets=True,
    )
    tasks = []
    for number, name in enumerate(table.tasks):
        rows = slice(int(table.first[number]), int(table.first[number] + table.count[number]))
        x, y = table.x[rows].to(runtime.device, runtime.dtype), table.y[rows].to(runtime.device)
        known, places = table.known[rows].to(runtime.device), table.row[rows]
        where = f"--adapt {path}" + (f", task {name!r}" if len(table.tasks) > 1 else "")
        if not known.any():
            raise UsageError(f"{where}: no row has its targets: there is nothing to adapt to")
        if known.all():
            raise UsageError(f"{where}: no row lacks a target: there is nothing to predict")
        classes: list[str] = []
        targets = y[known]
        if config.tasks.classification:
            there = targets.unique()
            classes = [table.classes[int(c)] for c in there]
            targets = torch.searchsorted(there, targets)
        else:
            targets = targets.to(runtime.dtype)
        names = [str(int(row) + 1) for row in places[~known.cpu()]]
        tasks.append(Task(name if len(table.tasks) > 1 else "", x[known], targets, x[~known], classes, names))
    return tasks


def check_fit(task: Task, config: Config, path: Path) -> None:
    """Raises UsageError where the checkpoint was learned for another number of classes."""
    if (
        config.tasks.classification
        and config.choices.head_init == "learned"
        and len(task.classes) != config.tasks.ways
    ):
        raise UsageError(
            f"--adapt {path}: {len(task.classes)} classes, and the checkpoint learned {config.tasks.ways}: its "
            "head is --head-init learned; one trained with zero or prototype takes any number"
        )


# ---- what is written ------------------------------------------------------------------------


def _header(tasks: list[Task], config: Config) -> list[str]:
    first = tasks[0]
    place = "file" if first.support_x.dim() > 2 else "row"
    named = ["task"] if first.name else []
    if config.tasks.classification:
        classes = list(dict.fromkeys(name for task in tasks for name in task.classes))
        return [place, *named, "prediction", *(f"p({name})" for name in classes)]
    return [place, *named, *Columns.parse(config.tasks.columns).targets[: first.support_y.shape[-1]]]


def _rows(tasks: list[Task], found: list[Tensor]) -> Any:
    classes = list(dict.fromkeys(name for task in tasks for name in task.classes))
    for task, predicted in zip(tasks, found, strict=True):
        for name, values in zip(task.query_names, predicted.tolist(), strict=True):
            row = [inert(name), *([inert(task.name)] if task.name else [])]
            if task.classes:
                shares = dict(zip(task.classes, values, strict=True))
                best = max(shares, key=shares.__getitem__)
                yield [*row, inert(best), *(f"{shares[c]:.6f}" if c in shares else "" for c in classes)]
            else:
                yield [*row, *(f"{value:.7g}" for value in values)]


def inert(name: str) -> str:
    """A name that a spreadsheet would compute as a formula, marked as text, in the spreadsheets' own way."""
    if not name.startswith(("=", "+", "-", "@")):
        return name
    try:
        float(name)
    except ValueError:
        return f"'{name}"
    return name


def _summary(task: Task, predicted: Tensor) -> dict[str, Any]:
    return {
        "task": task.name or None,
        "support": len(task.support_x),
        "classes": task.classes or None,
        "query": task.query_names,
        "predicted": predicted,
    }

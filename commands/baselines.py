"""What meta-learning is measured against: the baselines of the paper and of every course on it.

Beside a checkpoint: training from scratch on each task (gradient descent and Adam), pretraining on all
tasks followed by fine-tuning, and the oracle that is told the task. Rates are chosen on validation tasks;
everything is measured on the same test tasks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from commands import config as settings
from commands.build import Start, assemble, build, no_empty_folder_left, prepare_run, train_runs
from commands.call import Call
from commands.config import Config
from commands.evaluate import evaluate_one
from commands.names import meaningful
from commands.resolve import config_of, resolve, what_is_learned
from common.batch import TaskDistribution
from common.device import Runtime
from common.errors import UsageError
from common.optimizers import Weights
from common.processes import ALONE, World
from dataset import Regression
from evaluation.figures import comparison_figure
from evaluation.meta_test import Evaluation, evaluate
from evaluation.seeds import test_table
from evaluation.style import write_figure
from evaluation.tables import evaluation_record, write_json
from maml import MAML
from tasks.options import CURVES
from training.checkpoint import load_checkpoint
from training.folders import LAST, lock_folder

RATES = {
    "sgd": (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "adam": (0.001, 0.003, 0.01, 0.03, 0.1),
}
VALIDATION_TASKS = 600
PLAIN_STEP: dict[str, Any] = {
    "inner_momentum": 0.9,
    "inner_clip": None,
    "proximal": 0.0,
}  # nothing but the rule

# The assignment's comparison: ten steps of Adam at 0.001 on each task's support set, from one random
# initialisation; its plot has means over 300 episodes.
SCRATCH_STEPS, SCRATCH_RATE, WINDOW = 10, 0.001, 300
EPISODES_AT_ONCE = 3000


@dataclass(frozen=True)
class Baseline:
    """A method's result on the test tasks."""

    name: str
    how: str  # update rule and rate, in words
    evaluation: Evaluation


class InterruptedBySignalError(Exception):
    """A signal ended the training of a baseline; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def baselines(call: Call, given: Mapping[str, Any], command: str, world: World) -> int:
    """The checkpoint's result on the test tasks beside those of the baselines (--baselines)."""
    job, result, stem = evaluate_one(call, given, command, world)
    subject, runtime, file = job.subject, job.runtime, f"{stem}-baselines"
    record = {"command": command, **job.record()}
    assert call.load is not None and subject.source is not None
    source, config, words = subject.source, subject.config, subject.words
    try:
        others = measured(subject.trained, config, call, runtime, call.load.parent / "baselines")
    except InterruptedBySignalError as interrupted:
        print("Saved; the same command goes on from there.", flush=True)
        runtime.world.wait()  # see `train`
        return interrupted.code
    mine = Baseline(config.choices.algorithm, "as trained", result)
    norm = config.choices.query_norm
    results = {f"{b.name}, {b.how}": b.evaluation.select(norm) for b in (mine, *others)}
    print("\n" + test_table({name: [evaluation] for name, evaluation in results.items()}, words))
    if not runtime.world.first:
        return 0
    curves: dict[str, tuple[list[int], list[float]]] = {}
    if config.tasks.dataset in CURVES and source.progress["training"]:
        ends, losses = windows_of(source.progress["training"])
        scratch = scratch_curve(subject.trained, call, runtime, ends)
        curves = {
            config.choices.algorithm: (ends, losses),
            "from scratch, Adam 0.001, 10 steps": (ends, scratch),
        }
    methods = {b.name: {"how": b.how} | evaluation_record(b.evaluation) for b in (mine, *others)}
    write_json(
        Path(f"{file}.json"),
        record
        | {
            "methods": methods,
            "curves": {n: dict(zip(("iteration", "query_loss"), c, strict=True)) for n, c in curves.items()},
        },
    )
    figure = comparison_figure(results, words, curves)
    write_figure(Path(f"{file}.png"), figure)
    print(f"Written: {file}.json and .png")
    return 0


def measured(saved: Config, config: Config, call: Call, runtime: Runtime, folder: Path) -> list[Baseline]:
    """All baselines of a run.

    Pretraining takes part for regression only, the oracle for curves that we compute: the labels of a
    classification task are drawn anew for each task, and there is nothing about them to pretrain or to tell.
    They are trained in `folder`, with the run's iterations, tasks and seed, unless they already are.
    Raises InterruptedBySignalError where a signal ends their training.

    Arguments:
        saved: the settings of the run.
        config: the same as they are to be tested: shots, queries, tasks, steps.
    """
    distribution, maml = build(from_scratch(config), call, runtime)
    fresh = maml.initial_parameters(config.training.seed)
    results = [
        _tuned(f"scratch, {rule}", rule, maml, fresh, distribution, config, runtime.world)
        for rule in ("sgd", "adam")
    ]
    if config.tasks.classification:
        return results
    pretraining = plain(saved, "pretrain")
    pretrained = trained(pretraining, call, folder / "pretrained", runtime.world)
    pretrained = {name: w.to(runtime.device, runtime.dtype) for name, w in pretrained.items()}
    results.append(_tuned("pretrained", "sgd", maml, pretrained, distribution, config, runtime.world))
    if config.tasks.dataset not in CURVES:
        return results
    told, maml = build(plain(config, "pretrain", testing=True).replaced(oracle=True), call, runtime)
    parameters = trained(pretraining.replaced(oracle=True), call, folder / "oracle", runtime.world)
    parameters = {name: w.to(runtime.device, runtime.dtype) for name, w in parameters.items()}
    # it is given the answer, not examples
    result = tested(maml, parameters, told, config, runtime.world, steps=0)
    results.append(Baseline("oracle", "not adapted", result))
    return results


def tested(
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    config: Config,
    world: World,
    *,
    steps: int,
) -> Evaluation:
    """On the test tasks."""
    return evaluate(
        maml, parameters, distribution, "test", tasks=config.evaluation.eval_tasks, steps=steps,
        normalisations=(config.choices.query_norm,), world=world,
    )  # fmt: skip


def plain(config: Config, algorithm: str, *, testing: bool = False) -> Config:
    """The settings of a run with these data and this budget, and with no choice of its own.

    With `testing`, those of its test tasks: the shots of training ones do not matter.
    """
    kept = [n for n, flag in settings.CONFIG_FLAGS.items() if flag.group in ("tasks", "learner", "logging")]
    kept += ["meta_batch_size", "iterations", "seed", "precision", "eval_tasks", "eval_steps"]
    kept += ["compile", "vectorise", "tasks_at_once"]
    kept.remove("oracle")
    given = {name: config.get(name) for name in kept if config.get(name) not in (None, ())}
    if config.choices.meta_gradient == "reptile" and config.tasks.train_shots is not None:
        given["train_shots"] = config.training_shots  # beside the query, whose points Reptile counts in
    if testing:
        given.pop("train_shots", None)
    mine = meaningful(config)
    return resolve({n: v for n, v in given.items() if n in mine} | {"algorithm": algorithm})


def from_scratch(config: Config, *, testing: bool = True) -> Config:
    """The settings of ordinary training: as `plain`, all weights, from PyTorch's initialisation."""
    return plain(config, "maml", testing=testing).replaced(init="torch", adapt_norm=True)


def _tuned(
    name: str,
    rule: str,
    maml: MAML,
    parameters: Weights,
    distribution: TaskDistribution,
    config: Config,
    world: World,
) -> Baseline:
    """With the rate whose mean validation loss over all numbers of steps is the lowest."""

    def with_rate(rate: float) -> MAML:
        return maml.with_options(inner_lr=rate, inner_optimizer=rule, **PLAIN_STEP)

    norm = config.choices.query_norm
    losses = {}
    for rate in tqdm(
        RATES[rule], desc=f"{name}: rates on validation tasks", leave=False, disable=not world.first
    ):
        found = evaluate(
            with_rate(rate), parameters, distribution, "validation", tasks=VALIDATION_TASKS,
            steps=config.evaluation.eval_steps, normalisations=(norm,), world=world,
        )  # fmt: skip
        loss = found.losses[norm][:, 1:].mean().item()
        losses[rate] = loss if math.isfinite(loss) else math.inf
    best = min(losses, key=losses.__getitem__)
    result = tested(
        with_rate(best), parameters, distribution, config, world, steps=config.evaluation.eval_steps
    )
    return Baseline(name, f"rate {best}", result)


def trained(config: Config, call: Call, folder: Path, world: World = ALONE) -> Weights:
    """The meta-parameters of a run in its folder, which is begun, or gone on with, where it must be.

    Raises UsageError where the folder holds a run with other settings, or another process trains in it;
    InterruptedBySignalError where a signal came.
    """
    with ExitStack() as locked:
        with world.together():
            if world.first:
                locked.enter_context(no_empty_folder_left(folder))
                locked.enter_context(lock_folder(folder, otherwise="do without --baselines"))
        return _trained(config, call, folder, world)


def _trained(config: Config, call: Call, folder: Path, world: World) -> Weights:
    file, start = folder / LAST, Start(config, folder)
    if file.exists():
        checkpoint = load_checkpoint(file)
        saved = config_of(checkpoint.settings, file)
        if what_is_learned(saved) != what_is_learned(config):
            raise UsageError(f"{folder} holds a run with other settings: move it away")
        config = saved.replaced(iterations=config.training.iterations)
        start = Start(config, folder, file, checkpoint, resumes=True)
    start, runtime = prepare_run(start, config.values(), call, world)
    assembly = assemble(start, call, runtime, {}, team=world)
    if start.resumed is not None and start.resumed.iteration >= config.training.iterations:
        return assembly.parameters
    folder.mkdir(parents=True, exist_ok=True)
    if runtime.world.first:
        print(f"Training {folder}", file=sys.stderr, flush=True)
    run = assembly.open_run(folder)
    code = train_runs([assembly], [run])
    if run.failure is not None:
        raise UsageError(f"{folder}: {run.failure}")
    if code:
        raise InterruptedBySignalError(code)
    return {name: w.clone() for name, w in run.parameters.items()}


# ---- loss over iterations -------------------------------------------------------------------


def scratch_curve(config: Config, call: Call, runtime: Runtime, iterations: Sequence[int]) -> list[float]:
    """Mean query loss after training from scratch on the first task of each iteration, in windows.

    Arguments:
        iterations: the last iteration of each window, which begins behind the one before.
    """
    distribution, maml = build(from_scratch(config, testing=False), call, runtime)
    assert isinstance(distribution, Regression)
    maml = maml.with_options(inner_lr=SCRATCH_RATE, inner_optimizer="adam", **PLAIN_STEP)
    parameters = maml.initial_parameters(config.training.seed)

    def query_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        weights = maml.adapt(parameters, support_x, support_y, SCRATCH_STEPS)
        return maml.loss(maml.call(weights, query_x), query_y)

    numbers = torch.arange(1, iterations[-1] + 1, device=runtime.device)
    losses = []
    training = distribution.resized(config.training_shots)
    with torch.no_grad():
        for part in tqdm(
            numbers.split(EPISODES_AT_ONCE), desc="from scratch on the training tasks", leave=False
        ):
            batch = training.sample("train", config.training.seed, part, range(1))
            losses.append(maml.over_tasks(query_loss)(*batch))
    windows = torch.cat(losses).tensor_split(tuple(iterations[:-1]))
    return [window.mean().item() for window in windows]


def windows_of(curve: Mapping[str, Sequence[float]]) -> tuple[list[int], list[float]]:
    """A training curve in windows of some 300 iterations, from points of fewer: ends and means."""
    ends = [int(end) for end in curve["iteration"]]
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    found: tuple[list[int], list[float]] = ([], [])
    total, size = 0.0, 0
    for end, points, value in zip(ends, sizes, curve["query_loss"], strict=True):
        total, size = total + points * value, size + points
        if size >= WINDOW:
            found[0].append(end)
            found[1].append(total / size)
            total, size = 0.0, 0
    if size and not found[0]:
        return [ends[-1]], [total / size]
    return found

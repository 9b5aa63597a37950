"""Measure what meta-learning must beat (--baselines), on the test tasks of a checkpoint.

    evaluate.evaluate_one -> the checkpoint's result; measure_baselines -> the others' -> table, JSON, picture

The baselines are those of Finn et al. 2017, section 5.1: training from scratch on each task, pretraining on
all tasks with fine-tuning, and an oracle told the task. Learning rates are chosen on validation tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from commands.build import build
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.evaluate import evaluate_one
from commands.names import select_meaningful
from commands.resolve import resolve
from commands.train import train
from common.device import Runtime
from common.errors import UsageError
from common.optimizers import Weights
from common.processes import World
from evaluation.figures import results_figure
from evaluation.meta_test import Evaluation, evaluate, loss_per_step
from evaluation.style import write_figure
from evaluation.tables import StepResults, evaluation_record, results_table, write_json
from tasks.options import CURVES
from training.checkpoint import load_checkpoint
from training.folders import LAST, find_runs

RATES = {
    "sgd": (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "adam": (0.001, 0.003, 0.01, 0.03, 0.1),
}
RATE_TASKS = 600  # validation tasks on which rates are chosen

# As a well-known course assignment trains from scratch on each training task, and plots it
SCRATCH_STEPS, SCRATCH_RATE, WINDOW = 10, 0.001, 300
EPISODES_AT_ONCE = 3000

# Settings that a baseline shares with the run: those of these groups, and these
SHARED_GROUPS = ("tasks", "learner", "logging")
SHARED = (
    *("meta_batch_size", "iterations", "seed", "precision", "compile", "vectorise", "tasks_at_once"),
    *("eval_tasks", "eval_steps"),
)

Results = dict[tuple[str, str], Evaluation]  # by method and how it adapts, in words


def baselines(call: Call, given: Mapping[str, Any], command: str, world: World) -> int:
    """Measure a checkpoint and its baselines on the same test tasks; return the exit code."""
    assert call.load is not None
    with world.together():
        if find_runs(call.load):
            raise UsageError("--baselines accompanies one run: name its checkpoint")
    subject = evaluate_one(call, given, command, world)
    folder, saved, runtime = call.load.parent / "baselines", subject.trained, subject.runtime
    for name, flags in trained_baselines(saved).items():
        start = replace(call, eval=False, load=None, out=None, resume=True)
        if code := train(replace(start, checkpoint_path=folder, run_name=name), flags, world):
            print("To resume: the same command", flush=True)
            return code
    algorithm, norm = saved.choices.algorithm, saved.choices.query_norm
    results = {(algorithm, "as trained"): subject.result}
    results |= measure_baselines(saved, subject.config, call, runtime, folder)
    selected = {f"{name}, {how}": StepResults.over([result], norm) for (name, how), result in results.items()}
    print("\n" + results_table(selected, subject.caption))
    if not world.first:
        return 0
    curves = {}
    assert subject.source is not None
    if saved.tasks.dataset in CURVES and subject.source.progress["training"]:
        ends, losses = average_windows(subject.source.progress["training"], saved.training.log_every)
        scratch = scratch_curve(saved, call, runtime, ends)
        curves = {algorithm: (ends, losses), "from scratch, Adam 0.001, 10 steps": (ends, scratch)}
    record = {
        "command": command,
        **subject.record(),
        "methods": {name: {"how": how, **evaluation_record(r)} for (name, how), r in results.items()},
        "curves": {n: {"iteration": ends, "query_loss": values} for n, (ends, values) in curves.items()},
    }
    file = f"{subject.stem(call)}-baselines"
    write_json(Path(f"{file}.json"), record)
    learning = {name: [curve] for name, curve in curves.items()}
    measure = f"query {subject.caption.loss_name} while training, means of windows"
    figure = results_figure(selected, subject.caption, learning=learning, learning_measure=measure)
    write_figure(Path(f"{file}.png"), figure)
    print(f"Written: {file}.json and .png")
    return 0


def trained_baselines(saved: Config) -> dict[str, dict[str, Any]]:
    """Return the flags of the runs that baselines are, by name: none in classification.

    Its labels are drawn anew for each task: there is nothing about them to pretrain or to tell.
    """
    if saved.tasks.classification:
        return {}
    flags = plain_flags(saved, "pretrain")
    oracle = {"oracle": flags | {"oracle": True}} if saved.tasks.dataset in CURVES else {}
    return {"pretrained": flags, **oracle}


def measure_baselines(saved: Config, config: Config, call: Call, runtime: Runtime, folder: Path) -> Results:
    """Return the results of all baselines of a run; `config` has the sizes of its test."""
    distribution, maml = build(scratch_settings(config), call, runtime)
    norm, steps, tasks = config.choices.query_norm, config.evaluation.eval_steps, config.evaluation.eval_tasks
    test = partial(evaluate, distribution=distribution, normalisations=(norm,), world=runtime.world)

    def tune(name: str, rule: str, parameters: Weights) -> Results:
        """Test with the rate whose mean validation loss over all numbers of steps is the lowest."""

        def measure(rate: float, split: str, tasks: int) -> Evaluation:
            tuned = maml.with_options(inner_lr=rate, inner_optimizer=rule)
            return test(tuned, parameters, split=split, tasks=tasks, steps=steps)

        losses = {}
        for rate in tqdm(RATES[rule], desc=f"{name}: rates", leave=False, disable=not runtime.world.first):
            result = measure(rate, "validation", RATE_TASKS)
            losses[rate] = result.losses[norm][:, 1:].mean().nan_to_num(math.inf).item()
        best = min(losses, key=losses.__getitem__)
        return {(name, f"rate {best}"): measure(best, "test", tasks)}

    fresh = maml.initial_parameters(config.training.seed)
    results = tune("scratch, sgd", "sgd", fresh) | tune("scratch, adam", "adam", fresh)
    for name in trained_baselines(saved):
        weights = load_checkpoint(folder / name / LAST).parameters
        weights = {key: w.to(runtime.device, runtime.dtype) for key, w in weights.items()}
        if name == "pretrained":
            results |= tune(name, "sgd", weights)
        else:  # the oracle is given the answer, not examples
            told = resolve(plain_flags(config, "pretrain", testing=True) | {"oracle": True})
            distribution, oracle = build(told, call, runtime)
            result = test(oracle, weights, distribution=distribution, split="test", tasks=tasks, steps=0)
            results[name, "not adapted"] = result
    return results


def plain_flags(config: Config, algorithm: str, *, testing: bool = False) -> dict[str, Any]:
    """Return the flags of a run with these data, this budget and the algorithm's own choices.

    With `testing`, for its test tasks alone, the shots of training tasks do not matter.
    """
    shared = {*SHARED, *(name for name, flag in CONFIG_FLAGS.items() if flag.group in SHARED_GROUPS)}
    values = {name: value for name, value in select_meaningful(config).items() if name in shared - {"oracle"}}
    if config.choices.meta_gradient == "reptile" and config.tasks.train_shots is not None:
        values["train_shots"] = config.training_shots  # without the query, which Reptile counts in
    if testing:
        values.pop("train_shots", None)
    return {name: v for name, v in values.items() if v not in (None, ())} | {"algorithm": algorithm}


def scratch_settings(config: Config, *, testing: bool = True) -> Config:
    """Return the settings of ordinary training: all weights, from PyTorch's initialisation."""
    return resolve(plain_flags(config, "maml", testing=testing)).replaced(init="torch", adapt_norm=True)


def scratch_curve(config: Config, call: Call, runtime: Runtime, ends: Sequence[int]) -> list[float]:
    """Return the mean query loss after training from scratch on each iteration's first task, in windows.

    `ends` are the windows' last iterations.
    """
    distribution, maml = build(scratch_settings(config, testing=False), call, runtime)
    maml = maml.with_options(inner_lr=SCRATCH_RATE, inner_optimizer="adam")
    parameters = maml.initial_parameters(config.training.seed)

    tasks, losses = distribution.resized(config.training_shots), []
    parts = torch.arange(1, ends[-1] + 1, device=runtime.device).split(EPISODES_AT_ONCE)
    for iterations in tqdm(parts, desc="from scratch on the training tasks", leave=False):
        batch = tasks.sample("train", config.training.seed, iterations, range(1))
        outputs = maml.predictions(parameters, batch, SCRATCH_STEPS)["transductive"]
        losses.append(loss_per_step(maml, outputs, batch.query_y)[:, -1])
    windows = torch.cat(losses).tensor_split(tuple(ends[:-1]))
    return [window.mean().item() for window in windows]


def average_windows(curve: Mapping[str, Sequence[float]], log_every: int) -> tuple[list[int], list[float]]:
    """Return a training curve in windows of about 300 iterations: their last iterations and means.

    Iterations after the last full window are left out; a shorter curve is one window.
    """
    points = min(max(1, WINDOW // log_every), len(curve["iteration"]))
    ends = [int(end) for end in curve["iteration"][points - 1 :: points]]
    losses = torch.tensor(curve["query_loss"][: points * len(ends)], dtype=torch.float64)
    return ends, losses.view(-1, points).mean(1).tolist()

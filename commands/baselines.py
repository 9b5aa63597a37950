"""Measure what meta-learning must beat (--baselines), on the test tasks of a checkpoint.

    evaluate.measure -> the checkpoint's result; measure_baselines -> the others' -> table, JSON, pictures

The baselines are those of Finn et al. 2017, section 5.1: training from scratch on each task, pretraining on
all tasks with fine-tuning, and an oracle told the task. Learning rates are chosen on validation tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from commands.build import build
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.evaluate import Subject, common_record, measure_runs, summarise
from commands.names import format_duration, name_method, select_meaningful
from commands.resolve import resolve
from commands.train import train
from common.errors import UsageError
from common.processes import World
from evaluation.examples import Examples, adapt_examples, fits_figure
from evaluation.figures import results_figure, write_results
from evaluation.meta_test import Evaluation, evaluate, loss_per_step
from evaluation.tables import Curve, StepResults, evaluation_record, format_decimal, results_table
from tasks.options import CURVES
from training.checkpoint import load_checkpoint
from training.folders import LAST, find_runs
from training.tensorboard import read_speed

RATES = {"sgd": (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), "adam": (0.001, 0.003, 0.01, 0.03, 0.1)}
RATE_TASKS = {False: 600, True: 100}  # validation tasks on which rates are chosen, by `classification`

# Training from scratch on each training task, for the learning curves, as a course assignment does it
SCRATCH_STEPS, SCRATCH_RATE, WINDOW = 10, 0.001, 300
EPISODES_AT_ONCE = 3000

# Settings that a baseline shares with the run, beside those of data, learner and logging
SHARED = (
    *("meta_batch_size", "iterations", "seed", "precision", "compile", "vectorise", "tasks_at_once"),
    *("eval_tasks", "eval_steps", "metric", "metric_mode"),
)


@dataclass
class Method:
    """Results of a method, a checkpoint's or a baseline's, on the test tasks of one run or several."""

    title: str
    ways: list[str]  # how it adapts in each run: "rate 0.01"
    results: list[Evaluation]  # of each run
    fits: Examples | None  # the first run's, to built-in curves; None: other tasks, or it does not adapt

    @property
    def label(self) -> str:
        return f"{self.title}, {' or '.join(dict.fromkeys(self.ways))}"


def baselines(call: Call, flags: Mapping[str, Any], command: str, world: World) -> int:
    """Measure a checkpoint, or runs that differ in their seed, and their baselines; return the exit code."""
    assert call.load is not None
    with world.together():
        runs = find_runs(call.load)
        if len({run["setting"] for run in runs}) > 1:
            raise UsageError(f"{call.load} has runs of several settings: --baselines takes those of one")
    subjects = measure_runs(call, flags, command, world)
    if code := train_baselines(subjects, call, command, world):
        return code
    first, methods = subjects[0], measure_methods(subjects, call)
    norm, titles = first.trained.choices.query_norm, {name: one.title for name, one in methods.items()}
    over_runs = {name: StepResults.over(one.results, norm) for name, one in methods.items()}
    selected = {methods[name].label: part for name, part in over_runs.items()}
    caption, stem = first.caption(), first.stem(call)
    if runs:
        caption, name = summarise(subjects)
        stem = (call.out or runs[0]["file"].parent.parent) / name
        record: dict[str, Any] = {"command": command, **common_record(subjects, runs)}
    else:
        record = {"command": command, **first.record()}
        record["methods"] = {
            name: {"how": one.ways[0], **evaluation_record(one.results[0])} for name, one in methods.items()
        }
    print("\n" + results_table(selected, caption))
    if not world.first:
        return 0
    record["over_runs"] = {name: part.record() for name, part in over_runs.items()}
    record["how"] = {name: one.ways for name, one in methods.items()}
    learning = collect_curves([learning_curves(subject, call) for subject in subjects])
    means = {name: mean_curve(curves) for name, curves in learning.items()}
    record["curves"] = {n: {"iteration": ends, "query_loss": values} for n, (ends, values) in means.items()}
    measured = f"query {caption.loss_name} on training tasks"
    if means:
        print(describe_ends({titles.get(name, name): curve for name, curve in means.items()}, measured))
    shown = {titles.get(name, name): curves for name, curves in learning.items()}
    figure = results_figure(selected, caption, learning=shown, learning_measure=measured)
    fits = {f"{one.title}, {one.ways[0]}": one.fits for one in methods.values() if one.fits}
    more = {"fits": fits_figure(fits, first.caption().title_of_examples)} if fits else {}
    print(write_results(f"{stem}-baselines", record, figure, **more))
    return 0


def measure_methods(subjects: Sequence[Subject], call: Call) -> dict[str, Method]:
    """Return the method of several runs and its baselines, by name."""
    first, results = subjects[0], [subject.result for subject in subjects]
    saved, curves = first.trained.choices, first.examples() if first.has_curves else None
    methods = {saved.algorithm: Method(name_method(saved), ["as trained"] * len(subjects), results, curves)}
    for subject in subjects:
        for (name, way), (result, fits) in measure_baselines(subject, call).items():
            method = methods.setdefault(name, Method(name, [], [], fits))
            method.ways.append(way)
            method.results.append(result)
    return methods


def train_baselines(subjects: Sequence[Subject], call: Call, command: str, world: World) -> int:
    """Train or resume what is trained as baselines; return the exit code."""
    for subject in subjects:
        folder = find_baselines(subject)
        if world.first:
            print(announce(subject.trained, folder), flush=True)
        for name, baseline in plan_baselines(subject.trained).items():
            start = replace(call, eval=False, load=None, out=None, resume=True)
            if code := train(replace(start, checkpoint_path=folder, run_name=name), baseline, command, world):
                print("To resume: the same command", flush=True)
                return code
    return 0


def find_baselines(subject: Subject) -> Path:
    """Return the folder of the runs that are trained as baselines of a checkpoint."""
    assert subject.file is not None
    return subject.file.parent / "baselines"


def collect_curves(of_runs: Sequence[Mapping[str, Curve]]) -> dict[str, list[Curve]]:
    """Return the runs' curves by name, as far as the shortest goes; none where their points differ."""
    length = min(len(ends) for curves in of_runs for ends, _ in curves.values() or [((), ())])
    names = of_runs[0] if length else ()
    cut = {name: [(x[:length], y[:length]) for x, y in (one[name] for one in of_runs)] for name in names}
    return cut if all(x == curves[0][0] for curves in cut.values() for x, _ in curves) else {}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of curves with the same points."""
    return curves[0][0], [fmean(values) for values in zip(*(y for _, y in curves), strict=True)]


def describe_ends(means: Mapping[str, Curve], measured: str) -> str:
    """Return the last points of the learning curves, and the iterations over which they are means."""
    ends, _ = next(iter(means.values()))
    begin = ends[-2] if len(ends) > 1 else 0
    points = "; ".join(f"{name} {format_decimal(y[-1], 4)}" for name, (_, y) in means.items())
    return f"Mean {measured}, iterations {begin + 1:,} to {ends[-1]:,}: {points}"


def announce(saved: Config, folder: Path) -> str:
    """Return what will be trained and measured, and how long that takes."""
    names, iterations = [*plan_baselines(saved)], saved.training.iterations
    rates = len(RATES["sgd"]) + len(RATES["adam"]) + len(RATES["sgd"]) * ("pretrained" in names)
    measured = f"training from scratch{' and fine-tuning' * bool(names)} at {rates} learning rates"
    measured = f"measures {measured} on {RATE_TASKS[saved.tasks.classification]} validation tasks each"
    if not names:
        return f"\nBaselines: {measured}."
    time = "as long as the run took"
    if speed := read_speed(folder.parent):
        time = f"about {format_duration(iterations / speed)}, and to compile"
    trained = f"trains {' and '.join(names)} in {folder}, once: {iterations:,} iterations each, {time}"
    measured += ", and training from scratch on the run's tasks" * (saved.tasks.dataset in CURVES)
    return f"\nBaselines: {trained}.\nThen {measured}."


def plan_baselines(saved: Config) -> dict[str, dict[str, Any]]:
    """Return the flags of runs to train as baselines, by name: none where each task draws labels anew."""
    if saved.tasks.classification:
        return {}
    flags = plain_flags(saved, "pretrain")
    oracle = {"oracle": flags | {"oracle": True}} if saved.tasks.dataset in CURVES else {}
    return {"pretrained": flags, **oracle}


def measure_baselines(
    subject: Subject, call: Call
) -> dict[tuple[str, str], tuple[Evaluation, Examples | None]]:
    """Return results on the test tasks of a checkpoint by a baseline's name and how it adapts, in words.

    The rate of a baseline has the lowest mean loss over all numbers of steps on validation tasks. What
    adapts to built-in curves has its fits beside its result, for a picture.
    """
    saved, config, runtime = subject.trained, subject.config, subject.runtime
    scratch = derive_scratch_settings(config)
    distribution, maml = build(scratch, call, runtime, scales=subject.distribution.scales)
    norm, steps, world = config.choices.query_norm, scratch.evaluation.eval_steps, runtime.world
    test = partial(evaluate, distribution=distribution, normalisations=(norm,), world=world)
    fresh = maml.initial_parameters(config.training.seed)
    results: dict[tuple[str, str], tuple[Evaluation, Examples | None]] = {}
    starts = {"scratch, sgd": fresh, "scratch, adam": fresh}
    for name in plan_baselines(saved):
        weights = load_checkpoint(find_baselines(subject) / name / LAST).parameters
        starts[name] = {key: w.to(runtime.device, runtime.dtype) for key, w in weights.items()}
    rules = {name: "adam" if name.endswith("adam") else "sgd" for name in starts if name != "oracle"}
    rates = sum(len(RATES[rule]) for rule in rules.values())
    rate_tasks = RATE_TASKS[saved.tasks.classification]
    bar = tqdm(desc="learning rates", total=rates, leave=False, disable=not world.first)
    for name, parameters in starts.items():
        how: dict[str, Any] = {"split": "test", "tasks": config.evaluation.eval_tasks, "steps": steps}
        if name == "oracle":  # it is given the answer, not examples
            oracle_config = resolve(plain_flags(config, "pretrain", testing=True) | {"oracle": True})
            how["distribution"], oracle = build(oracle_config, call, runtime)
            results[name, "not adapted"] = test(oracle, parameters, **how | {"steps": 0}), None
            continue
        rule, losses = rules[name], {}
        tuned = {rate: maml.with_options(inner_lr=rate, inner_optimizer=rule) for rate in RATES[rule]}
        for rate in tuned:
            result = test(tuned[rate], parameters, split="validation", tasks=rate_tasks, steps=steps)
            losses[rate] = result.losses[norm][:, 1:].mean().nan_to_num(math.inf).item()
            bar.update()
        best = min(losses, key=losses.__getitem__)
        fits, shown = None, {*subject.shown_steps, steps}
        if subject.has_curves:
            fits = adapt_examples(tuned[best], parameters, distribution, "test", shown)
        results[name, f"rate {best}"] = test(tuned[best], parameters, **how), fits
    bar.close()
    return results


def plain_flags(config: Config, algorithm: str, *, testing: bool = False) -> dict[str, Any]:
    """Return the flags of a run, or of its test alone, with these data and budget and its own algorithm."""
    groups = ("tasks", "learner", "logging")
    shared = {*SHARED, *(name for name, flag in CONFIG_FLAGS.items() if flag.group in groups)}
    values = {name: value for name, value in select_meaningful(config).items() if name in shared - {"oracle"}}
    if config.choices.meta_gradient == "reptile" and config.tasks.train_shots is not None:
        values["train_shots"] = config.training_shots  # without the query, which Reptile counts in
    if testing:
        values.pop("train_shots", None)
    if not config.evaluation.eval_steps:  # of a run without inner steps, as its baselines are not
        values.pop("eval_steps", None)
    return {name: v for name, v in values.items() if v not in (None, ())} | {"algorithm": algorithm}


def derive_scratch_settings(config: Config) -> Config:
    """Return the settings of ordinary training: all weights, from PyTorch's initialisation."""
    flags = plain_flags(config, "maml", testing=True) | {"compile": "off"}  # with fast convolutions for that
    return resolve(flags).replace_settings(init="torch", adapt_norm=True)


def learning_curves(subject: Subject, call: Call) -> dict[str, Curve]:
    """Return the query loss of the run while training, and after training from scratch on its first tasks.

    Points are means over windows of about 300 iterations, at their last ones; the rest is left out.
    """
    config, runtime = subject.trained, subject.runtime
    curve = subject.curves()["training"]
    if config.tasks.dataset not in CURVES or not curve:
        return {}
    points = min(max(1, WINDOW // config.training.log_every), len(curve["iteration"]))
    ends = [int(end) for end in curve["iteration"][points - 1 :: points]]
    learned = torch.tensor(curve["query_loss"][: points * len(ends)], dtype=torch.float64).view(-1, points)
    distribution, maml = build(derive_scratch_settings(config), call, runtime)
    maml = maml.with_options(inner_lr=SCRATCH_RATE, inner_optimizer="adam")
    parameters = maml.initial_parameters(config.training.seed)
    tasks, losses = distribution.resized(config.training_shots), []
    parts = torch.arange(1, ends[-1] + 1, device=runtime.device).split(EPISODES_AT_ONCE)
    for iterations in tqdm(parts, desc="from scratch on the training tasks", leave=False):
        batch = tasks.sample("train", config.training.seed, iterations, range(1))
        outputs = maml.predictions(parameters, batch, SCRATCH_STEPS)["transductive"]
        losses.append(loss_per_step(maml, outputs, batch)[:, -1])
    scratch = [window.mean().item() for window in torch.cat(losses).tensor_split(tuple(ends[:-1]))]
    name = f"from scratch, Adam {SCRATCH_RATE}, {SCRATCH_STEPS} steps"
    return {config.choices.algorithm: (ends, learned.mean(1).tolist()), name: (ends, scratch)}

#!/usr/bin/env python3
"""Gradient-based meta-learning (MAML) from the command line.

    python main.py                                          # the paper's sinusoid
    python main.py --dataset omniglot -n 5 -k 1             # 5-way 1-shot Omniglot
    python main.py --first-order --meta-batch-size 1 --samples 50 --iterations 40000
    python main.py --load checkpoints/RUN/last.pt           # go on with a run
    python main.py --algorithm meta-sgd                     # another of the family, or choice by choice
    python main.py --eval --load checkpoints/RUN/best.pt    # measure it on the test tasks
    python main.py --adapt FOLDER --load checkpoints/RUN/best.pt    # adapt it to a task of one's own
    python main.py --dataset images:FOLDER --learner torchvision:resnet18
    tensorboard --logdir checkpoints

Every flag is declared in config.py and shown by --help.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config as settings
from config import Config, Invocation
from errors import UsageError

if TYPE_CHECKING:
    from checkpoint import Checkpoint
    from evaluation import Evaluation
    from report import Words
    from runtime import Runtime
    from trainer import Trainer


OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory")  # of RuntimeErrors of PyTorch


def main(arguments: list[str]) -> int:
    """Runs one command line; the exit code: 0, 2 for bad input, 128 + signal where one ended training."""
    try:
        given = settings.parse(arguments)
        call = settings.check_invocation(given)
        if call.load is None and not call.resume:
            settings.resolve(given)  # mistakes answer before PyTorch is imported
        if call.adapt is not None:
            return adapt(call, given, arguments)
        return evaluate(call, given, arguments) if call.eval else train(call, given)
    except UsageError as error:
        print(f"main.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        print(
            "main.py: error: out of memory: take fewer tasks at a time (--tasks-at-once), or smaller ones",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nmain.py: interrupted", file=sys.stderr)
        return 130


# ---- training -------------------------------------------------------------------------------


def train(call: Invocation, given: Mapping[str, Any]) -> int:
    """A new run, or one that goes on (--load, --resume)."""
    start_file, folder = where_to_train(call, given)

    from building import (
        build,
        check_splits,
        fitted,
        no_empty_folder_left,
        prepare,
        print_settings,
        tried,
        writable,
    )
    from checkpoint import check_same_split, fitting_parameters, load_checkpoint
    from compiler import Compiler
    from inner_loop import RATE
    from learner import LEARNERS
    from losses import LOSSES
    from trainer import Trainer

    if start_file is None:
        start, config = None, settings.resolve(given)
    else:
        start, config = read_start(start_file, given)
        finished = start_file.with_name("training.json").exists()
        if start.iteration >= config.iterations and finished:
            print(
                f"{start_file} is at iteration {start.iteration:,}: a larger --iterations goes on from there"
            )
            return 0
        origin = start.progress["origin"] or ""
        if call.init_from and not origin.startswith(f"{call.init_from}, "):
            raise UsageError(
                f"--init-from {call.init_from} disagrees with the checkpoint {start_file}, "
                f"which began from {origin or 'the initialisation'}: leave it out when going on"
            )
    runtime = prepare(config, call)
    config = fitted(config, given, runtime, new=start is None)
    weights_file = start_file or call.init_from
    weights = start or (load_checkpoint(weights_file) if weights_file else None)
    home = folder or call.checkpoint_path
    with no_empty_folder_left(home):
        writable(home, "--load" if call.load else "--checkpoint-path")
        if call.autotune and start is None:
            config = autotuned(config, given, call, runtime)
        compiler = Compiler(runtime.device)
        distribution, maml = build(config, call, runtime, compiler, fixed=weights.fixed if weights else None)
        if start is not None and start_file is not None:
            check_same_split(start_file, start.splits, distribution.split_names)
        check_splits(distribution, config)
        parameters = maml.initial_parameters(config.seed)
        if config.learner not in LEARNERS or config.loss not in LOSSES:
            tried(maml, parameters, distribution, config)
    if weights and weights_file:
        saved = weights.parameters
        if start is None:  # another algorithm's, maybe: inner rates are taken where both learn them
            fresh_rates = {name: w for name, w in parameters.items() if name.startswith(RATE)}
            foreign = {name for name in saved if name.startswith(RATE) and name not in parameters}
            saved = fresh_rates | {name: w for name, w in saved.items() if name not in foreign}
        parameters = fitting_parameters(weights_file, saved, parameters, config.learner)
    if start is not None and start_file is not None:
        fitting_parameters(start_file, start.statistics, maml.initial_statistics(), config.learner)
    folder = folder or fresh_folder(call.checkpoint_path, config)
    origin = f"{weights_file}, iteration {weights.iteration:,}" if weights else None
    trainer = Trainer(config, maml, parameters, distribution, folder, compiler, start, origin)
    doing = f"Going on from iteration {start.iteration:,}" if start else "Meta-training"
    print_settings(config, runtime, f"{doing} in {folder}")
    signal = trainer.train()
    print_end(trainer, folder, signal)
    return 0 if signal is None else 128 + signal


def autotuned(config: Config, given: Mapping[str, Any], call: Invocation, runtime: Runtime) -> Config:
    """The settings with what is fastest on this machine (--autotune)."""
    from autotune import fastest
    from building import build
    from compiler import Compiler
    from trainer import Trainer

    def make(candidate: Config) -> Callable[[], object]:
        compiler = Compiler(runtime.device)
        candidate = replace(candidate, exact_from=0)  # which takes longer than the first order
        distribution, maml = build(candidate, call, runtime, compiler)
        trainer = Trainer(
            candidate, maml, maml.initial_parameters(config.seed), distribution, Path(), compiler
        )
        compiler.active = candidate.compile == "on"
        return lambda: trainer.meta_step(trainer.state).sums.tolist()

    print("Measuring (--autotune):", flush=True)
    return fastest(config, given, make, lambda line: print(f"  {line}", flush=True))


def print_end(trainer: Trainer, folder: Path, signal: int | None) -> None:
    """How training ended, and what to type next."""
    from building import own_code_flags
    from checkpoint import BEST, LAST

    code = own_code_flags(trainer.config)
    final = trainer.final_loss()
    if final is not None:
        loss, first, last = final
        print(f"Mean training query loss of iterations {first:,} to {last:,}: {loss:.4f}")
    if signal is not None:
        go_on = shlex.join(["python", "main.py", "--load", str(folder / LAST), *code])
        print(f"Saved at iteration {trainer.iteration:,}. Go on: {go_on}")
        return
    file = folder / (BEST if trainer.progress.best_iteration else LAST)
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(folder)]))
    print("Test it:  ", shlex.join(["python", "main.py", "--eval", "--load", str(file), *code]))


def where_to_train(call: Invocation, given: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, if any, and the run's folder (None: a fresh one)."""
    from checkpoint import BEST, LAST

    if call.load is not None:
        if not call.load.is_file():
            hint = f": name {call.load / LAST}" if call.load.is_dir() else ""
            raise UsageError(f"{call.load}: there is no such checkpoint{hint}")
        run = call.load.resolve().parent
        if "checkpoint_path" in given and call.checkpoint_path.resolve() not in (run, run.parent):
            raise UsageError(
                f"--load goes on in {call.load.parent}, not in --checkpoint-path {call.checkpoint_path}: "
                "leave that out, or begin a new run with --init-from"
            )
        if call.load.name not in (BEST, LAST):
            raise UsageError(
                f"{call.load} is not in a run's folder as {LAST} or {BEST}: begin a new run from its "
                "weights with --init-from"
            )
        return call.load, call.load.parent
    if call.run_name is None:
        return None, None
    folder = call.checkpoint_path / call.run_name
    there = [folder / name for name in (LAST, BEST) if (folder / name).is_file()]
    if there:
        if call.resume:
            return there[0], folder
        raise UsageError(f"the run {folder} exists: go on with --resume, or choose another --run-name")
    if folder.exists() and not call.resume and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UsageError(f"{folder} is not empty: choose another --run-name, or --resume to begin in it")
    return None, folder


def read_start(file: Path, given: Mapping[str, Any]) -> tuple[Checkpoint, Config]:
    """The checkpoint to go on from, and its settings with the flags that may differ."""
    from checkpoint import LAST, load_checkpoint

    start = load_checkpoint(file)
    last = file.with_name(LAST)
    if file.name != LAST and last.is_file():
        ahead = load_checkpoint(last).iteration
        if ahead > start.iteration:
            raise UsageError(
                f"{last} is ahead (iteration {ahead:,}; {file.name}: {start.iteration:,}): --load that one, "
                "or begin a new run with --init-from"
            )
    return start, settings.resolve_from(start.config, given, evaluate=False)


def fresh_folder(checkpoint_path: Path, config: Config) -> Path:
    """A new run's folder, named after its settings and the time."""
    name = f"{config.dataset_name}-{task_size(config)}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = checkpoint_path / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


# ---- evaluation -----------------------------------------------------------------------------


def evaluate(call: Invocation, given: Mapping[str, Any], arguments: list[str]) -> int:
    """Measures a checkpoint, or the fresh initialisation, on the test tasks."""
    from building import build, prepare, print_settings, writable
    from checkpoint import check_same_split, fitting_parameters, load_checkpoint

    source = None if call.load is None else load_checkpoint(call.load)
    if source is None:
        config = settings.resolve(given)
        what, stem = (
            "the fresh initialisation (no --load)",
            f"fresh-{config.learner_name}-{config.init}-seed{config.seed}",
        )
        default_out = call.checkpoint_path
    else:
        config = settings.resolve_from(source.config, given, evaluate=True, eval_dataset=call.eval_dataset)
        assert call.load is not None
        what, stem = f"{call.load}, iteration {source.iteration:,}", call.load.stem
        if call.out:  # results of several runs may meet there
            stem = f"{call.load.resolve().parent.name}-{stem}"
        default_out = call.load.parent
    # eager, whatever the training was
    config = replace(config, convolution="grouped", tasks_at_once=given.get("tasks_at_once"))
    runtime = prepare(config, call)
    out = writable(call.out or default_out, "--out")

    import evaluation
    import report
    from losses import loss_name
    from runtime import versions

    distribution, maml = build(config, call, runtime, fixed=source.fixed if source else None)
    parameters, statistics = maml.initial_parameters(config.seed), maml.initial_statistics()
    if source is not None and call.load is not None:
        if call.eval_dataset is None:
            check_same_split(call.load, source.splits, distribution.split_names)
        parameters = fitting_parameters(call.load, source.parameters, parameters, config.learner)
        statistics = fitting_parameters(call.load, source.statistics, statistics, config.learner)
    print_settings(config, runtime, f"Evaluating {what} on {config.eval_tasks} test tasks")
    normalisations: tuple[str, ...] = (config.query_norm,)
    if maml.has_batch_norm:
        normalisations = ("transductive", "inductive", *["per-step"] * bool(statistics))
    result = evaluation.evaluate(
        maml,
        parameters,
        distribution,
        "test",
        tasks=config.eval_tasks,
        steps=config.eval_steps,
        normalisations=normalisations,
        statistics=statistics,
        inner_batch=config.eval_inner_batch,
    )
    words = report.Words(
        loss_name=loss_name(config.loss),
        trained_steps=config.trained_steps,
        test_steps=config.test_steps,
        title=f"{config.dataset_name}, {task_size(config)}, {config.eval_tasks} test tasks",
    )
    print(report.evaluation_table(result, words))
    size = f"{task_size(config)}-{config.queries}query-{config.eval_tasks}tasks"
    file = out / f"{stem}-test-{config.dataset_name}-{size}"
    record = {
        "command": shlex.join(["main.py", *arguments]),
        "checkpoint": call.load,
        "iteration": source.iteration if source else 0,
        "split": "test",
        "tasks": config.eval_tasks,
        "tasks_seed": evaluation.SEED,
        "trained_steps": config.trained_steps,
        "test_steps": config.test_steps,
        "settings": settings.config_to_plain(config),
        "versions": versions(),
        "device": runtime.describe(),
    }
    report.write_json(Path(f"{file}.json"), record | report.evaluation_record(result))
    fits = None
    if config.dataset in settings.REGRESSION:
        shown = sorted({0, min(config.trained_steps, config.eval_steps), config.eval_steps})
        batch, outputs = evaluation.examples(
            maml,
            parameters,
            distribution,
            "test",
            tasks=3,
            steps=config.eval_steps,
            normalisation=config.query_norm,
            inner_batch=config.eval_inner_batch,
        )
        fits = (batch, outputs, shown)
    report.write_figure(Path(f"{file}.png"), report.evaluation_figure(result, words, fits))
    print(f"Written: {file}.json and .png")
    if call.baselines and source is not None:
        return compare(source, config, call, runtime, result, words, Path(f"{file}-baselines"), record)
    return 0


def compare(
    source: Checkpoint,
    config: Config,
    call: Invocation,
    runtime: Runtime,
    result: Evaluation,
    words: Words,
    file: Path,
    record: dict[str, Any],
) -> int:
    """The checkpoint's result on the test tasks beside those of the baselines (--baselines)."""
    import baselines
    import report

    assert call.load is not None
    try:
        others = baselines.measured(source.config, config, call, runtime, call.load.parent / "baselines")
    except baselines.InterruptedBySignalError as interrupted:
        print("Saved; the same command goes on from there.")
        return 128 + interrupted.signal
    mine = baselines.Baseline(config.algorithm, "as trained", result)
    results = {f"{b.name}\n{b.how}": b.evaluation for b in (mine, *others)}
    print("\n" + report.comparison_table(results, config.query_norm, words))
    curves: dict[str, tuple[list[int], list[float]]] = {}
    if config.dataset in settings.REGRESSION and source.progress["training"]:
        ends, losses = baselines.windows_of(source.progress["training"])
        scratch = baselines.scratch_curve(source.config, call, runtime, ends)
        curves = {config.algorithm: (ends, losses), "from scratch, Adam 0.001, 10 steps": (ends, scratch)}
    methods = {b.name: {"how": b.how} | report.evaluation_record(b.evaluation) for b in (mine, *others)}
    report.write_json(
        Path(f"{file}.json"),
        record
        | {
            "methods": methods,
            "curves": {n: dict(zip(("iteration", "query_loss"), c, strict=True)) for n, c in curves.items()},
        },
    )
    report.write_figure(
        Path(f"{file}.png"), report.comparison_figure(results, config.query_norm, words, curves)
    )
    print(f"Written: {file}.json and .png")
    return 0


# ---- putting it to use ----------------------------------------------------------------------


def adapt(call: Invocation, given: Mapping[str, Any], arguments: list[str]) -> int:
    """Adapts a checkpoint to the examples of one's own task, and predicts the others."""
    from building import prepare, print_settings, writable
    from checkpoint import load_checkpoint
    from using import adapt_to_files, tasks_in

    assert call.load is not None and call.adapt is not None
    source = load_checkpoint(call.load)
    config = settings.resolve_from(source.config, given, evaluate=True, adapt=True)
    config = replace(config, convolution="grouped", tasks_at_once=None)
    runtime = prepare(config, call)
    tasks = tasks_in(call.adapt, config, runtime, weights_file=call.save_weights)
    out = writable(call.out or call.load.parent, "--out")
    what = f"{call.load}, iteration {source.iteration:,}"
    print_settings(config, runtime, f"Adapting {what} to {call.adapt}, {config.test_steps} steps")
    normalisation = given.get("batch_norm", "per-step" if source.statistics else "inductive")
    written = adapt_to_files(
        source, config, tasks, call.adapt, call.load, runtime,
        normalisation=normalisation,
        file=out / f"{call.load.stem}-adapted-{call.adapt.stem}",
        weights_file=call.save_weights,
        record={"command": shlex.join(["main.py", *arguments]), "checkpoint": call.load},
    )  # fmt: skip
    print("Written: " + ", ".join(map(str, written)))
    return 0


def task_size(config: Config) -> str:
    """Ways and shots in words."""
    return f"{config.ways}way-{config.shots}shot" if config.classification else f"{config.shots}shot"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

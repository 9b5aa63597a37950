#!/usr/bin/env python3
"""Gradient-based meta-learning (MAML) from the command line.

    python main.py                                          # the paper's sinusoid
    python main.py --dataset omniglot -n 5 -k 1             # 5-way 1-shot Omniglot
    python main.py --first-order --meta-batch-size 1 --samples 50 --iterations 40000
    python main.py --load checkpoints/RUN/last.pt           # go on with a run
    python main.py --eval --load checkpoints/RUN/best.pt    # measure it on the test tasks
    tensorboard --logdir checkpoints

Every flag is declared in config.py and shown by --help.
"""

from __future__ import annotations

import os
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
    from compiler import Compiler
    from dataset import TaskDistribution
    from maml import MAML
    from runtime import Runtime
    from trainer import Trainer


def main(arguments: list[str]) -> int:
    """Runs one command line; the exit code: 0, 2 for bad input, 128 + signal where one ended training."""
    try:
        given = settings.parse(arguments)
        call = settings.check_invocation(given)
        if call.load is None and not call.resume:
            settings.resolve(given)  # mistakes answer before PyTorch is imported
        return evaluate(call, given, arguments) if call.eval else train(call, given)
    except UsageError as error:
        print(f"main.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print(
            "main.py: error: out of memory: take fewer tasks at a time (--tasks-at-once), or smaller ones",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nmain.py: interrupted", file=sys.stderr)
        return 130


# ---- building blocks ------------------------------------------------------------------------


def prepare(config: Config, call: Invocation) -> Runtime:
    """The device, or a refusal."""
    from runtime import set_up

    return set_up(call.device, config.precision, small_tensors=config.learner == "mlp")


def build(
    config: Config, call: Invocation, runtime: Runtime, accelerate: Compiler | None = None
) -> tuple[TaskDistribution, MAML]:
    """Tasks and algorithm for these settings; the learner in it has its initial weights."""
    from torch.nn import functional as F

    from dataset import build_distribution
    from learner import build_learner
    from maml import MAML, as_it_is
    from optimizers import InnerOptimizer

    distribution = build_distribution(
        config.dataset,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        noise=config.noise,
        oracle=config.oracle,
        omniglot_split=config.omniglot_split,
        resize=config.resize,
        data_root=call.data_root,
        device=runtime.device,
        dtype=runtime.dtype,
    )
    learner = build_learner(
        config.learner,
        config.ways or 1,
        inputs=getattr(distribution, "input_size", 1),
        init=config.init,
        context=config.context_size if config.adapt == "context" else 0,
        seed=config.seed,
    )
    rule = InnerOptimizer(
        config.inner_lr,
        config.inner_optimizer,
        momentum=config.inner_momentum,
        beta_1=config.inner_beta_1,
        weight_decay=config.inner_weight_decay,
        clip_norm=config.inner_clip,
        proximal=config.proximal,
    )
    try:
        maml = MAML(
            learner.to(runtime.device, runtime.dtype),
            F.cross_entropy if config.classification else F.mse_loss,
            inner_lr=config.inner_lr,
            steps=config.steps,
            adapt=config.adapt,
            head=config.head,
            inner_rates=config.inner_rates,
            inner_lr_max=config.inner_lr_max,
            meta_gradient=config.meta_gradient,
            normalisation=config.batch_norm,
            adapt_norm=config.adapt_norm,
            optimizer=rule,
            cg_steps=config.cg_steps,
            cg_damping=config.cg_damping,
            engine=config.engine,
            convolution=config.convolution,
            compute_dtype=runtime.compute_dtype,
            tasks_at_once=config.tasks_at_once,
            accelerate=accelerate or as_it_is,
        )
    except ValueError as error:
        head = "" if config.head is None else f" --head {config.head}"
        raise UsageError(f"--adapt {config.adapt}{head} with --learner {config.learner}: {error}") from error
    return distribution, maml


def writable(folder: Path, flag: str) -> Path:
    """The folder, made if need be, or a refusal that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot write there ({error.strerror or error}); name another folder"
        ) from error
    return folder


def print_settings(config: Config, runtime: Runtime, first_line: str) -> None:
    print(f"{first_line}\n{settings.describe(config)}\n  device      {runtime.describe()}", flush=True)


# ---- training -------------------------------------------------------------------------------


def train(call: Invocation, given: Mapping[str, Any]) -> int:
    """A new run, or one that goes on (--load, --resume)."""
    start_file, folder = where_to_train(call, given)

    from checkpoint import fitting_parameters, load_checkpoint
    from compiler import Compiler
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
    writable(folder or call.checkpoint_path, "--load" if call.load else "--checkpoint-path")
    if call.autotune and start is None:
        config = autotuned(config, given, call, runtime)
    compiler = Compiler(runtime.device)
    distribution, maml = build(config, call, runtime, compiler)
    parameters = maml.initial_parameters(config.seed)
    if weights and weights_file:
        parameters = fitting_parameters(weights_file, weights.parameters, parameters, config.learner)
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


def fitted(config: Config, given: Mapping[str, Any], runtime: Runtime, *, new: bool) -> Config:
    """The settings for this machine: uncompiled where it cannot compile; a GPU takes all tasks at once."""
    from compiler import cpp_compiler

    if new and runtime.device.type == "cuda" and "tasks_at_once" not in given:
        config = replace(config, tasks_at_once=None)
    if not new and given.get("compile") == "on" and config.compile == "off":
        print("main.py: the run began uncompiled, and goes on so", file=sys.stderr)
    if config.compile == "off":
        return config
    if runtime.device.type == "mps":
        reason = "--device mps cannot compile"
    elif cpp_compiler() is None:
        reason = "no C++ compiler was found (install g++, or name one in CXX)"
    else:
        return config
    print(f"main.py: {reason}: the run goes uncompiled", file=sys.stderr)
    if new:
        return settings.resolve({**given, "compile": "off"})
    return replace(config, compile="off")


def autotuned(config: Config, given: Mapping[str, Any], call: Invocation, runtime: Runtime) -> Config:
    """The settings with what is fastest on this machine (--autotune)."""
    from autotune import fastest
    from compiler import Compiler
    from trainer import Trainer

    def make(candidate: Config) -> Callable[[], object]:
        compiler = Compiler(runtime.device)
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
    from checkpoint import BEST, LAST

    final = trainer.final_loss()
    if final is not None:
        loss, first, last = final
        print(f"Mean training query loss of iterations {first:,} to {last:,}: {loss:.4f}")
    if signal is not None:
        go_on = shlex.join(["python", "main.py", "--load", str(folder / LAST)])
        print(f"Saved at iteration {trainer.iteration:,}. Go on: {go_on}")
        return
    file = folder / (BEST if trainer.progress.best_iteration else LAST)
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(folder)]))
    print("Test it:  ", shlex.join(["python", "main.py", "--eval", "--load", str(file)]))


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
    ways = f"{config.ways}way-" if config.classification else ""
    name = f"{config.dataset}-{ways}{config.shots}shot-{time.strftime('%Y%m%d-%H%M%S')}"
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
    from checkpoint import fitting_parameters, load_checkpoint

    source = None if call.load is None else load_checkpoint(call.load)
    if source is None:
        config = settings.resolve(given)
        what, stem = (
            "the fresh initialisation (no --load)",
            f"fresh-{config.learner}-{config.init}-seed{config.seed}",
        )
        default_out = call.checkpoint_path
    else:
        config = settings.resolve_from(source.config, given, evaluate=True)
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
    from runtime import versions

    distribution, maml = build(config, call, runtime)
    parameters, statistics = maml.initial_parameters(config.seed), maml.initial_statistics()
    if source is not None and call.load is not None:
        parameters = fitting_parameters(call.load, source.parameters, parameters, config.learner)
        statistics = fitting_parameters(call.load, source.statistics, statistics, config.learner)
    normalisations: tuple[str, ...] = (config.query_norm,)
    if maml.has_batch_norm:
        normalisations = ("transductive", "inductive", *["per-step"] * bool(statistics))
    print_settings(config, runtime, f"Evaluating {what} on {config.eval_tasks} test tasks")
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
    loss_name = "cross-entropy" if config.classification else "MSE"
    print(
        report.evaluation_table(
            result,
            loss_name=loss_name,
            trained_steps=config.trained_steps,
            test_steps=config.test_steps,
        )
    )

    ways = f"{config.ways}way-" if config.classification else ""
    size = f"{ways}{config.shots}shot-{config.queries}query-{config.eval_tasks}tasks"
    name = f"{stem}-test-{config.dataset}-{size}"
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
        **report.evaluation_record(result),
    }
    report.write_json(out / f"{name}.json", record)
    fits = None
    if not config.classification:
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
    figure = report.evaluation_figure(
        result,
        loss_name=loss_name,
        trained_steps=config.trained_steps,
        title=f"{config.dataset}, {ways}{config.shots}-shot, {config.eval_tasks} test tasks",
        fits=fits,
    )
    report.write_figure(out / f"{name}.png", figure)
    print(f"Written: {out / name}.json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

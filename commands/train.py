"""Meta-train a run: a new one, one from another's weights (--init-from), or one that is resumed.

    find_start -> build.assemble -> build.train_runs

Sweeps take `find_start` and `make_folder` from here for each of their runs.
"""

from __future__ import annotations

import itertools
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from commands import build
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.names import SPLITS, list_repeated_flags, name_data, task_size
from commands.resolve import resolve, resolve_from, restore_config
from common.errors import UsageError
from common.processes import World
from common.random import HELD_OUT
from evaluation.tables import choose_units, format_decimal
from tasks.splits import check_unseen
from training.checkpoint import load_checkpoint
from training.folders import BEST, LAST, LIST, is_occupied, lock_folder
from training.run import Run, final_loss
from training.trainer import FAILED


def train(call: Call, flags: Mapping[str, Any], command: str, world: World) -> int:
    """Train a run, whose folder is locked until its results are written; return the exit code."""
    with ExitStack() as locks:
        folder = call.load.parent if call.load else call.run_folder
        with world.together():
            if world.first and folder:
                locks.enter_context(lock_folder(folder))
            start = find_start(call.run_folder, call, flags)
            runtime = build.prepare(start.config, call, world)
            tasks = start.config.training.meta_batch_size
            if world.size > tasks:
                raise UsageError(f"{world.size} processes for a meta-batch of {tasks} tasks: take fewer")
        world.check_same(build.collect_facts(start.config, runtime, start.resumed))
        if results := start.finished:
            longer = "" if call.baselines else ": resume with larger --iterations"
            print(f"{start.file} is finished at iteration {results['iteration']:,}{longer}")
            if results["failure"]:
                print(f"main.py: error: {results['failure']}", file=sys.stderr)
            return FAILED if results["failure"] else 0
        folder = folder or world.from_first(lambda: make_folder(call.checkpoint_path, start.config, locks))
        build.preload_tasks([start.config], call, world)
        with world.together():
            parts = build.assemble(start, folder, flags, command, call, world, checked={}, team=world)
        config = parts.start.config
        world.check_same(
            {"data": parts.distribution.record, "--compile, for want of a compiler": config.training.compile}
        )
        doing = f"Resuming at iteration {parts.run.iteration:,}" if start.resumed else "Meta-training"
        build.print_settings(config, runtime, f"{doing} in {folder}")
        build.print_data(parts.distribution, world)
        code = build.train_runs([parts])
        if world.first:
            _print_end(parts.run, code, config, call, world)
        world.wait()  # torchrun ends all processes once one ends with a code, and the first may be busy
        return code


def _print_end(run: Run, code: int, config: Config, call: Call, world: World) -> None:
    """Print how training ended, and what to type next."""
    launcher = ["python"] if world.size == 1 else ["torchrun", f"--nproc-per-node={world.local_size}"]
    flags = list_repeated_flags(config, call)
    resume = shlex.join([*launcher, "main.py", "--load", str(run.folder / LAST), *flags])
    loss = final_loss(run.progress.training)
    if loss is not None and math.isfinite(loss["mean"]):
        iterations = f"iterations {loss['from']:,} to {loss['to']:,}"
        print(f"Mean training query loss of {iterations}: {format_decimal(loss['mean'], 4)}")
    if (best := run.best_validation) is not None:
        measure, scale, digits = choose_units(run.measure_name)
        iteration = run.progress.best_iteration
        print(
            f"Best validation {measure}, of iteration {iteration:,}: {format_decimal(scale * best, digits)}"
        )
    if run.skipped > 0:
        print(f"Iterations skipped for non-finite numbers: {run.skipped:,}")
    if run.failure is not None:
        saved = f"{run.failure}; saved at iteration {run.iteration:,}"
        skip = f"; to skip such iterations: {resume} --on-nan skip" * (run.training.on_nan == "stop")
        print(f"main.py: error: {saved}{skip}", file=sys.stderr)
    elif code:
        print(f"Saved at iteration {run.iteration:,}. Resume: {resume}")
    else:
        print_next(run.folder, run.folder / (BEST if run.progress.best_iteration else LAST), flags)


def print_next(folder: Path, test: Path, flags: Sequence[str]) -> None:
    """Print the commands that show the curves of a folder, and test a checkpoint or many runs."""
    print("Curves:", shlex.join(["tensorboard", "--logdir", str(folder)]))
    command = shlex.join(["python", "main.py", "--eval", "--load", str(test), *flags])
    print("Test:  ", command, flush=True)


def find_start(folder: Path | None, call: Call, flags: Mapping[str, Any]) -> build.Start:
    """Read the settings of a new run, or its checkpoint in the folder, in --load or in --init-from."""
    file = call.load
    if folder:
        check_free(folder, call)
        file = next((path for path in (folder / LAST, folder / BEST) if path.is_file()), None)
    many = folder or call.load
    if many and (many / LIST).is_file():
        raise UsageError(f"{many} has many runs: resume them with --seeds or --sweep and --resume")
    if file is None:
        if call.init_from is None:
            return build.Start(resolve(flags))
        config, weights = resolve(flags), load_checkpoint(call.init_from)
        learned = restore_config(weights.settings, call.init_from)
        _check_learned(learned, config, f"--init-from {call.init_from}")
        return build.Start(config, call.init_from, weights)
    checkpoint = load_checkpoint(file)
    if not checkpoint.exp_avg and checkpoint.parameters:
        raise UsageError(f"{file} has weights alone: start a run from them with --init-from")
    last = file.with_name(LAST)
    if file != last and last.is_file() and load_checkpoint(last).iteration > checkpoint.iteration:
        raise UsageError(f"{last} is further along than {file}: --load that, or start anew with --init-from")
    origin = checkpoint.progress["origin"] or "the initialisation"
    if call.init_from and not origin.startswith(f"{call.init_from}, "):
        raise UsageError(f"the run of {file} started from {origin}: leave --init-from out when resuming")
    config = resolve_from(restore_config(checkpoint.settings, file), flags, evaluate=False)
    return build.Start(config, file, checkpoint, resumed=checkpoint)


def _check_learned(learned: Config, config: Config, source: str) -> None:
    """Raise UsageError, which names the source, where benchmarks held out now have been learned."""
    before, now = learned.tasks.datasets, config.tasks.datasets
    check_unseen(before, now, source, *HELD_OUT)
    for dataset, split in SPLITS.items():
        if dataset in before and dataset in now and learned.get(split) != config.get(split):
            same = f"{CONFIG_FLAGS[split].name} {learned.get(split)}"
            raise UsageError(f"{source} has learned what another split of {dataset} holds out: give {same}")


def make_folder(checkpoint_path: Path, config: Config, locks: ExitStack) -> Path:
    """Make and lock a new run's folder, named after its settings and the time."""
    name = f"{name_data(config.tasks)}-{task_size(config.tasks)}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbers, folder = itertools.count(2), checkpoint_path / name
    while folder.exists():
        folder = checkpoint_path / f"{name}-{next(numbers)}"
    locks.enter_context(lock_folder(folder))
    return folder


def check_free(folder: Path, call: Call) -> None:
    """Raise UsageError if the folder of --run-name is not empty, unless --resume is given."""
    if is_occupied(folder) and not call.resume:
        raise UsageError(f"{folder} is not empty: choose another --run-name, or --resume what is there")

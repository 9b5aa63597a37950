"""Meta-train a run: a new one, one from another's weights (--init-from), or one that is resumed.

    find_start -> build.prepare_run -> build.assemble -> build.train_runs

Sweeps take `find_start` and `make_folder` from here for each of their runs.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from commands.build import (
    Start,
    assemble,
    collect_facts,
    make_writable,
    prepare_run,
    print_difference,
    print_settings,
    read_tasks,
    remove_if_left_empty,
    train_runs,
)
from commands.call import Call
from commands.config import Config
from commands.names import file_name, own_code_flags, task_size
from commands.probe import check_processes
from commands.resolve import config_of, resolve, resolve_from
from common.errors import UsageError
from common.processes import World
from training.checkpoint import Checkpoint, load_checkpoint
from training.folders import BEST, LAST, LIST, is_occupied, lock_folder
from training.run import Run, final_loss


def train(call: Call, given: Mapping[str, Any], world: World) -> int:
    """Train a run, and return the exit code.

    Its folder is locked from before its checkpoint is read until its results are written.
    """
    with ExitStack() as locks:
        return _train(call, given, world, locks)


def _train(call: Call, given: Mapping[str, Any], world: World, locks: ExitStack) -> int:
    with world.together():
        if world.first and (folder := _named_folder(call)):
            locks.enter_context(remove_if_left_empty(folder))
            locks.enter_context(lock_folder(folder))
        start, runtime = prepare_run(find_start(call, given), given, call, world)
        check_processes(start.config, world.size)
    world.check_same(collect_facts(start.config, runtime, start.resumed))
    if start.finished and start.resumed is not None:
        print(f"{start.file} is at iteration {start.resumed.iteration:,}: resume with larger --iterations")
        return 0
    home = start.folder or call.checkpoint_path
    with remove_if_left_empty(home) if world.first else nullcontext():
        with world.together():
            if world.first:
                make_writable(home, "--load" if call.load else "--checkpoint-path")
        shared = read_tasks([start.config], call, world)
        with world.together():
            assembly = assemble(start, call, runtime, shared, team=world)
    folder = start.folder or world.from_first(lambda: make_folder(call.checkpoint_path, start.config, locks))
    run = assembly.open_run(folder)
    doing = f"Resuming at iteration {start.resumed.iteration:,}" if start.resumed else "Meta-training"
    print_settings(start.config, runtime, f"{doing} in {folder}")
    if start.resumed:
        print_difference(start.resumed.computed_by, run.computed_by)
    code = train_runs([assembly], [run])
    _print_end(run, start.config, code, world)
    sys.stdout.flush()
    world.wait()  # torchrun ends all processes once one ends with a code, and the first may be busy
    return code


def _print_end(run: Run, config: Config, code: int, world: World) -> None:
    """Print how training ended, and what to type next."""
    own_code = own_code_flags(config)
    loss = final_loss(run.progress.training)
    if loss is not None:
        iterations = f"iterations {loss['from']:,} to {loss['to']:,}"
        print(f"Mean training query loss of {iterations}: {loss['mean']:.4f}")
    launcher = ["python"] if world.size == 1 else ["torchrun", f"--nproc-per-node={world.local_size}"]
    resume = [*launcher, "main.py", "--load", str(run.folder / LAST), *own_code]
    if run.skipped:
        print(f"Iterations skipped for non-finite numbers: {run.skipped:,}")
    if run.failure is not None:
        if world.first:
            skipping = shlex.join([*resume, "--on-nan", "skip"])
            print(
                f"main.py: error: {run.failure}; saved at iteration {run.iteration:,}; to skip such "
                f"iterations: {skipping}",
                file=sys.stderr,
            )
        return
    if code:
        print(f"Saved at iteration {run.iteration:,}. Resume: {shlex.join(resume)}")
        return
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(run.folder)]))
    file = str(run.folder / (BEST if run.progress.best_iteration else LAST))
    print("Test it:  ", shlex.join(["python", "main.py", "--eval", "--load", file, *own_code]))


# ---- where a run starts --------------------------------------------------------------------------


def find_start(call: Call, given: Mapping[str, Any]) -> Start:
    """Read the settings of a new run, or the checkpoint that it starts from or is resumed from."""
    file, folder = _find_files(call, given)
    if file is None:
        weights = load_checkpoint(call.init_from) if call.init_from else None
        return Start(resolve(given), folder, call.init_from, weights)
    checkpoint = _load_to_resume(file)
    config = resolve_from(config_of(checkpoint.settings, file), given, evaluate=False)
    start = Start(config, folder, file, checkpoint, resumes=True)
    origin = checkpoint.progress["origin"] or ""
    if call.init_from and not start.finished and not origin.startswith(f"{call.init_from}, "):
        raise UsageError(
            f"--init-from {call.init_from} disagrees with the checkpoint {file}, which started from "
            f"{origin or 'the initialisation'}: leave it out when resuming"
        )
    return start


def make_folder(checkpoint_path: Path, config: Config, locks: ExitStack) -> Path:
    """Make and lock a new run's folder, named after its settings and the time."""
    name = f"{file_name(config.tasks.dataset)}-{task_size(config.tasks)}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = checkpoint_path / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            locks.enter_context(lock_folder(folder))
            return folder


def _named_folder(call: Call) -> Path | None:
    """Return the folder of the run that the call names; None if it names none, or none that exists."""
    if call.load is not None:
        return call.load.parent if call.load.is_file() else None
    return call.checkpoint_path / call.run_name if call.run_name else None


def _find_files(call: Call, given: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """Return the checkpoint to resume, if any, and the run's folder (None: a fresh one)."""
    if call.load is not None:
        _check_load(call.load, call, given)
        return call.load, call.load.parent
    if call.run_name is None:
        return None, None
    folder = call.checkpoint_path / call.run_name
    if (folder / LIST).is_file():
        raise UsageError(f"{folder} has many runs: resume them with --seeds or --sweep and --resume")
    saved = [folder / name for name in (LAST, BEST) if (folder / name).is_file()]
    if saved and not call.resume:
        raise UsageError(f"the run {folder} exists: --resume it, or choose another --run-name")
    if saved:
        return saved[0], folder
    if not call.resume and is_occupied(folder):
        raise UsageError(f"{folder} is not empty: choose another --run-name, or --resume to start in it")
    return None, folder


def _check_load(file: Path, call: Call, given: Mapping[str, Any]) -> None:
    """Raise UsageError where --load names no checkpoint whose run can be resumed in its folder."""
    if not file.is_file():
        many = ", but many runs: name the checkpoint of one of them, or resume all with --resume"
        raise UsageError(f"{file}: there is no such checkpoint{many if (file / LIST).is_file() else ''}")
    folder = file.resolve().parent
    if "checkpoint_path" in given and call.checkpoint_path.resolve() not in (folder, folder.parent):
        raise UsageError(
            f"--load resumes in {file.parent}, not in --checkpoint-path {call.checkpoint_path}: leave that "
            "out, or start a new run with --init-from"
        )
    if file.name not in (BEST, LAST):
        raise UsageError(
            f"{file} is not in a run's folder as {LAST} or {BEST}: start a new run from its weights with "
            "--init-from"
        )


def _load_to_resume(file: Path) -> Checkpoint:
    """Return a checkpoint that has all that resuming needs, and no later one in its folder."""
    checkpoint = load_checkpoint(file)
    if not checkpoint.exp_avg and checkpoint.parameters:
        raise UsageError(
            f"{file} has weights alone, without the optimizer's state: start a run from them with --init-from"
        )
    last = file.with_name(LAST)
    if file.name != LAST and last.is_file():
        ahead = load_checkpoint(last).iteration
        if ahead > checkpoint.iteration:
            raise UsageError(
                f"{last} is ahead (iteration {ahead:,}; {file.name}: {checkpoint.iteration:,}): --load that "
                "one, or start a new run with --init-from"
            )
    return checkpoint

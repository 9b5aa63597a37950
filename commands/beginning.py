"""Where training begins: afresh, with the weights of another run, or where a run was left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.call import Call
from commands.config import Config, config_of
from commands.names import file_name, task_size
from commands.resolve import resolve, resolve_from
from common.errors import UsageError
from common.optimizers import Weights
from maml import MAML, RATE, SQUARE
from training.checkpoint import Checkpoint, fitting_parameters, load_checkpoint
from training.folders import BEST, LAST, LIST, has_results, is_occupied, lock_folder


@dataclass(frozen=True)
class Beginning:
    """Where training begins."""

    config: Config
    folder: Path | None  # of the run; None: a fresh one
    start_file: Path | None  # the checkpoint to go on from,
    start: Checkpoint | None  # and what is in it
    weights_file: Path | None  # a checkpoint, that one or another, to take the weights from
    weights: Checkpoint | None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        if self.start is None or self.start_file is None:
            return False
        iteration = self.start.iteration
        return iteration >= self.config.training.iterations and has_results(self.start_file.parent, iteration)

    @property
    def origin(self) -> str | None:
        """Where the weights come from, in words."""
        return f"{self.weights_file}, iteration {self.weights.iteration:,}" if self.weights else None


def beginning(call: Call, given: Mapping[str, Any]) -> Beginning:
    """Reads what there is to begin with, or to go on from."""
    start_file, folder = where_to_train(call, given)
    if start_file is None:
        weights = load_checkpoint(call.init_from) if call.init_from else None
        return Beginning(resolve(given), folder, None, None, call.init_from, weights)
    start, config = read_start(start_file, given)
    at = Beginning(config, folder, start_file, start, start_file, start)
    origin = start.progress["origin"] or ""
    if call.init_from and not at.finished and not origin.startswith(f"{call.init_from}, "):
        raise UsageError(
            f"--init-from {call.init_from} disagrees with the checkpoint {start_file}, "
            f"which began from {origin or 'the initialisation'}: leave it out when going on"
        )
    return at


def saved_parameters(at: Beginning, maml: MAML, fresh: Weights) -> Weights:
    """The meta-parameters to begin with: a checkpoint's, if there is one, in the place of the fresh."""
    if at.weights is None or at.weights_file is None:
        return fresh
    learner, saved = at.config.learner.learner, at.weights.parameters
    if at.start is None:  # another algorithm's, maybe: inner rates are taken where both learn them
        own = (RATE, SQUARE)
        rates = {name: w for name, w in fresh.items() if name.startswith(own)}
        foreign = {name for name in saved if name.startswith(own) and name not in fresh}
        saved = rates | {name: w for name, w in saved.items() if name not in foreign}
    else:
        fitting_parameters(at.weights_file, at.start.statistics, maml.initial_statistics(), learner)
    return fitting_parameters(at.weights_file, saved, fresh, learner)


def folder_named(call: Call) -> Path | None:
    """The folder of the run that the call names, to be locked before it is looked into; None: there is none
    yet, or none at all."""
    if call.load is not None:
        return call.load.parent if call.load.is_file() else None
    return call.checkpoint_path / call.run_name if call.run_name else None


def where_to_train(call: Call, given: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, if any, and the run's folder (None: a fresh one)."""
    if call.load is not None:
        if not call.load.is_file():
            hint = ""
            if (call.load / LIST).is_file():
                hint = ", but many runs: name the checkpoint of one of them, or go on with all by --resume"
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
    if (folder / LIST).is_file():
        raise UsageError(f"{folder} has many runs: go on with them by --seeds or --sweep and --resume")
    there = [folder / name for name in (LAST, BEST) if (folder / name).is_file()]
    if there:
        if call.resume:
            return there[0], folder
        raise UsageError(f"the run {folder} exists: go on with --resume, or choose another --run-name")
    if not call.resume and is_occupied(folder):
        raise UsageError(f"{folder} is not empty: choose another --run-name, or --resume to begin in it")
    return None, folder


def read_start(file: Path, given: Mapping[str, Any]) -> tuple[Checkpoint, Config]:
    """The checkpoint to go on from, and its settings with the flags that may differ."""
    start = load_checkpoint(file)
    if not start.exp_avg and start.parameters:
        raise UsageError(
            f"{file} has weights alone, without the optimizer's state: begin a run from them with --init-from"
        )
    last = file.with_name(LAST)
    if file.name != LAST and last.is_file():
        ahead = load_checkpoint(last).iteration
        if ahead > start.iteration:
            raise UsageError(
                f"{last} is ahead (iteration {ahead:,}; {file.name}: {start.iteration:,}): --load that one, "
                "or begin a new run with --init-from"
            )
    return start, resolve_from(config_of(start.settings, file), given, evaluate=False)


def fresh_folder(checkpoint_path: Path, config: Config, locked: ExitStack) -> Path:
    """A new run's folder, named after its settings and the time, and locked."""
    name = f"{file_name(config.tasks.dataset)}-{task_size(config.tasks)}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = checkpoint_path / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            locked.enter_context(lock_folder(folder))
            return folder

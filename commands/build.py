"""Assemble what commands work with: the machine, the tasks, the algorithm, and runs ready for training.

    Config -> prepare -> Runtime; build -> TaskDistribution, MAML       all commands
    Start -> prepare_run -> assemble -> Assembly -> train_runs          train, sweep, baselines

There is one way to assemble a run. A command decides where it starts (`Start`) and in which folder it
trains; everything between the settings and the `Trainer` is here.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.names import describe, own_code_flags, select_meaningful
from commands.probe import check_memory, check_outputs, check_splits, probe_learner
from commands.resolve import disable_compiling
from common.batch import TaskDistribution, Tree, first_tensor, tree_map
from common.device import Runtime, find_device, set_up
from common.errors import UsageError
from common.optimizers import Weights
from common.own_code import parse_arguments
from common.processes import ALONE, World, join, read_world
from dataset import build_distribution
from learner import LEARNERS, build_learner, load_factory
from learners.functional import fixed_tensors
from learners.losses import LOSSES, build_loss
from maml import MAML, RATE, SQUARE
from training.checkpoint import Checkpoint, check_same_split, fitting_parameters
from training.compiler import Compiler, cpp_compiler
from training.folders import BEST, LAST, find_checkpoint, has_results
from training.run import Run
from training.trainer import Trainer

PREPARING, A_YEAR = 120.0, 60.0 * 24 * 365  # minutes that processes wait for each other's values
SharedTasks = dict[Any, TaskDistribution]  # by `tasks_key`

# ---- machine -------------------------------------------------------------------------------------


def join_job(call: Call, *, many: bool) -> tuple[Call, World]:
    """Find the checkpoints that the call names, and meet the other processes that torchrun has started.

    Args:
        many: each process has runs of its own; they meet at the end, whenever that is.

    Returns:
        The call with the checkpoints' files in place of folders, and the processes of the job.
    """
    names = (BEST, LAST) if call.eval or call.adapt else (LAST, BEST)
    call = replace(
        call,
        load=call.load and find_checkpoint(call.load, *names),
        init_from=call.init_from and find_checkpoint(call.init_from, BEST, LAST),
    )
    world = read_world()
    if world.size > 1 and (call.adapt or call.compare):
        name = "--compare" if call.compare else "--adapt"
        raise UsageError(f"{name} is for one process: start it without torchrun")
    device = find_device(call.device, world)
    if world.size > 1:
        world = join(world, device, call.timeout, A_YEAR if many else max(PREPARING, call.timeout))
    return call, world


def prepare(config: Config, call: Call, world: World = ALONE) -> Runtime:
    """Set up device, precision and threads; raise UsageError if the machine lacks them, or memory."""
    runtime = set_up(
        find_device(call.device, world),
        config.training.precision,
        small_tensors=config.learner.learner == "mlp",
        threads=call.threads,
        world=world,
        deterministic=call.deterministic,
    )
    if runtime.device.type == "cpu":
        check_memory(config, world.size, testing=bool(call.eval or call.adapt or call.compare))
    return runtime


def fit_to_machine(
    config: Config, given: Mapping[str, Any], runtime: Runtime, *, new: bool, silent: bool = False
) -> Config:
    """Return the settings as this machine can run them.

    A machine without a compiler runs uncompiled; a GPU takes all tasks at once. A flag in `given`, and the
    settings of a run that is not `new`, stay.
    """
    silent = silent or not runtime.world.first
    if new and runtime.device.type == "cuda" and "tasks_at_once" not in given:
        config = config.replaced(tasks_at_once=None)
    if not new and given.get("compile") == "on" and config.training.compile == "off" and not silent:
        print("main.py: the run started uncompiled, and stays so", file=sys.stderr)
    if config.training.compile == "off":
        return config
    if runtime.device.type == "mps":
        reason = "--device mps cannot compile"
    elif cpp_compiler() is None:
        reason = "no C++ compiler was found (install g++, or name one in CXX)"
    else:
        return config
    if not silent:
        print(f"main.py: {reason}: the run is not compiled", file=sys.stderr)
    return disable_compiling(config, given) if new else config.replaced(compile="off")


# ---- tasks and algorithm -------------------------------------------------------------------------


def build(
    config: Config,
    call: Call,
    runtime: Runtime,
    shared: SharedTasks | None = None,
    *,
    saved: Checkpoint | None = None,
) -> tuple[TaskDistribution, MAML]:
    """Build tasks and algorithm; the learner has its initial weights.

    Args:
        shared: task distributions that may serve several runs; a new one is added.
        saved: the checkpoint whose weights will be put in: nothing is fetched for them, and the parts of the
            learner that are not learned (`MAML.fixed`) are the checkpoint's.
    """
    load_factory(config.learner.learner)  # before any work with the data
    build_loss(config.learner.loss, config.learner.loss_args)
    shared = {} if shared is None else shared
    key = tasks_key(config)
    if key not in shared:
        shared[key] = _build_tasks(config, call, runtime)
    distribution = shared[key]
    batch = distribution.sample("test" if call.eval_dataset else "train", 0, 0, range(1))
    example = tree_map(lambda part: part[0], batch.support_x)
    outputs = config.tasks.ways if config.tasks.classification else first_tensor(batch.support_y).shape[-1]
    learner = build_module(config, runtime, outputs or 1, example, saved=saved)
    return distribution, build_algorithm(config, runtime, learner, example)


def tasks_key(config: Config) -> Any:
    """Return what decides the tasks: runs that agree in it share one distribution."""
    return config.tasks, config.training.precision


def read_tasks(configs: Iterable[Config], call: Call, world: World) -> SharedTasks:
    """Build the tasks in the first process of each machine, which fetches and decodes what there is.

    The other processes get none: `build` reads what the first has left behind.
    """
    shared: SharedTasks = {}
    with world.together():
        for config in configs if world.local_rank == 0 else ():
            if tasks_key(config) not in shared:
                shared[tasks_key(config)] = _build_tasks(config, call, prepare(config, call, world))
    return shared


def _build_tasks(config: Config, call: Call, runtime: Runtime) -> TaskDistribution:
    return build_distribution(
        config.tasks,
        data_root=call.data_root,
        device=runtime.device,
        dtype=runtime.dtype,
        for_test=call.eval_dataset is not None,
    )


def build_module(
    config: Config, runtime: Runtime, outputs: int, example: Tree, *, saved: Checkpoint | None = None
) -> nn.Module:
    """Return the learner with its initial weights.

    Args:
        outputs: numbers per example.
        example: inputs of one task, `[examples, ...]`.
        saved: the checkpoint whose weights will be put in: pretrained ones are not fetched.
    """
    learner = build_learner(
        config.learner.learner,
        outputs,
        inputs=tree_map(lambda part: tuple(part.shape[1:]), example),
        arguments=parse_arguments(config.learner.learner_args),
        init=config.learner.init,
        context=config.choices.context_size if config.choices.fast_weights == "context" else 0,
        seed=config.training.seed,
        fetch_weights=saved is None,
    )
    if saved and saved.fixed:
        _restore_fixed(learner, saved.fixed, config.learner.learner)
    learner = learner.to(runtime.device, runtime.dtype)
    check_outputs(learner, example, outputs, config)
    return learner


def _restore_fixed(learner: nn.Module, fixed: Weights, name: str) -> None:
    """Put a checkpoint's frozen parameters and buffers into the learner."""
    state = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    for key in sorted(fixed.keys() | fixed_tensors(learner).keys()):
        if key not in fixed or key not in state or state[key].shape != fixed[key].shape:
            raise UsageError(f"the checkpoint does not fit the learner {name}: {key} differs")
        state[key].data.copy_(fixed[key])


def build_algorithm(config: Config, runtime: Runtime, learner: nn.Module, example: Tree) -> MAML:
    """Return the algorithm for a learner; raise UsageError where its choices do not fit the learner.

    Args:
        example: inputs of one task, `[examples, ...]`.
    """
    choices = config.choices
    try:
        return MAML(
            learner,
            build_loss(config.learner.loss, config.learner.loss_args),
            choices,
            convolution=config.training.convolution,
            compute_dtype=runtime.compute_dtype,
            example=None if config.learner.learner in LEARNERS else example,
            tasks_at_once=config.training.tasks_at_once,
            vectorise=config.training.vectorise,
        )
    except ValueError as error:
        head = "" if choices.head is None else f" --head {choices.head}"
        flags = f"--fast-weights {choices.fast_weights}{head} --head-init {choices.head_init}"
        raise UsageError(f"{flags} with --learner {config.learner.learner}: {error}") from error


# ---- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a run starts: its settings and folder and, unless it starts afresh, a checkpoint."""

    config: Config
    folder: Path | None = None  # None: the command makes a fresh one
    file: Path | None = None
    checkpoint: Checkpoint | None = None  # the content of `file`
    resumes: bool = False  # the run that the checkpoint is of; else a new run takes its weights

    @property
    def resumed(self) -> Checkpoint | None:
        return self.checkpoint if self.resumes else None

    @property
    def finished(self) -> bool:
        """Return whether nothing is left to train: the last iteration is done, and its results are written."""
        if self.resumed is None or self.file is None:
            return False
        iteration = self.resumed.iteration
        return iteration >= self.config.training.iterations and has_results(self.file.parent, iteration)

    @property
    def origin(self) -> str | None:
        """Return in words which checkpoint the weights come from."""
        return f"{self.file}, iteration {self.checkpoint.iteration:,}" if self.checkpoint else None


@dataclass(frozen=True)
class Assembly:
    """One run's parts: settings, machine, tasks, algorithm, and the weights that it starts with."""

    start: Start
    runtime: Runtime
    distribution: TaskDistribution
    maml: MAML
    parameters: Weights
    team: World  # the processes that share the run's tasks

    @property
    def config(self) -> Config:
        return self.start.config

    def open_run(self, folder: Path, *, runs_at_once: int = 1) -> Run:
        """Return the run, which will write to its folder; all processes of the team start alike."""
        config, start = self.config, self.start
        weights = dict(self.parameters)
        for name in sorted(weights):  # initial weights may differ in their last bit between machines
            weights[name] = self.team.broadcast(weights[name].contiguous())
        flags = {n: flag for n, flag in CONFIG_FLAGS.items() if flag.group not in ("machine", "logging")}
        return Run(
            folder=folder,
            parameters=weights,
            training=config.training,
            choices=config.choices,
            evaluation=config.evaluation,
            settings=config.values(),
            meaningful=list(select_meaningful(config)),
            flags=flags,
            classification=config.tasks.classification,
            start=start.resumed,
            origin=start.origin,
            computed_by=self.runtime.computed_by(
                processes=self.team.size, runs=runs_at_once, tasks=config.training.tasks_at_once
            ),
            writes=self.team.first,
        )


def prepare_run(
    start: Start, given: Mapping[str, Any], call: Call, world: World, *, silent: bool = False
) -> tuple[Start, Runtime]:
    """Set up the machine for a run, and fit the run's settings to it."""
    runtime = prepare(start.config, call, world)
    config = fit_to_machine(start.config, given, runtime, new=not start.resumes, silent=silent)
    return replace(start, config=config), runtime


def assemble(
    start: Start,
    call: Call,
    runtime: Runtime,
    shared: SharedTasks,
    *,
    team: World = ALONE,
    probed: bool = False,
) -> Assembly:
    """Build everything that a run is trained with; no process waits for another in here.

    Args:
        shared: task distributions by `tasks_key`; a new one is added.
        team: the processes that share the run's tasks.
        probed: a run of the same structure has been tried out: this one need not be.

    Raises:
        UsageError: data, learner, loss or checkpoint do not fit each other.
    """
    config = start.config
    distribution, maml = build(config, call, runtime, shared, saved=start.checkpoint)
    if start.file is not None and start.resumed is not None:
        check_same_split(start.file, start.resumed.splits, distribution.split_names)
    parameters = _starting_weights(start, maml)
    if not probed:
        check_splits(distribution, config)
        if config.learner.learner not in LEARNERS or config.learner.loss not in LOSSES:
            probe_learner(maml, parameters, distribution, config)
    return Assembly(start, runtime, distribution, maml, parameters, team)


def _starting_weights(start: Start, maml: MAML) -> Weights:
    """Return fresh meta-parameters, or the checkpoint's.

    A new run may have another algorithm than its checkpoint: it takes inner rates and carried moments where
    both have them.
    """
    fresh = maml.initial_parameters(start.config.training.seed)
    if start.checkpoint is None or start.file is None:
        return fresh
    learner, saved = start.config.learner.learner, start.checkpoint.parameters
    if start.resumes:
        statistics = start.checkpoint.statistics
        fitting_parameters(start.file, statistics, maml.initial_statistics(), learner)
    else:
        inner = (RATE, SQUARE)
        rates = {name: w for name, w in fresh.items() if name.startswith(inner)}
        saved = rates | {n: w for n, w in saved.items() if n in fresh or not n.startswith(inner)}
    return fitting_parameters(start.file, saved, fresh, learner)


def train_runs(
    assemblies: Sequence[Assembly], runs: Sequence[Run], *, resume: str | None = None, show: bool = True
) -> int:
    """Train a run, or several at once, to their end; return the exit code of `Trainer.train`.

    Args:
        assemblies: of runs that differ in `trainer.AT_ONCE` alone; the first one's parts serve all.
        runs: their open runs, in the same order.
        resume: what a user types to resume; by default --load of the run's checkpoint.
        show: whether to show progress.
    """
    first = assemblies[0]
    load = ["--load", str(runs[0].folder / LAST), *own_code_flags(first.config)]
    trainer = Trainer(
        list(runs),
        first.maml,
        first.distribution.resized(first.config.training_shots),
        first.distribution,
        Compiler(first.runtime.device),
        first.team,
        resume=resume or shlex.join(load),
        show=show,
    )
    return trainer.train()


# ---- several processes, folders, the terminal ----------------------------------------------------


def collect_facts(config: Config, runtime: Runtime, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what all processes of a job must agree in, by names for people."""
    return {
        "torch": str(torch.__version__),
        "--device": runtime.device.type,
        "checkpoint": checkpoint.iteration if checkpoint else None,
        **{flag.name: config.get(name) for name, flag in CONFIG_FLAGS.items()},
    }


@contextmanager
def remove_if_left_empty(folder: Path) -> Iterator[None]:
    """After an error, remove the folder and those of its parents that are new and still empty."""
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield
    except BaseException:
        for part in new:
            with suppress(OSError):  # not empty, or never made
                part.rmdir()
        raise


def make_writable(folder: Path, flag: str) -> Path:
    """Return the folder, made if need be; raise UsageError that names the flag if nothing can be written."""
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


def print_settings(config: Config, runtime: Runtime, first_line: str, *others: Config) -> None:
    """Print a line, the settings of one run or of several, and the device."""
    print(f"{first_line}\n{describe(config, *others)}\n  device      {runtime.describe()}", flush=True)


def print_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Print where a resumed run is computed in another way: its last bits depend on that."""
    changed = [
        f"{name} {before[name]}, now {now.get(name)}" for name in before if before[name] != now.get(name)
    ]
    if changed:
        print(f"Resumed to rounding, not to the bit: the run had {'; '.join(changed)}", flush=True)

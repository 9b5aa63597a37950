"""Assemble what commands work with: the machine, the tasks, the algorithm, and runs ready for training.

    Config -> prepare -> Runtime; build -> TaskDistribution, MAML       all commands
    Start -> assemble -> Assembly -> train_runs                         train, sweep, baselines

A command decides where a run starts (`Start`) and in which folder it trains; everything between the
settings and the `Trainer` is here.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.names import describe, name_method, select_meaningful
from commands.outputs import (
    count_outputs,
    describe_reading,
    find_ignored_label,
    find_metric,
    try_outputs,
    with_metric,
)
from commands.probe import Probe, fit_to_sizes, is_built_in
from commands.resolve import resolve
from commands.settings import render_settings
from common.batch import TaskDistribution, Tree, index_tree, tree_map
from common.device import Runtime, find_device, set_up
from common.errors import UsageError
from common.files import is_writable
from common.optimizers import Weights
from common.options import list_names
from common.own_code import parse_arguments
from common.processes import ALONE, World, join, read_world
from common.random import HELD_OUT
from common.sizes import find_largest
from dataset import build_distribution
from learner import build_learner, load_factory
from learners.copies import UnfitError
from learners.functional import collect_fixed_tensors
from learners.losses import SCALED, build_loss, loss_name
from learners.modules import convert_type
from learners.options import LEARNERS
from learners.reading import Reading, choose_reading
from maml import MAML, OWN
from tasks.scales import Scales
from training.checkpoint import Checkpoint, check_same_data, find_learned_names, fitting_parameters
from training.compiler import Compiler, explain_uncompiled
from training.folders import BEST, LAST, SETTINGS, find_checkpoint, read_results
from training.one_pass import OnePass
from training.run import Run
from training.trainer import Trainer

PREPARING, A_YEAR = 120.0, 60.0 * 24 * 365  # minutes that processes wait for each other's values
DECISIVE = ("engine", "precision", "vectorise", "convolution")  # for the check of the gradient, with groups
LOGGED: dict[str, float | str] = {  # columns of TensorBoard's table of settings, with an empty value
    name: 0.0 if flag.kind in (int, float, bool) else ""
    for name, flag in CONFIG_FLAGS.items()
    if flag.group not in ("machine", "logging")
}
LOGGED["method"] = ""
distribution_of = cache(build_distribution)  # one for all runs with the same tasks; `join_job` forgets them


@cache
def print_once(text: str) -> None:
    print(text, file=sys.stderr)


# ---- machine -------------------------------------------------------------------------------------


def join_job(call: Call) -> tuple[Call, World]:
    """Join the job's processes; return the call with folders resolved to checkpoints' files, and the job."""
    distribution_of.cache_clear()
    names = (BEST, LAST) if call.eval or call.adapt or call.save_weights else (LAST, BEST)
    call = replace(
        call,
        load=call.load and find_checkpoint(call.load, *names),
        init_from=call.init_from and find_checkpoint(call.init_from, BEST, LAST),
    )
    world = read_world()
    if world.size > 1 and (call.adapt or call.compare):
        raise UsageError("--adapt and --compare are for one process: start them without torchrun")
    device = find_device(call.device, world)
    if world.size > 1:
        many = call.seeds or call.sweep  # each process waits for the others only at the end
        world = join(world, device, call.timeout, A_YEAR if many else max(PREPARING, call.timeout))
    return call, world


def prepare(config: Config, call: Call, world: World = ALONE) -> Runtime:
    """Set up device, precision and threads; raise UsageError if the machine lacks them."""
    return set_up(
        find_device(call.device, world),
        config.training.precision,
        small_tensors=config.learner.learner in ("mlp", "sines"),
        threads=call.threads,
        world=world,
        deterministic=call.deterministic,
    )


# ---- tasks and algorithm -------------------------------------------------------------------------


def build(
    config: Config,
    call: Call,
    runtime: Runtime,
    *,
    saved: Checkpoint | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> tuple[TaskDistribution, MAML]:
    """Build tasks and algorithm; the learner has its initial weights (`saved`: see `build_algorithm`).

    A table is standardised by `scales`, a checkpoint's; None: by its own training rows.
    """
    load_factory(config.learner.learner)  # before any work with the data
    build_loss(config.learner.loss, config.learner.loss_args)
    find_metric(config)
    distribution = build_tasks(config, call, runtime)
    if scales is not None:
        distribution = distribution.with_scales(scales)
    split = "test" if call.eval_dataset else "train"
    batch = distribution.sample(split, 0, 0, range(1))
    x, y = index_tree((batch.support_x, batch.support_y), 0)
    outputs = count_outputs(config, y)
    _, maml = build_algorithm(config, runtime, outputs, x, saved=saved, targets=y, scales=distribution.scales)
    say = print_once if runtime.world.first else lambda _: None
    if maml.reading and (words := describe_reading(maml.reading, y, config)):
        say(f"main.py: the learner's outputs: {words}")
    splits = ("test",) if call.eval else HELD_OUT
    names = find_learned_names(saved, distribution.record, *splits) if saved else []
    if names and distribution.kind == "images":  # a table's tasks are often numbered, which says nothing
        some = list_names(names)
        known = f"the checkpoint learned classes with names of {' and '.join(splits)} classes ({some})"
        say(f"main.py: {known}: if they are the same, the results are not of new classes")
    return distribution, fit_to_sizes(maml, distribution, split, config, say)


def build_tasks(config: Config, call: Call, runtime: Runtime) -> TaskDistribution:
    """Return the tasks, which are read once per command."""
    return distribution_of(
        config.tasks,
        data_root=call.data_root,
        device=runtime.device,
        dtype=runtime.dtype,
        for_test=call.eval_dataset is not None,
        scale_targets=config.learner.loss in SCALED,
        ignored=find_ignored_label(config),
    )


def name_measure(config: Config, scales: Scales) -> str:
    """Return what tables and figures call the loss, with its unit where that is not the data's."""
    name = loss_name(config.learner.loss)
    return f"{name} of standardised targets" if "target" in scales else name


def preload_tasks(configs: Iterable[Config], call: Call, world: World) -> None:
    """Build the tasks in the first process of each machine, which fetches and decodes for the others."""
    with world.together():
        for config in configs if world.local_rank == 0 else ():
            build_tasks(config, call, prepare(config, call, world))


def build_module(
    config: Config, runtime: Runtime, outputs: int, example: Tree, seed: int, *, fetch_weights: bool
) -> nn.Module:
    """Return the learner with initial weights of a seed, for inputs of the example's shape."""
    choices = config.choices
    learner = build_learner(
        config.learner.learner,
        outputs,
        inputs=tree_map(lambda part: tuple(part.shape[1:]), example),
        arguments=parse_arguments(config.learner.learner_args),
        init=config.learner.init,
        context=choices.context_size if choices.fast_weights == "context" else 0,
        seed=seed,
        fetch_weights=fetch_weights,
        example=example,
    )
    return convert_type(learner.to(runtime.device), runtime.dtype)


def build_algorithm(
    config: Config,
    runtime: Runtime,
    outputs: int,
    example: Tree,
    *,
    saved: Checkpoint | None = None,
    targets: Tree | None = None,
    scales: Scales | None = None,
) -> tuple[nn.Module, MAML]:
    """Return the learner, with its initial weights, and the algorithm; UsageError where the data do not fit.

    Args:
        outputs: numbers per example.
        example: inputs of one task, `[examples, ...]`.
        saved: the checkpoint whose weights will be put in: pretrained ones are not fetched, and the parts of
            the learner that are not learned are the checkpoint's.
        targets: of the same task, `[examples, ...]`, by which outputs are read.
        scales: by which a table was standardised.
    """
    name, choices = config.learner.learner, config.choices
    learner = build_module(
        config, runtime, outputs, example, config.training.seed, fetch_weights=saved is None
    )
    if saved and saved.fixed:
        fixed = fitting_parameters("the checkpoint", saved.fixed, collect_fixed_tensors(learner), name)
        learner.load_state_dict(fixed, strict=False)
    reading = with_metric(try_outputs(learner, example, targets, outputs, config), config, scales or {})
    try:
        return learner, (OnePass if choices.passes_once else MAML)(
            learner,
            build_loss(config.learner.loss, config.learner.loss_args),
            choices,
            convolution=config.training.convolution,
            compute_dtype=runtime.compute_dtype,
            example=None if name in LEARNERS else example,
            tasks_at_once=config.training.tasks_at_once,
            vectorise=config.training.vectorise,
            reading=reading,
        )
    except UnfitError as error:
        raise UsageError(f"--learner {name}: {error}") from error
    except ValueError as error:
        flags = f"--fast-weights {choices.fast_weights} --head-init {choices.head_init}"
        raise UsageError(f"{flags} with --learner {name}: {error}") from error


def fit_weights(file: Path, source: Checkpoint, maml: MAML, config: Config) -> tuple[Weights, Weights]:
    """Return a checkpoint's meta-parameters and running statistics; raise UsageError if they do not fit."""
    name, fresh, saved = config.learner.learner, maml.initial_parameters(), source.parameters
    if isinstance(ways := source.settings.get("ways"), str):  # fewer than the most have the first scores
        of_head = [n for n, w in saved.items() if n in fresh and w.dim() and len(w) == find_largest(ways)]
        saved = saved | {n: saved[n][: len(fresh[n])] for n in of_head}
    parameters = fitting_parameters(file, saved, fresh, name)
    return parameters, fitting_parameters(file, source.statistics, maml.initial_statistics(), name)


# ---- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The settings of a run and, unless it starts afresh, the checkpoint that it starts from."""

    config: Config
    file: Path | None = None
    checkpoint: Checkpoint | None = None  # the content of `file`
    resumed: Checkpoint | None = None  # `checkpoint` if the run resumes; None if a new one takes its weights

    @property
    def finished(self) -> dict[str, Any]:
        """Return the results of a run whose last iteration is done, else {}."""
        if not (self.file and self.resumed and self.resumed.iteration >= self.config.training.iterations):
            return {}
        results = read_results(self.file.parent)
        return results if results.get("iteration") == self.resumed.iteration else {}


@dataclass(frozen=True)
class Assembly:
    """The parts that training a run needs."""

    start: Start  # with the settings as this machine can run them
    runtime: Runtime
    distribution: TaskDistribution
    maml: MAML
    run: Run
    team: World  # the processes that share the run's tasks


def assemble(
    start: Start,
    folder: Path,
    flags: Mapping[str, Any],
    command: str,
    call: Call,
    world: World,
    *,
    checked: dict[Hashable, str],
    team: World = ALONE,
) -> Assembly:
    """Build everything needed to train a run; processes do not wait for each other here.

    `checked` has the engines of runs whose gradient has been checked; this run's is looked up or added.
    Raises UsageError where data, learner, loss or checkpoint do not fit each other.
    """
    runtime = prepare(start.config, call, world)
    config, source = _fit_to_machine(start, flags, runtime), start.checkpoint
    scales = start.resumed.scales if start.resumed else None
    distribution, maml = build(config, call, runtime, saved=source, scales=scales)
    if start.file is not None and start.resumed is not None:
        check_same_data(start.file, start.resumed, distribution.record)
    if maml.call.unpads:
        config = config.replace_settings(vectorise=False, compile="off")
    parameters, reading = _choose_weights(start, maml), choose_reading(maml.reading, distribution.most_ways)
    free = not start.resumed and flags.get("engine", "auto") == "auto"
    probe = Probe(maml, parameters, distribution, config)
    engine = _try_out(probe, reading, call, checked, free=free, prints=runtime.world.first)
    start = replace(start, config=(config := config.replace_settings(engine=engine)))
    earlier, is_loss = folder / SETTINGS if start.resumed else None, reading.measure == "loss"
    run = Run(
        folder=folder,
        settings_file=render_settings(command, flags, config, earlier),
        parameters=parameters,
        training=config.training,
        choices=config.choices,
        evaluation=config.evaluation,
        settings=config.values(),
        described_by={"method": name_method(config.choices)} | select_meaningful(config),
        columns=LOGGED,
        reading=reading,
        measure_name=name_measure(config, distribution.scales) if is_loss else reading.measure,
        several=bool(distribution.parts),
        start=start.resumed,
        origin=f"{start.file}, iteration {source.iteration:,}" if source else None,
        writes=team.first,
        failure=start.finished.get("failure"),
    )
    return Assembly(start, runtime, distribution, maml, run, team)


def _try_out(
    probe: Probe, reading: Reading, call: Call, checked: dict[Hashable, str], *, free: bool, prints: bool
) -> str:
    """Try the user's code and the metric; return the engine, which may be another one if it is `free`."""
    config = probe.config
    if not is_built_in(config):
        try:
            probe.check_learner()
        except UsageError as error:
            if not free or config.training.engine == "unrolled":
                raise
            probe = replace(probe, config=(config := config.replace_settings(engine="unrolled")))
            probe.check_learner()
            if prints:
                print_once(f"main.py: {error}; --engine unrolled is taken")
        for line in probe.describe_passes() if prints else []:
            print_once(line)
    probe.try_metric(reading)
    if call.check_gradients is False or (call.check_gradients is None and is_built_in(config)):
        return config.training.engine
    # runs that differ in their seed alone share a check
    key = (free, config.tasks, config.learner, config.choices, *map(config.get, DECISIVE))
    if key not in checked:
        checked[key], words = probe.choose_engine(free=free)
        if prints:
            print(f"Checked: {words}", file=sys.stderr)
    return checked[key]


def _fit_to_machine(start: Start, flags: Mapping[str, Any], runtime: Runtime) -> Config:
    """Fit settings to this machine: uncompiled if it has no compiler, on a GPU all tasks at once."""
    config = start.config
    if config.training.compile == "on" and (reason := explain_uncompiled(runtime.device)):
        if runtime.world.first:
            print_once(reason)
        if start.resumed:
            config = config.replace_settings(compile="off", convolution="grouped")
        else:
            config = resolve({**flags, "compile": "off"})
    if not start.resumed and runtime.device.type == "cuda" and "tasks_at_once" not in flags:
        config = config.replace_settings(tasks_at_once=None)
    return config


def _choose_weights(start: Start, maml: MAML) -> Weights:
    """Return fresh meta-parameters, or the checkpoint's; UsageError if there is nothing to learn."""
    fresh, name = maml.initial_parameters(start.config.training.seed), start.config.learner.learner
    if not fresh:
        raise UsageError(f"--learner {name} has a computed head, and nothing else to learn")
    if start.checkpoint is None or start.file is None:
        return fresh
    if start.resumed:
        return fit_weights(start.file, start.resumed, maml, start.config)[0]
    # perhaps with another algorithm: take what is that algorithm's own where both have it
    algorithm_weights = {name: w for name, w in fresh.items() if name.startswith(OWN)}
    saved = start.checkpoint.parameters
    saved = algorithm_weights | {n: w for n, w in saved.items() if n in fresh or not n.startswith(OWN)}
    return fitting_parameters(start.file, saved, fresh, name)


def train_runs(assemblies: Sequence[Assembly]) -> int:
    """Train a run, or several that differ in `trainer.AT_ONCE` alone; return the code of `Trainer.train`.

    The first assembly's parts serve all runs.
    """
    first, runs = assemblies[0], [parts.run for parts in assemblies]
    for run in runs:
        for name in sorted(run.parameters):  # they may differ in their last bit between machines
            run.parameters[name] = first.team.broadcast(run.parameters[name].contiguous())
        chunk = run.training.tasks_at_once
        run.computed_by = first.runtime.computed_by(processes=first.team.size, runs=len(runs), tasks=chunk)
    before, now = runs[0].start.computed_by if runs[0].start else {}, runs[0].computed_by
    changed = [f"{name} {old}, now {now.get(name)}" for name, old in before.items() if old != now.get(name)]
    if changed:
        print(f"Resumed to rounding, not to the bit: the run had {'; '.join(changed)}", flush=True)
    trainer = Trainer(
        runs,
        first.maml,
        first.distribution.resized(first.start.config.training_shots),
        first.distribution,
        Compiler(first.runtime.device),
        first.team,
        show=first.runtime.world.first,
    )
    return trainer.train()


# ---- several processes, folders, the terminal ----------------------------------------------------


def collect_facts(config: Config, runtime: Runtime, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what all processes of a job must agree in, by name."""
    facts = {"torch": str(torch.__version__), "device": runtime.device.type}
    return {**facts, "checkpoint": checkpoint.iteration if checkpoint else None, **config.values()}


def make_writable(folder: Path) -> Path:
    """Create the folder of --out if it is missing; raise UsageError or OSError if it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_writable(folder):
        raise UsageError(f"{folder}: cannot write there; name another folder with --out")
    return folder


def print_data(distribution: TaskDistribution, world: World) -> None:
    """Print what was read, split, left out or changed of the user's data."""
    if world.first and distribution.summary:
        print("  data     " + "\n           ".join(distribution.summary), flush=True)


def print_settings(config: Config, runtime: Runtime, first_line: str, *others: Config) -> None:
    """Print a line, the settings of one run or of several, and the device."""
    print(f"{first_line}\n{describe(config, *others)}\n  device   {runtime.describe()}", flush=True)

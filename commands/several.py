"""Many runs as one: those that differ in numbers alone are trained together, by one more `vmap`.

Each has its own random stream, curves, checkpoints and results, which are those of the run alone. Runs that
differ in anything else follow each other. Several processes share the runs out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commands import config as settings
from commands.beginning import Beginning, beginning, fresh_folder, saved_parameters
from commands.build import (
    build,
    check_splits,
    data_of,
    fitted,
    make_run,
    no_empty_folder_left,
    prepare,
    print_difference,
    read_first,
    tried,
    writable,
)
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config, config_of
from commands.members import Member, compiles
from commands.resolve import resolve, what_is_learned
from common.batch import TaskDistribution
from common.device import Runtime
from common.errors import UsageError
from common.processes import World
from evaluation import seeds as spread
from evaluation import tables as report
from evaluation.seeds import Outcome
from evaluation.style import write_figure
from learner import LEARNERS
from learners.losses import LOSSES, loss_name
from maml import MAML
from training.checkpoint import check_same_split, load_checkpoint
from training.compiler import Compiler
from training.folders import LAST, LIST, has_results, is_occupied, list_runs, lock_folder
from training.run import Run, final_loss
from training.trainer import AT_ONCE, FAILED, Trainer

SUMMARY = "summary"
MOST_NAMES = 4  # of runs, in the terminal


# ---- which can be trained together ---------------------------------------------------------------


@dataclass
class Ready:
    """A run that has all it needs."""

    member: Member
    config: Config
    run: Run
    maml: MAML
    distribution: TaskDistribution
    runtime: Runtime

    def fits(self, other: Ready) -> bool:
        """Whether the two can be trained at once: they differ in numbers alone."""
        return (
            self.run.iteration == other.run.iteration
            and _structure(self.config) == _structure(other.config)
            and self.config.training.vectorise
            and _same(self.maml.call.fixed, other.maml.call.fixed)
        )


def _structure(config: Config) -> Config:
    """The settings without those in which runs that are trained at once may differ."""
    free: dict[str, Any] = {}
    for name in AT_ONCE:
        value = config.get(name)
        free[name] = None if value is None else type(value)(1)
    if config.choices.inner_rates != "fixed":  # where they begin is in the weights
        free["inner_lr_max"] = None
    return config.replaced(**free)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def groups_of(runs: Sequence[Ready], at_most: int | None) -> list[list[Ready]]:
    """The runs in groups that can be trained at once, each of `at_most` so many.

    None: as many as there are, but one after another where they are compiled alone and cannot be together,
    which is faster.
    """
    groups: list[list[Ready]] = []
    for each in runs:
        config = each.config
        most = at_most or (1 if config.training.compile == "on" and not compiles(config) else len(runs))
        fitting = (g for g in groups if len(g) < most and g[0].fits(each))
        group = next(fitting, None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return groups


# ---- training ------------------------------------------------------------------------------------


def train_many(call: Call, members: Sequence[Member], world: World, locked: ExitStack) -> tuple[Path, int]:
    """Trains, or goes on with, all of these runs; their folder, and the exit code: 128 + signal where one
    ended it early, `FAILED` where some runs could not go on to their end.

    The members' checkpoints are where those of runs alone would be, each in a folder of its own. `locked`
    keeps the folder of all for this job.
    """
    with world.together():
        if world.size > len(members):
            raise UsageError(
                f"{world.size} processes for {len(members)} runs: take fewer (torchrun --nproc-per-node)"
            )
        named = call.checkpoint_path / call.run_name if call.run_name else None
        if named and world.first:
            if not call.resume and is_occupied(named):  # before the locks of the runs lie there
                raise UsageError(
                    f"{named} is not empty: choose another --run-name, or --resume to go on there"
                )
            locked.enter_context(no_empty_folder_left(named))
            locked.enter_context(lock_folder(named, [member.name for member in members]))
        if named and (named / LAST).exists():
            raise UsageError(f"{named} is a run, not a folder of many: choose another --run-name")
        if named and (named / LIST).exists():
            _check_settings(named, members)
        own = [members[number] for number in world.share(len(members))]
        begun = [beginning(_of_member(call, named, member), member.given) for member in own]
    world.check_same({"torch": torch.__version__, "list of runs": [(m.name, m.config) for m in members]})
    home = named or call.checkpoint_path
    with no_empty_folder_left(home) if world.first else nullcontext():
        with world.together():
            if world.first:
                writable(home, "--checkpoint-path")
        distributions: dict[Any, TaskDistribution | None] = {}
        with world.together():
            for member in members:
                data = data_of(member.config)
                if data not in distributions:
                    distributions[data] = read_first(member.config, call, prepare(member.config, call, world))
        with world.together():
            ready = _ready(call, own, begun, world, distributions, writes_to=home)
    folder = named or world.from_first(lambda: fresh_folder(call.checkpoint_path, members[0].config, locked))
    for each in ready:
        each.run.folder = folder / each.member.name
    world.from_first(lambda: _write_list(folder, members))
    groups = groups_of([each for each in ready if not _finished(each.run)], call.runs_at_once)
    if world.first:
        sizes = ", ".join(str(len(group)) for group in groups) or "none, all are finished"
        of_all = f", {len(own)} of them in this process" if world.size > 1 else ""
        print(f"{len(members)} runs{of_all} in {folder}; trained at once: {sizes}")
        print(f"  device      {ready[0].runtime.describe()}")
    for group in groups:
        code = _train_group(group, call, world)
        if code > 128:
            return folder, code
    outcomes = [one for part in world.gather([outcome_of(each) for each in ready]) for one in part]
    if world.first:
        _write_summary(folder, outcomes)
    failed = [one.failure for one in outcomes if one.failure is not None]
    if failed and world.first:
        many = f"{len(failed)} of {len(outcomes)} runs stopped before their end, "
        print(f"main.py: error: {many if len(failed) > 1 else ''}{failed[0]}", file=sys.stderr)
    return folder, FAILED if failed else 0


def _check_settings(folder: Path, members: Sequence[Member]) -> None:
    """Raises UsageError where the folder has other seeds of a setting, with settings that are not these:
    their mean would be one of different things."""
    wanted = {member.setting: member for member in members}
    names = {member.name for member in members}
    for run in list_runs(folder):
        file = folder / run.name / LAST
        if run.name in names or run.setting not in wanted or not file.is_file():
            continue
        here = wanted[run.setting].config
        there = config_of(load_checkpoint(file).settings, file)
        learned = [what_is_learned(config.replaced(seed=0)) for config in (here, there)]
        for name, value in learned[0].items():
            if value != learned[1][name]:
                raise UsageError(
                    f"{folder} has the run {run.name} with another {CONFIG_FLAGS[name].names[0]} "
                    f"({learned[1][name]}): choose another --run-name"
                )


def _write_list(folder: Path, members: Sequence[Member]) -> None:
    """Says which runs the folder has: these, and those that it had before."""
    listed = {m.name: {"name": m.name, "setting": m.setting, "seed": m.seed} for m in members}
    before = {run.name: vars(run) for run in list_runs(folder)} if (folder / LIST).exists() else {}
    report.write_json(folder / LIST, {"runs": list((before | listed).values())})


def _of_member(call: Call, folder: Path | None, member: Member) -> Call:
    """The call that would train this run alone."""
    if folder is None:
        return call
    return replace(call, checkpoint_path=folder, run_name=member.name)


def _finished(run: Run) -> bool:
    return run.iteration >= run.training.iterations and has_results(run.folder, run.iteration)


def _ready(
    call: Call,
    members: Sequence[Member],
    begun: Sequence[Beginning],
    world: World,
    distributions: dict[Any, TaskDistribution | None],
    *,
    writes_to: Path,
) -> list[Ready]:
    """The runs, built and checked; those with the same data share them."""
    tested: set[Config] = set()
    found: list[Ready] = []
    for member, at in zip(members, begun, strict=True):
        runtime = prepare(at.config, call, world)
        config = fitted(at.config, member.given, runtime, new=at.start is None, silent=bool(found))
        distribution, maml = build(
            config, call, runtime,
            saved=at.weights, distribution=distributions.get(data_of(config)),
        )  # fmt: skip
        distributions[data_of(config)] = distribution
        if at.start is not None and at.start_file is not None:
            check_same_split(at.start_file, at.start.splits, distribution.split_names)
        parameters = saved_parameters(at, maml, maml.initial_parameters(config.training.seed))
        if _structure(config) not in tested:
            tested.add(_structure(config))
            check_splits(distribution, config)
            if config.learner.learner not in LEARNERS or config.learner.loss not in LOSSES:
                tried(maml, parameters, distribution, config)
        folder = writes_to / member.name
        run = make_run(config, folder, parameters, start=at.start, origin=at.origin)
        found.append(Ready(member, config, run, maml, distribution, runtime))
    return found


def _train_group(group: Sequence[Ready], call: Call, world: World) -> int:
    """Trains runs at once; the exit code."""
    first, shown = group[0], world.first
    config = first.config
    runtime = prepare(config, call, world)  # threads and precision are the process's: other runs had others
    for each in group:
        chunk = each.config.training.tasks_at_once
        each.run.computed_by = runtime.computed_by(processes=1, runs=len(group), tasks=chunk)
    alone = len(group) == 1
    if not alone and config.training.compile == "on" and not compiles(config):
        for each in group:
            each.config = _uncompiled(each)
            each.run = make_run(
                each.config,
                each.run.folder,
                each.run.parameters,
                start=each.run.start,
                origin=each.run.origin,
                computed_by=each.run.computed_by,
            )
        config = first.config
    maml = first.maml
    if not alone:
        maml = maml.with_options(
            convolution=config.training.convolution,
            tasks_at_once=config.training.tasks_at_once,
        )
    if shown:
        names = [each.member.name for each in group]
        listed = ", ".join(names) if len(names) <= MOST_NAMES else f"{names[0]} ... {names[-1]}"
        print(f"Training {listed}", flush=True)
        print(settings.describe(*(each.config for each in group)), flush=True)
        if first.run.start is not None:
            print_difference(first.run.start.computed_by, first.run.computed_by)
    compiler = Compiler(runtime.device)
    training_tasks = first.distribution.resized(config.training_shots)
    resume = f"the same command with --run-name {first.run.folder.parent.name} --resume"
    return Trainer(
        [each.run for each in group],
        maml,
        training_tasks,
        first.distribution,
        compiler,
        resume=resume,
        show=shown,
    ).train()


def _uncompiled(each: Ready) -> Config:
    """The settings of a run that cannot be compiled with others; of one that goes on, as they are else."""
    if each.run.start is not None:
        return each.config.replaced(compile="off")
    return resolve({**each.member.given, "compile": "off"})


# ---- what came of it -----------------------------------------------------------------------------


def outcome_of(each: Ready) -> Outcome:
    """Return how the training of a run ended."""
    run = each.run
    whole = run.failure is None  # one that has stopped early is no part of a mean over seeds
    final = final_loss(run.progress.training) if whole else None
    validation = run.progress.validation
    return Outcome(
        name=each.member.name,
        setting=each.member.setting,
        seed=each.member.seed,
        iteration=run.iteration,
        failure=run.failure,
        final_training_loss=final["mean"] if final else None,
        measure=run.measure,
        loss=loss_name(each.config.learner.loss),
        best_validation=run.best_validation if whole else None,
        best_iteration=run.progress.best_iteration if whole else None,
        validation={name: validation.get(name, []) for name in ("iteration", run.measure)},
    )


def _write_summary(folder: Path, outcomes: Sequence[Outcome]) -> None:
    print(spread.training_table(outcomes))
    report.write_json(folder / f"{SUMMARY}.json", spread.training_record(outcomes))
    write_figure(folder / f"{SUMMARY}.png", spread.training_figure(outcomes))
    print(f"Written: {folder / SUMMARY}.json and .png")

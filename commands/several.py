"""Many runs as one: those that differ in numbers alone are trained together, by one more `vmap`.

Each has its own random stream, curves, checkpoints and results, which are those of the run alone. Runs that
differ in anything else follow each other. Several processes share the runs out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commands.build import (
    Assembly,
    SharedTasks,
    Start,
    assemble,
    no_empty_folder_left,
    prepare,
    prepare_run,
    print_difference,
    read_tasks,
    train_runs,
    writable,
)
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.members import Member, compiles, members_of
from commands.names import describe, own_code_flags
from commands.resolve import config_of, uncompiled, what_is_learned
from commands.train import find_start, make_folder
from common.errors import UsageError
from common.processes import World
from evaluation import seeds as spread
from evaluation import tables as report
from evaluation.seeds import Outcome
from evaluation.style import write_figure
from learners.losses import loss_name
from training.checkpoint import load_checkpoint
from training.folders import LAST, LIST, has_results, is_occupied, list_runs, lock_folder
from training.run import Run, final_loss
from training.trainer import AT_ONCE, FAILED

SUMMARY = "summary"
MOST_NAMES = 4  # of runs, in the terminal


# ---- which can be trained together ---------------------------------------------------------------


@dataclass
class Ready:
    """A run that has all it needs."""

    member: Member
    assembly: Assembly
    run: Run

    @property
    def config(self) -> Config:
        return self.assembly.config

    def fits(self, other: Ready) -> bool:
        """Whether the two can be trained at once: they differ in numbers alone."""
        return (
            self.run.iteration == other.run.iteration
            and _structure(self.config) == _structure(other.config)
            and self.config.training.vectorise
            and _same(self.assembly.maml.call.fixed, other.assembly.maml.call.fixed)
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


def sweep(call: Call, given: Mapping[str, Any], world: World) -> int:
    """Many runs as one (--seeds, --sweep)."""
    members = members_of(call, given)
    with ExitStack() as locked:
        folder, ending = train_many(call, members, world, locked)
    if ending > 128:
        print(f"Saved; the same command with --run-name {folder.name} --resume goes on.")
        return ending
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(folder)]))
    code = [] if len(codes := {tuple(own_code_flags(m.config)) for m in members}) > 1 else [*codes.pop()]
    print("Test them:", shlex.join(["python", "main.py", "--eval", "--load", str(folder), *code]))
    return ending


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
        begun = [find_start(_of_member(call, named, member), member.given) for member in own]
    world.check_same({"torch": torch.__version__, "list of runs": [(m.name, m.config) for m in members]})
    home = named or call.checkpoint_path
    with no_empty_folder_left(home) if world.first else nullcontext():
        with world.together():
            if world.first:
                writable(home, "--checkpoint-path")
        distributions = read_tasks([member.config for member in members], call, world)
        with world.together():
            ready = _ready(call, own, begun, world, distributions, writes_to=home)
    folder = named or world.from_first(lambda: make_folder(call.checkpoint_path, members[0].config, locked))
    for each in ready:
        each.run.folder = folder / each.member.name
    world.from_first(lambda: _write_list(folder, members))
    groups = groups_of([each for each in ready if not _finished(each.run)], call.runs_at_once)
    if world.first:
        sizes = ", ".join(str(len(group)) for group in groups) or "none, all are finished"
        of_all = f", {len(own)} of them in this process" if world.size > 1 else ""
        print(f"{len(members)} runs{of_all} in {folder}; trained at once: {sizes}")
        print(f"  device      {ready[0].assembly.runtime.describe()}")
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
    begun: Sequence[Start],
    world: World,
    distributions: SharedTasks,
    *,
    writes_to: Path,
) -> list[Ready]:
    """The runs, built and checked; those with the same data share them."""
    tested: set[Config] = set()
    found: list[Ready] = []
    for member, begins in zip(members, begun, strict=True):
        start, runtime = prepare_run(begins, member.given, call, world, silent=bool(found))
        probed = _structure(start.config) in tested
        assembly = assemble(start, call, runtime, distributions, probed=probed)
        tested.add(_structure(start.config))
        found.append(Ready(member, assembly, assembly.open_run(writes_to / member.name)))
    return found


def _train_group(group: Sequence[Ready], call: Call, world: World) -> int:
    """Trains runs at once; the exit code."""
    first, shown = group[0], world.first
    config = first.config
    prepare(config, call, world)  # threads and precision are the process's: other runs had others
    if len(group) > 1 and config.training.compile == "on" and not compiles(config):
        for each in group:
            each.assembly = _uncompiled(each)
        config = first.config
    for each in group:
        each.run = each.assembly.open_run(each.run.folder, runs_at_once=len(group))
    if shown:
        names = [each.member.name for each in group]
        listed = ", ".join(names) if len(names) <= MOST_NAMES else f"{names[0]} ... {names[-1]}"
        print(f"Training {listed}", flush=True)
        print(describe(*(each.config for each in group)), flush=True)
        if first.run.start is not None:
            print_difference(first.run.start.computed_by, first.run.computed_by)
    resume = f"the same command with --run-name {first.run.folder.parent.name} --resume"
    assemblies, runs = [each.assembly for each in group], [each.run for each in group]
    return train_runs(assemblies, runs, resume=resume, show=shown)


def _uncompiled(each: Ready) -> Assembly:
    """The run uncompiled, as others that it is trained with; of one that goes on, as it is else."""
    start = each.assembly.start
    if start.resumes:
        config = start.config.replaced(compile="off")
    else:
        config = uncompiled(start.config, each.member.given)
    training = config.training
    maml = each.assembly.maml.with_options(
        convolution=training.convolution, tasks_at_once=training.tasks_at_once
    )
    return replace(each.assembly, start=replace(start, config=config), maml=maml)


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

"""Train many runs of one command line (--seeds, --sweep): each is the run alone, several are trained at once.

    flags -> members_of -> build.assemble each -> group_runs -> build.train_runs each group -> summary

Runs that differ in numbers alone (`trainer.AT_ONCE`) are trained together by one more `vmap`; other runs
follow each other. Every run has its own random stream, folder, checkpoints and curves, the same as if it were
trained alone. Several processes share the runs out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from commands.build import (
    Assembly,
    SharedTasks,
    Start,
    assemble,
    make_writable,
    prepare,
    prepare_run,
    print_difference,
    read_tasks,
    remove_if_left_empty,
    train_runs,
)
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.members import Member, members_of
from commands.names import describe, own_code_flags
from commands.resolve import config_of, select_learned
from commands.train import find_start, make_folder
from common.errors import UsageError
from common.processes import World
from evaluation.figures import learning_figure
from evaluation.style import write_figure
from evaluation.tables import (
    ALL,
    RunSummary,
    learning_curves,
    measure_of,
    training_record,
    training_table,
    write_json,
)
from learners.losses import loss_name
from tasks.options import CURVES
from training.checkpoint import load_checkpoint
from training.folders import LAST, LIST, is_occupied, list_runs, lock_folder
from training.run import Run, final_loss
from training.trainer import AT_ONCE, FAILED

MOST_NAMES = 4  # of runs, in the terminal


def sweep(call: Call, given: Mapping[str, Any], world: World) -> int:
    """Train or resume many runs; return the exit code: 128 + signal, or `FAILED` if a run failed."""
    members = members_of(call, given)
    with ExitStack() as locks:
        folder, code = _train_all(call, members, world, locks)
    if code > 128:
        print(f"Saved. To resume: the same command with --run-name {folder.name} --resume")
        return code
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(folder)]))
    own_code = {tuple(own_code_flags(member.config)) for member in members}
    flags = own_code.pop() if len(own_code) == 1 else ()
    print("Test them:", shlex.join(["python", "main.py", "--eval", "--load", str(folder), *flags]))
    return code


# ---- the folder of all runs ----------------------------------------------------------------------


def _claim_folder(call: Call, members: Sequence[Member], world: World, locks: ExitStack) -> Path | None:
    """Check and lock the folder that --run-name names; return None without the flag."""
    if world.size > len(members):
        raise UsageError(
            f"{world.size} processes for {len(members)} runs: take fewer (torchrun --nproc-per-node)"
        )
    if call.run_name is None:
        return None
    folder = call.checkpoint_path / call.run_name
    if world.first:
        if not call.resume and is_occupied(folder):
            raise UsageError(f"{folder} is not empty: choose another --run-name, or --resume what is there")
        locks.enter_context(remove_if_left_empty(folder))
        locks.enter_context(lock_folder(folder, [member.name for member in members]))
    if (folder / LAST).exists():
        raise UsageError(f"{folder} is a run, not a folder of many: choose another --run-name")
    if (folder / LIST).exists():
        _check_settings(folder, members)
    return folder


def _check_settings(folder: Path, members: Sequence[Member]) -> None:
    """Raise UsageError where the folder has other seeds of a setting, trained with other settings.

    Their mean would be one of different things.
    """
    wanted = {member.setting: member for member in members}
    names = {member.name for member in members}
    for run in list_runs(folder):
        file = folder / run.name / LAST
        if run.name in names or run.setting not in wanted or not file.is_file():
            continue
        saved = config_of(load_checkpoint(file).settings, file)
        now, before = (select_learned(c.replaced(seed=0)) for c in (wanted[run.setting].config, saved))
        different = [name for name in now if now[name] != before[name]]
        if different:
            raise UsageError(
                f"{folder} has the run {run.name} with another {CONFIG_FLAGS[different[0]].name} "
                f"({before[different[0]]}): choose another --run-name"
            )


def _write_list(folder: Path, members: Sequence[Member]) -> None:
    """Write which runs the folder has: these, and those from before."""
    before = {run.name: vars(run) for run in list_runs(folder)} if (folder / LIST).exists() else {}
    now = {m.name: {"name": m.name, "setting": m.setting, "seed": m.seed} for m in members}
    write_json(folder / LIST, {"runs": list((before | now).values())})


# ---- training ------------------------------------------------------------------------------------


def _train_all(call: Call, members: Sequence[Member], world: World, locks: ExitStack) -> tuple[Path, int]:
    """Train the runs of this process; return the folder of all runs and the exit code."""
    with world.together():
        named = _claim_folder(call, members, world, locks)
        mine = {members[number].name: members[number] for number in world.share(len(members))}
        calls = {n: replace(call, checkpoint_path=named, run_name=n) if named else call for n in mine}
        starts = {name: find_start(calls[name], member.given) for name, member in mine.items()}
    world.check_same({"torch": torch.__version__, "list of runs": [(m.name, m.config) for m in members]})
    home = named or call.checkpoint_path
    with remove_if_left_empty(home) if world.first else nullcontext():
        with world.together():
            if world.first:
                make_writable(home, "--checkpoint-path")
        shared = read_tasks([member.config for member in members], call, world)
        with world.together():
            assemblies = _assemble_all(starts, mine, call, shared, world)
    folder = named or world.from_first(lambda: make_folder(call.checkpoint_path, members[0].config, locks))
    world.from_first(lambda: _write_list(folder, members))
    groups = group_runs({n: a for n, a in assemblies.items() if not a.start.finished}, call.runs_at_once)
    if world.first:
        sizes = ", ".join(str(len(group)) for group in groups) or "none, all are finished"
        share = f", {len(mine)} of them in this process" if world.size > 1 else ""
        print(f"{len(members)} runs{share} in {folder}; trained at once: {sizes}")
        print(f"  device      {next(iter(assemblies.values())).runtime.describe()}")
    runs = {name: parts.open_run(folder / name) for name, parts in assemblies.items() if parts.start.finished}
    for group in groups:
        code = _train_group(group, runs, folder, call, world)
        if code > 128:
            return folder, code
    outcomes = [summarise_run(member, runs[name]) for name, member in mine.items()]
    return folder, _report(folder, [one for part in world.gather(outcomes) for one in part], world)


def _assemble_all(
    starts: Mapping[str, Start], members: Mapping[str, Member], call: Call, shared: SharedTasks, world: World
) -> dict[str, Assembly]:
    """Assemble each run; of runs that differ in numbers alone, only the first is probed."""
    assemblies: dict[str, Assembly] = {}
    probed: set[Config] = set()
    for name, start in starts.items():
        start, runtime = prepare_run(start, members[name].given, call, world, silent=bool(assemblies))
        structure = _structure(start.config)
        assemblies[name] = assemble(start, call, runtime, shared, probed=structure in probed)
        probed.add(structure)
    return assemblies


def group_runs(assemblies: Mapping[str, Assembly], at_most: int | None) -> list[dict[str, Assembly]]:
    """Return the runs, by name, in groups that can be trained at once, of at most that size.

    Runs that are compiled, and cannot be compiled together, follow each other: that is faster.
    """
    groups: list[dict[str, Assembly]] = []
    for name, parts in assemblies.items():
        size = (at_most or len(assemblies)) if _compiles_together(parts.config) else 1
        fitting = (g for g in groups if len(g) < size and _fits(next(iter(g.values())), parts))
        group = next(fitting, None)
        if group is None:
            groups.append(group := {})
        group[name] = parts
    return groups


def _compiles_together(config: Config) -> bool:
    """Return whether runs need no compiler, or learn from whole batches of computed tasks."""
    chunk, tasks = config.training.tasks_at_once, config.training.meta_batch_size
    whole = config.tasks.dataset in CURVES and (chunk is None or chunk >= tasks)
    return whole or config.training.compile == "off"


def _structure(config: Config) -> Config:
    """Return the settings without the numbers in which runs that are trained at once may differ."""
    free = {name: config.get(name) is not None for name in AT_ONCE}
    if config.choices.inner_rates != "fixed":  # their start is in the weights
        free["inner_lr_max"] = False
    return config.replaced(**free)


def _fits(one: Assembly, other: Assembly) -> bool:
    """Return whether two runs can be trained at once: they differ in numbers alone."""
    iterations = [parts.start.resumed.iteration if parts.start.resumed else 0 for parts in (one, other)]
    fixed, others = one.maml.call.fixed, other.maml.call.fixed
    return (
        iterations[0] == iterations[1]
        and _structure(one.config) == _structure(other.config)
        and one.config.training.vectorise
        and fixed.keys() == others.keys()
        and all(torch.equal(fixed[name], others[name]) for name in fixed)
    )


def _train_group(
    group: Mapping[str, Assembly], runs: dict[str, Run], folder: Path, call: Call, world: World
) -> int:
    """Train runs at once; add them to `runs`, and return the exit code."""
    first = next(iter(group.values()))
    prepare(first.config, call, world)  # threads and precision are the process's: other runs had others
    opened = {name: parts.open_run(folder / name, runs_at_once=len(group)) for name, parts in group.items()}
    if world.first:
        names = list(group)
        print(f"Training {', '.join(names) if len(names) <= MOST_NAMES else f'{names[0]} ... {names[-1]}'}")
        print(describe(*(parts.config for parts in group.values())), flush=True)
        if first.start.resumed is not None:
            print_difference(first.start.resumed.computed_by, opened[names[0]].computed_by)
    runs |= opened
    resume = f"the same command with --run-name {folder.name} --resume"
    return train_runs(list(group.values()), list(opened.values()), resume=resume, show=world.first)


# ---- outcome -------------------------------------------------------------------------------------


def summarise_run(member: Member, run: Run) -> RunSummary:
    """Return how a run was trained."""
    loss, validation = final_loss(run.progress.training), run.progress.validation
    accuracy = run.measure == "query_accuracy"
    return RunSummary(
        name=member.name,
        setting=member.setting or ALL,
        seed=member.seed,
        iteration=run.iteration,
        failure=run.failure,
        final_training_loss=loss["mean"] if loss else None,
        measure="accuracy" if accuracy else loss_name(member.config.learner.loss),
        validation=(validation.get("iteration", []), validation.get(run.measure, [])),
    )


def _report(folder: Path, outcomes: Sequence[RunSummary], world: World) -> int:
    """Print and write the summary of all runs; return the exit code."""
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if world.first:
        print(training_table(outcomes))
        write_json(folder / "summary.json", training_record(outcomes))
        figure = learning_figure(learning_curves(outcomes), f"validation {measure_of(outcomes)}")
        write_figure(folder / "summary.png", figure)
        print(f"Written: {folder / 'summary'}.json and .png")
    if failures and world.first:
        count = f"{len(failures)} of {len(outcomes)} runs stopped before their end, " * (len(failures) > 1)
        print(f"main.py: error: {count}{failures[0]}", file=sys.stderr)
    return FAILED if failures else 0

"""Train many runs of one command line (--seeds, --sweep), several at once: each gives what it gives alone.

    flags -> list_members -> build.assemble each -> group_runs -> build.train_runs each group -> summary

Runs that differ in numbers alone (`trainer.AT_ONCE`) are trained together by one more `vmap`; other runs
are trained one after another. Every run has the random stream, folder, checkpoints and curves that it has
alone. Several processes share the runs out.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from commands.build import Assembly, assemble, preload_tasks, prepare, print_data, train_runs
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.members import extract_setting, list_members
from commands.names import describe, list_repeated_flags
from commands.resolve import restore_config, select_learned
from commands.train import check_free, find_start, make_folder, print_next
from common.errors import UsageError
from common.files import read_json
from common.processes import World
from evaluation import tables
from evaluation.figures import learning_figure, write_results
from tasks.options import CURVES
from training.checkpoint import load_checkpoint
from training.folders import LAST, LIST, lock_folder
from training.run import Run, final_loss
from training.trainer import AT_ONCE, FAILED


def sweep(call: Call, flags: Mapping[str, Any], command: str, world: World) -> int:
    """Train or resume many runs; return the exit code: 128 + signal, or `FAILED` if a run failed."""
    members, configs = list_members(call, flags)
    names, folder = [*configs], call.run_folder
    mine = [names[number] for number in world.share(len(names))]
    with ExitStack() as locks:
        with world.together():
            if world.size > len(names):
                raise UsageError(f"{world.size} processes for {len(names)} runs: take fewer")
            if folder:
                _claim_folder(folder, call, configs, world, locks)
            starts = [find_start(folder and folder / name, call, members[name]) for name in mine]
        world.check_same({"torch": torch.__version__, "list of runs": configs})
        first = configs[names[0]]
        folder = folder or world.from_first(lambda: make_folder(call.checkpoint_path, first, locks))
        preload_tasks(configs.values(), call, world)
        with world.together():
            checked: dict[Hashable, str] = {}
            assemblies = [
                assemble(start, folder / name, members[name], command, call, world, checked=checked)
                for name, start in zip(mine, starts, strict=True)
            ]
        world.from_first(lambda: _write_list(folder, configs))
        groups = group_runs([parts for parts in assemblies if not parts.start.finished], call.runs_at_once)
        sizes = ", ".join(str(len(group)) for group in groups) or "none, all are finished"
        share = f", {len(mine)} of them in this process" if world.size > 1 else ""
        print(f"{len(names)} runs{share} in {folder}; trained at once: {sizes}")
        print(f"  device   {assemblies[0].runtime.describe()}")
        for group in groups:
            prepare(group[0].start.config, call, world)  # threads and precision are the process's
            print("Training", textwrap.shorten(", ".join(parts.run.folder.name for parts in group), 96))
            print(describe(*(parts.start.config for parts in group)), flush=True)
            print_data(group[0].distribution, world)
            code = train_runs(group)
            if code > 128:
                print(f"Saved. To resume: the same command with --run-name {folder.name} --resume")
                return code
        code = _report(folder, [parts.run for parts in assemblies], world)
    one_code = len({tuple(list_repeated_flags(config, call)) for config in configs.values()}) == 1
    print_next(folder, folder if one_code else folder / names[0], list_repeated_flags(first, call))
    return code


def _claim_folder(
    folder: Path, call: Call, configs: Mapping[str, Config], world: World, locks: ExitStack
) -> None:
    """Check and lock the folder of --run-name; UsageError where it has other seeds with other settings."""
    if world.first:
        check_free(folder, call)
        locks.enter_context(lock_folder(folder, [*configs]))
    if (folder / LAST).exists():
        raise UsageError(f"{folder} is a run, not a folder of many: choose another --run-name")
    settings = {extract_setting(name): select_learned(config) for name, config in configs.items()}
    for name in _read_members(folder).keys() - configs.keys():
        file, now = folder / name / LAST, settings.get(extract_setting(name))
        if now and file.is_file():
            saved = select_learned(restore_config(load_checkpoint(file).settings, file))
            different = [
                CONFIG_FLAGS[n].name + f" ({saved[n]})" for n, value in now.items() if value != saved[n]
            ]
            if different:
                raise UsageError(
                    f"{folder} has {name} with another {different[0]}: choose another --run-name"
                )


def _read_members(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the runs that the folder has, by name."""
    file = folder / LIST
    return {run["name"]: run for run in read_json(file)["runs"]} if file.exists() else {}


def _write_list(folder: Path, configs: Mapping[str, Config]) -> None:
    """Record which runs the folder has: these and the earlier ones."""
    runs = _read_members(folder)
    for name, config in configs.items():
        runs[name] = {"name": name, "setting": extract_setting(name), "seed": config.training.seed}
    tables.write_json(folder / LIST, {"runs": [*runs.values()]})


def group_runs(assemblies: Sequence[Assembly], at_most: int | None) -> list[list[Assembly]]:
    """Return the runs in groups that can be trained at once, of at most that size.

    Compiled runs are trained one after another, which is faster, but for those on built-in curves.
    """
    groups: list[list[Assembly]] = []
    for parts in assemblies:
        training, tasks = parts.start.config.training, parts.start.config.tasks
        at_once = (training.tasks_at_once or training.meta_batch_size) >= training.meta_batch_size
        together = training.compile == "off" or ({*tasks.datasets} <= {*CURVES} and at_once)
        size = (at_most or len(assemblies)) if together else 1
        group = next((g for g in groups if len(g) < size and _is_alike(g[0], parts)), [])
        if not group:
            groups.append(group)
        group.append(parts)
    return groups


def _is_alike(one: Assembly, other: Assembly) -> bool:
    """Return whether two runs can be trained at once: they differ in numbers alone."""

    def drop_numbers(config: Config) -> Config:
        free = {name: config.get(name) is not None for name in AT_ONCE}
        if config.choices.inner_rates != "fixed":  # their start is in the weights
            free["inner_lr_max"] = False
        return config.replace_settings(**free)

    fixed, others = one.maml.call.fixed, other.maml.call.fixed
    return (
        one.run.iteration == other.run.iteration
        and one.run.progress.window_size == other.run.progress.window_size
        and drop_numbers(one.start.config) == drop_numbers(other.start.config)
        and one.start.config.training.vectorise
        and fixed.keys() == others.keys()
        and all(torch.equal(fixed[name], others[name]) for name in fixed)
    )


def _summarise(run: Run) -> tables.Summary:
    """Return how a run was trained."""
    progress, loss = run.progress, final_loss(run.progress.training)
    return {
        "name": run.folder.name,
        "setting": extract_setting(run.folder.name) or tables.ALL,
        "seed": run.training.seed,
        "iteration": run.iteration,
        "failure": run.failure,
        "measure": run.measure_name,
        "final_training_loss": loss and loss["mean"],
        "best_validation": run.best_validation,
        "best_iteration": progress.best_iteration,
        "validation": tuple(progress.validation.get(name, []) for name in ("iteration", run.measure)),
    }


def _report(folder: Path, runs: Sequence[Run], world: World) -> int:
    """Print and write the summary of all processes' runs; return the exit code."""
    outcomes = [one for part in world.gather([*map(_summarise, runs)]) for one in part]
    failures = [outcome for outcome in outcomes if outcome["failure"] is not None]
    if world.first:
        print(tables.training_table(outcomes))
        measure = f"validation {tables.find_measure(outcomes)}"
        title = f"{folder.name}: mean and range of the seeds"
        figure = learning_figure(tables.learning_curves(outcomes), measure, title, zoom=True)
        print(write_results(folder / "summary", tables.training_record(outcomes), figure))
        if failures:
            count, reason = f"{len(failures)} of {len(outcomes)}", failures[0]["failure"]
            print(f"main.py: error: {count} runs stopped before their end, {reason}", file=sys.stderr)
    return FAILED if failures else 0

"""Compare trained runs (--compare): find them, check that they can be paired, measure them on the same tasks.

    folders and checkpoints -> sides {name: {seed: Subject}} -> evaluations -> tables, JSON, picture

A side is a run, or the runs of one setting by seed. Nothing is trained and nothing is written but the
results, so a run that is still being trained can take part.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.build import SharedTasks, make_writable, prepare, remove_if_left_empty
from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.evaluate import Subject
from commands.names import file_name, in_words, select_meaningful, task_size, task_words
from commands.resolve import select_learned
from common.errors import UsageError, printable
from common.files import read_json
from common.own_code import is_own_code
from evaluation import meta_test, paired, seeds
from evaluation.meta_test import Evaluation
from evaluation.seeds import RunSummary
from evaluation.style import write_figure
from evaluation.tables import write_json
from learners.losses import loss_name
from tasks.options import FILE_KINDS
from training.checkpoint import Curve, load_checkpoint
from training.folders import BEST, LAST, find_checkpoint, find_runs
from training.trainer import VALIDATION_TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES, LONGEST_NAMES = 3, 100  # sides and characters in a file name

# Settings that decide the tasks
TASK_SETTINGS = (
    *("dataset", "dataset_args", "ways", "shots", "queries", "noise"),
    *("omniglot_split", "quarter_turns", "split_shares", "columns"),
)
Runs = dict[int, Subject]  # one side of the comparison, by seed


def compare(call: Call, given: Mapping[str, Any], command: str) -> int:
    """Measure the runs of --compare on the same tasks; print tables, write a record and a picture."""
    runs = group_seeds(read_sides(call, given))
    check_pairs(runs)
    subjects = [subject for side in runs.values() for subject in side.values()]
    config = subjects[0].config
    tasks = min(subject.config.evaluation.eval_tasks for subject in subjects)
    first = Path(call.compare[0])
    folder = call.out or (first if first.is_dir() else first.parent).parent
    sizes = f"{task_size(config.tasks)}-{config.tasks.queries}query-{tasks}tasks"
    name = f"{_join_names(list(runs))}-{call.split}-{file_name(config.tasks.dataset)}-{sizes}"
    file = folder / f"comparison-{name}.json"
    compared = [[str(_file_of(subject).resolve()) for subject in side.values()] for side in runs.values()]
    _check_results(file, compared)
    with remove_if_left_empty(folder):
        make_writable(folder, "--out")
        what = f"{config.tasks.dataset}, {task_words(config.tasks)}, {config.tasks.queries} query"
        print(f"Comparing on {tasks} {call.split} tasks: {what}")
        print(f"  device      {prepare(config, call).describe()}", flush=True)
        record, figure = _measure(runs, call, tasks, f"{what}: {tasks} {call.split} tasks")
        write_json(file, {"command": command, "compared": compared, **record})
        write_figure(file.with_name(f"{file.stem}.png"), figure)
        print(f"Written: {file} and .png")
    return 0


def _measure(runs: Mapping[str, Runs], call: Call, tasks: int, title: str) -> tuple[dict[str, Any], Figure]:
    """Measure all sides on `tasks` tasks, and print the tables; return the record and the picture."""
    first_task = VALIDATION_TASKS if call.split == "validation" else 0  # those before chose best.pt
    shared: SharedTasks = {}
    measured = [_measure_side(*side, call, tasks, first_task, shared) for side in runs.items()]
    sides = [side for side, _ in measured]
    trained = paired.trained_runs(sides)
    loss = trained[0].loss
    words = f"{tasks} {call.split} tasks" + ", none of which chose a checkpoint" * bool(first_task)
    print(f"\n{paired.settings_table(sides)}\n\n{seeds.training_table(trained)}")
    print(f"\n{paired.differences_table(sides, loss, words)}")
    record = {
        "split": call.split,
        "tasks": tasks,
        "first_task": first_task,
        "tasks_seed": meta_test.SEED,
        "measure": "accuracy" if sides[0].accuracy else loss,
        "common_validation_level": seeds.common_level(trained),
        "sides": paired.record(sides),
        "runs": [record for _, records in measured for record in records],
    }
    return record, paired.figure(sides, loss, title)


def _measure_side(
    name: str, runs: Runs, call: Call, tasks: int, first_task: int, shared: SharedTasks
) -> tuple[paired.Side, list[dict[str, Any]]]:
    """Return a side with its results on `tasks` tasks of the split, and a record of each of its runs."""
    training: dict[int, RunSummary] = {}
    results: dict[int, Evaluation] = {}
    records = []
    for seed, subject in runs.items():
        config = subject.config.replaced(eval_tasks=tasks)
        print(f"Measuring {subject.name}", flush=True)
        job = replace(subject, config=config).build(call, prepare(config, call), shared)
        results[seed] = job.evaluate(call.split, first_task=first_task)
        curves = _curves_of(subject)
        training[seed] = RunSummary(
            name=name,
            setting=name,
            seed=seed,
            iteration=int(max(curves["validation"].get("iteration", [0]))),
            failure=None,
            final_training_loss=None,
            measure="query_accuracy" if config.tasks.classification else "query_loss",
            loss=loss_name(config.learner.loss),
            validation=curves["validation"],
        )
        records.append({"name": name, "seed": seed, **job.record(), "split": call.split, "curves": curves})
    saved = subject.trained
    learned = {*select_learned(saved), "iterations"} - {"seed"}
    words = in_words(saved, [setting for setting in select_meaningful(saved) if setting in learned])
    steps = config.evaluation.test_steps
    return paired.Side(name, words, training, results, config.choices.query_norm, steps), records


def _curves_of(subject: Subject) -> dict[str, Curve]:
    """Return the curves of the whole run, which go on after the iteration of its best checkpoint."""
    file = _file_of(subject)
    last = file.with_name(LAST)
    progress = load_checkpoint(last if file.name == BEST and last.is_file() else file).progress
    return {part: progress[part] for part in ("training", "validation")}


# ---- which runs ----------------------------------------------------------------------------------


def read_sides(call: Call, given: Mapping[str, Any]) -> dict[str, Runs]:
    """Return the sides that --compare names: a run, or each setting of a folder of many runs.

    Raises UsageError where there is no checkpoint, or fewer than two sides.
    """
    places: list[tuple[Path, str, list[Path]]] = []  # path, setting, checkpoints
    for path in map(Path, call.compare):
        many = find_runs(path)
        settings = dict.fromkeys(run.setting for run in many)
        places += [(path, s, [run.file for run in many if run.setting == s]) for s in settings]
        if not many:
            places.append((path, "", [find_checkpoint(path, BEST, LAST)]))
    if len(places) < 2:
        raise UsageError(
            f"--compare {call.compare[0]}: that is one run, or one setting: name another to compare it to"
        )
    names = name_sides([(path, setting) for path, setting, _ in places])
    subjects = [[_read_subject(file, call, given) for file in files] for *_, files in places]
    return {
        name: {subject.trained.training.seed: subject for subject in side}
        for name, side in zip(names, subjects, strict=True)
    }


def _read_subject(file: Path, call: Call, given: Mapping[str, Any]) -> Subject:
    """Return a checkpoint with the flags that may differ from it; own code only where it has own code."""
    source = load_checkpoint(file)
    flags = {
        name: value
        for name, value in given.items()
        if name not in ("learner", "loss") or is_own_code(source.settings[name]) or not is_own_code(value)
    }
    try:
        return Subject.read(file, call, flags, source)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _file_of(subject: Subject) -> Path:
    assert subject.file is not None
    return subject.file


def name_sides(places: Sequence[tuple[Path, str]]) -> list[str]:
    """Return a name for each path and setting: the path below the folder that all have in common."""
    paths = [path.resolve() for path, _ in places]
    common = os.path.commonpath(paths)
    names: list[str] = []
    for path, (_, setting) in zip(paths, places, strict=True):
        below = str(path.relative_to(common)).removesuffix(".pt").removeprefix(".")
        name = printable(f"{below} {setting}".strip() or path.name)
        copies = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({copies + 1})" if copies else name)
    return names


def group_seeds(sides: Mapping[str, Runs]) -> dict[str, Runs]:
    """Return single runs that differ only in their seeds as one side.

    This is done if at least two sides remain and all of them have the same seeds.
    """
    groups: dict[str, list[str]] = {}
    for name, runs in sides.items():
        key = _setting_of(*runs.values()) if len(runs) == 1 else f"runs {name}"
        groups.setdefault(key, []).append(name)
    seeds = [sorted(seed for name in names for seed in sides[name]) for names in groups.values()]
    distinct = all(len(set(part)) == len(part) and part == seeds[0] for part in seeds)
    if not 2 <= len(groups) < len(sides) or not distinct:
        return dict(sides)
    joined = {}
    for names in groups.values():
        common = name_group(names)
        name = names[0] if common in joined else common
        joined[name] = {seed: subject for part in names for seed, subject in sides[part].items()}
    return joined


def _setting_of(subject: Subject) -> str:
    """Return everything that decides a run's results except its seed."""
    saved, config = subject.trained, subject.config
    assert subject.source is not None
    measured = [name for name, flag in CONFIG_FLAGS.items() if flag.group == "evaluation"]
    deciding = select_learned(saved) | {name: config.get(name) for name in measured}
    deciding |= {name: saved.get(name) for name in ("iterations", "val_every")}
    deciding |= {"origin": subject.source.progress["origin"], "file": _file_of(subject).name}
    return repr(sorted((deciding | {"seed": None}).items()))


def name_group(names: Sequence[str]) -> str:
    """Return what the names of a setting's runs begin with in common, without the seed."""
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = "".join(column[0] for column in letters)
    return names[0] if len(names) == 1 else re.sub(r"[-_ /]*(seed)?[-_]*[0-9]*$", "", common) or names[0]


# ---- whether they can be paired ------------------------------------------------------------------


def check_pairs(sides: Mapping[str, Runs]) -> None:
    """Raise UsageError where the sides have other tasks, or no seed in common."""
    subjects = [(name, subject) for name, runs in sides.items() for subject in runs.values()]
    first_name, first = next(iter(sides.items()))
    for name, subject in subjects:
        _check_same_tasks((first_name, subjects[0][1].config), (name, subject.config))
        if not paired.shared_seeds(sides[name], first):
            raise UsageError(
                f"--compare: {first_name} and {name} have no seed in common, and cannot be paired: name one "
                "run of each"
            )


def _check_same_tasks(one: tuple[str, Config], other: tuple[str, Config]) -> None:
    """Raise UsageError where two runs, by name, have other tasks, or another measure on them."""
    measured, others = _what_is_measured(one[1]), _what_is_measured(other[1])
    different = [setting for setting in measured if measured[setting] != others[setting]]
    if not different:
        return
    words = [
        f"{name} ({', '.join(f'{flag} {value}' for flag, value in in_words(config, different).items())})"
        for name, config in (one, other)
    ]
    raise UsageError(
        f"--compare: {' and '.join(words)} have other tasks, which cannot be paired: give -k, -q, -n or "
        "--eval-dataset if they differ in these alone"
    )


def _what_is_measured(config: Config) -> dict[str, Any]:
    """Return the settings that decide the tasks and, for regression, the measure."""
    measured = {name: config.get(name) for name in TASK_SETTINGS}
    for name in ("loss", "loss_args"):
        measured[name] = None if config.tasks.classification else config.get(name)
    kind, colon, path = config.tasks.dataset.partition(":")
    if kind in FILE_KINDS and colon:
        measured["dataset"] = f"{kind}:{os.path.realpath(path)}"
    return measured


# ---- files ---------------------------------------------------------------------------------------


def _join_names(names: Sequence[str]) -> str:
    """Return the sides' names as part of a file name; of many sides, the first ones."""
    plain = ["".join(c if c.isalnum() or c in "-_.+=" else "-" for c in name) for name in names]
    more = [f"{len(plain) - MOST_NAMES}-more"] * (len(plain) > MOST_NAMES)
    return "-vs-".join([*plain[:MOST_NAMES], *more])[:LONGEST_NAMES]


def _check_results(file: Path, compared: list[list[str]]) -> None:
    """Raise UsageError where the file holds the results of other runs, or something else."""
    try:
        same = not file.exists() or read_json(file)["compared"] == compared
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UsageError(f"{file} holds the results of other runs: choose another --out")

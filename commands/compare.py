"""Runs set side by side (--compare): which they are, whether they can be paired, and measuring them.

Nothing is trained, and nothing written but the results: a run may go on meanwhile.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from commands import config as settings
from commands.build import SharedTasks, no_empty_folder_left, prepare, writable
from commands.call import Call
from commands.config import Config
from commands.evaluate import Subject
from commands.names import file_name, in_words, meaningful, task_size, task_words
from commands.resolve import config_of, what_is_learned
from common.errors import UsageError, printable
from common.files import read_json
from common.own_code import is_own_code
from evaluation import meta_test as evaluation
from evaluation import paired
from evaluation import tables as report
from evaluation.meta_test import Evaluation
from evaluation.style import write_figure
from learners.losses import loss_name
from tasks.options import FILE_KINDS
from training import trainer
from training.checkpoint import Curve, load_checkpoint
from training.folders import BEST, LAST, find_checkpoint, find_runs

LONGEST_NAME = 100  # characters of the names of runs in that of a file

# What decides which tasks there are, but the seeds of their numbers; and what can be done where it differs.
TASKS = {
    "dataset": "--eval-dataset with --split test",
    "dataset_args": None,
    "ways": "-n, which runs with --head-init zero or prototype take",
    "shots": "-k",
    "queries": "-q",
    "noise": None,
    "omniglot_split": None,
    "quarter_turns": None,
    "split_shares": None,
    "columns": None,
}


@dataclass(frozen=True)
class Place:
    """Where one of those that are compared is: a run, or the runs of a setting."""

    folder: Path  # of the run, or of the many
    setting: str  # of many
    files: dict[int, Path]  # checkpoints, by seed; of one run, 0
    named: str  # the checkpoint, where it and not the folder was given


@dataclass(frozen=True)
class Entry:
    """The same, read."""

    name: str
    runs: dict[int, Subject]  # by seed
    curves: dict[int, dict[str, Curve]]  # training and validation
    named: str = ""  # as its place's


def compare(call: Call, given: Mapping[str, Any], command: str) -> int:
    """Measures the runs on the same tasks, and writes what came of it."""
    places = places_of(call.compare)
    read = [_read(place, name, call, given) for place, name in zip(places, names_of(places), strict=True)]
    entries = of_one_setting(read)
    _check_own_code(entries, given)
    check_same_tasks(entries)
    check_shared_seeds(entries)
    first = next(iter(entries[0].runs.values())).config
    tasks = min(subject.config.evaluation.eval_tasks for entry in entries for subject in entry.runs.values())
    skipped = trainer.VALIDATION_TASKS if call.split == "validation" else 0
    folder = call.out or places[0].folder.parent
    size = (
        f"{file_name(first.tasks.dataset)}-{task_size(first.tasks)}-{first.tasks.queries}query-{tasks}tasks"
    )
    file = folder / f"comparison-{_in_file_name([entry.name for entry in entries])}-{call.split}-{size}"
    compared = [[str(s.file.resolve()) for s in entry.runs.values() if s.file] for entry in entries]
    _check_other(Path(f"{file}.json"), compared)
    with no_empty_folder_left(folder):
        writable(folder, "--out")
        what = f"{first.tasks.dataset}, {task_words(first.tasks)}, {first.tasks.queries} query"
        print(f"Comparing on {tasks} {call.split} tasks: {what}")
        print(f"  device      {prepare(first, call).describe()}", flush=True)
        sides, records = _measured(entries, call, tasks, skipped)
        loss = loss_name(first.learner.loss)
        words = f"{tasks} {call.split} tasks" + ", none of which chose a checkpoint" * bool(skipped)
        print(f"\n{paired.settings_table(sides)}\n\n{paired.learning_table(sides, loss)}")
        print(f"\n{paired.differences_table(sides, loss, words)}")
        result = {
            "command": command,
            "compared": compared,
            "split": call.split,
            "tasks": tasks,
            "first_task": skipped,
            "tasks_seed": evaluation.SEED,
            "measure": "accuracy" if sides[0].accuracy else loss,
            "common_validation_level": paired.common_level(sides),
            "sides": paired.record(sides),
            "runs": records,
        }
        report.write_json(Path(f"{file}.json"), result)
        figure = paired.figure(sides, loss, f"{what}: {tasks} {call.split} tasks")
        write_figure(Path(f"{file}.png"), figure)
        print(f"Written: {file}.json and .png")
    return 0


def _measured(
    entries: Sequence[Entry], call: Call, tasks: int, skipped: int
) -> tuple[list[paired.Side], list[dict[str, Any]]]:
    """The entries with their results on so many tasks of the split, and for the record where each run's come
    from."""
    sides, records = [], []
    known: SharedTasks = {}
    for entry in entries:
        results: dict[int, Evaluation] = {}
        for seed, subject in entry.runs.items():
            subject = replace(subject, config=subject.config.replaced(eval_tasks=tasks))
            print(f"Measuring {subject.name}", flush=True)
            runtime = prepare(subject.config, call)
            job = subject.build(call, runtime, known)
            results[seed] = job.evaluate(call.split, first_task=skipped)
            records.append(
                {"name": entry.name, "seed": seed}
                | job.record()
                | {"split": call.split, "curves": entry.curves[seed]}
            )
        sides.append(_side(entry, results))
    return sides, records


def _side(entry: Entry, results: dict[int, Evaluation]) -> paired.Side:
    subject = next(iter(entry.runs.values()))
    assert subject.source is not None
    saved, config = subject.trained, subject.config
    learned = {*what_is_learned(saved), "iterations"} - {"seed"}
    shown = in_words(saved, [name for name in meaningful(saved) if name in learned])
    measure = "query_accuracy" if config.tasks.classification else "query_loss"
    curves = {seed: curve["validation"] for seed, curve in entry.curves.items()}
    validation = {s: (c["iteration"], c[measure]) if measure in c else ([], []) for s, c in curves.items()}
    return paired.Side(
        entry.name, shown, validation, results, config.choices.query_norm, config.evaluation.test_steps
    )


# ---- which they are ------------------------------------------------------------------------------


def places_of(given: Sequence[str]) -> list[Place]:
    """Where the runs are: of a folder of many, a place a setting.

    Raises UsageError where there are none, or less than two.
    """
    found: list[Place] = []
    for text in given:
        path = Path(text)
        many = find_runs(path)
        if not many:
            found.append(_place_of_one(path))
        folder, named = (path, "") if path.is_dir() else (path.parent, path.stem)
        for setting in dict.fromkeys(run.setting for run in many):
            files = {run.seed: run.file for run in many if run.setting == setting}
            found.append(Place(folder, setting, files, named))
    if len(found) < 2:
        raise UsageError(
            f"--compare {given[0]}: that is one run, or one setting: name another to compare it to"
        )
    return found


def _place_of_one(path: Path) -> Place:
    if not path.is_dir():
        return Place(path.parent, "", {0: path}, path.stem)
    try:
        return Place(path, "", {0: find_checkpoint(path, BEST, LAST)}, "")
    except UsageError as error:
        raise UsageError(f"--compare {error}; of a folder of many, name the runs, as FOLDER/*") from error


def names_of(places: Sequence[Place]) -> list[str]:
    """What each is called: the shortest that tells it from the others."""
    folders = [place.folder.resolve() for place in places]
    short = dict(zip(folders, _without_common_words([_last_parts(f, folders) for f in folders]), strict=True))
    names: list[str] = []
    for place, folder in zip(places, folders, strict=True):
        beside = [other for other, its in zip(places, folders, strict=True) if its == folder]
        several = len({other.setting for other in beside}) > 1
        parts = [short[folder] * (not several or len(beside) < len(places)), place.setting * several]
        if len({other.named for other in beside if other.setting == place.setting}) > 1:
            parts.append(place.named or "as chosen")
        name = printable(" ".join(filter(None, parts))) or "run"
        again = sum(each == name or each.startswith(f"{name} (") for each in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _without_common_words(names: Sequence[str]) -> list[str]:
    """Names of folders without the words with which all begin and end, if that leaves letters of each."""
    split = [re.split("([-_])", name) for name in names]
    if len(set(names)) == 1 or any("/" in name for name in names):
        return list(names)
    head, backwards = (_common_length(words) // 2 * 2 for words in (split, [w[::-1] for w in split]))
    short = ["".join(words[head : len(words) - backwards]) for words in split]
    return short if all(any(c.isalpha() for c in name) for name in short) else list(names)


def _common_length(lists: Sequence[Sequence[str]]) -> int:
    """Of what all begin with."""
    same = (len(set(column)) == 1 for column in zip(*lists, strict=False))
    return len(list(itertools.takewhile(bool, same)))


def _last_parts(folder: Path, others: Sequence[Path]) -> str:
    """The last parts of a path, as few as no other has."""
    parts = folder.parts
    for number in range(1, len(parts)):
        if all(other == folder or other.parts[-number:] != parts[-number:] for other in others):
            return "/".join(parts[-number:])
    return str(folder)


def _in_file_name(names: Sequence[str]) -> str:
    """The names in that of a file; of many, the first and how many more."""
    plain = ["".join(c if c.isalnum() or c in "-_.+=" else "-" for c in name) for name in names]
    while len("-vs-".join(plain)) > LONGEST_NAME and len(plain) > 1:
        plain = [*plain[:-2], f"{len(names) - len(plain) + 2}-more"] if len(plain) > 2 else plain[:1]
    return "-vs-".join(plain)[:LONGEST_NAME]


def _check_other(file: Path, compared: list[list[str]]) -> None:
    """Raises UsageError where there are the results of other runs, or no results, by this name."""
    if not file.exists():
        return
    try:
        same = read_json(file)["compared"] == compared
    except (UsageError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UsageError(f"{file} is there, of other runs: choose another --out")


# ---- reading them --------------------------------------------------------------------------------


def _read(place: Place, name: str, call: Call, given: Mapping[str, Any]) -> Entry:
    """The checkpoints with their settings and those flags that may differ, and the curves of their runs."""
    runs, curves = {}, {}
    for number, file in place.files.items():
        source = load_checkpoint(file)
        trained = config_of(source.settings, file)
        own = {n: v for n, v in given.items() if n not in ("learner", "loss") or _is_for(v, n, trained)}
        seed = number if place.setting or len(place.files) > 1 else trained.training.seed
        try:
            runs[seed] = Subject.read(file, call, own, source)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
        last = file.with_name(LAST)
        longest = source if place.named or not last.is_file() else load_checkpoint(last)
        curves[seed] = {part: longest.progress[part] for part in ("training", "validation")}
    return Entry(name, runs, curves, place.named)


def of_one_setting(entries: Sequence[Entry]) -> list[Entry]:
    """With single runs that differ in nothing but their seeds as one entry, if that leaves several entries,
    which all have the same seeds; otherwise as they are."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_setting_of(entry), []).append(entry)
    seeds = [sorted(seed for entry in group for seed in entry.runs) for group in groups.values()]
    distinct = all(len(set(each)) == len(each) and each == seeds[0] for each in seeds)
    if not 2 <= len(groups) < len(entries) or not distinct:
        return list(entries)
    names = [_name_of_all([entry.name for entry in group]) for group in groups.values()]
    if len(set(names)) < len(names):
        names = [group[0].name for group in groups.values()]
    return [
        Entry(
            name,
            {seed: subject for entry in group for seed, subject in entry.runs.items()},
            {seed: curve for entry in group for seed, curve in entry.curves.items()},
            group[0].named,
        )
        for name, group in zip(names, groups.values(), strict=True)
    ]


def _setting_of(entry: Entry) -> str:
    """All that decides a single run's results but its seed; of several runs, their name."""
    subject, *more = entry.runs.values()
    if more or subject.source is None:
        return f"runs {entry.name}"
    saved, config = subject.trained, subject.config
    measured = {name for name, flag in settings.CONFIG_FLAGS.items() if flag.group == "evaluation"}
    found = what_is_learned(saved) | {"seed": None, "named": entry.named}
    found |= {name: config.get(name) for name in measured}
    found |= {name: saved.get(name) for name in ("iterations", "val_every")}
    found["origin"] = subject.source.progress.get("origin")
    return repr(sorted(found.items()))


def _name_of_all(names: Sequence[str]) -> str:
    """The words that stand in the same place of all names, but for "seed"."""
    if len(names) == 1:
        return names[0]
    words = [re.split("[-_ /]", name) for name in names]
    same = [each[0] for each in zip(*words, strict=False) if len(set(each)) == 1]
    return "-".join(word for word in same if word != "seed") or f"{names[0]} and {len(names) - 1} more"


def _is_for(value: str, name: str, saved: Config) -> bool:
    """Whether a flag that names code of the user's concerns a run: others have learners of this tool's."""
    return is_own_code(saved.get(name)) or not is_own_code(value)


def _check_own_code(entries: Sequence[Entry], given: Mapping[str, Any]) -> None:
    """Raises UsageError for code that is given and that no run has."""
    for name in ("learner", "loss"):
        saved = [s.trained.get(name) for e in entries for s in e.runs.values() if s.source]
        if is_own_code(given.get(name, "")) and not any(map(is_own_code, saved)):
            raise UsageError(
                f"--{name} {given[name]}: none of the runs has code of your own there: leave it out"
            )


# ---- whether they can be paired ------------------------------------------------------------------


def check_same_tasks(entries: Sequence[Entry]) -> None:
    """Raises UsageError where the tasks are not the same, or what is measured on them."""
    named = [(e.name, s.config) for e in entries for s in e.runs.values()]
    first_name, first = named[0]
    for name, config in named[1:]:
        different = [
            n for n, value in _what_is_measured(first).items() if value != _what_is_measured(config)[n]
        ]
        if not different:
            continue
        said = [
            ", ".join(f"{flag} {value}" for flag, value in in_words(each, different).items())
            for each in (first, config)
        ]
        hints = [TASKS.get(n) for n in different]
        advice = (
            f"give {' and '.join(filter(None, hints))}" if all(hints) else "compare runs of one kind of task"
        )
        raise UsageError(
            f"--compare: {first_name} ({said[0]}) and {name} ({said[1]}) have other tasks, which cannot be "
            f"paired: {advice}"
        )


def check_shared_seeds(entries: Sequence[Entry]) -> None:
    """Raises UsageError where several runs have no seed of the first."""
    first = entries[0]
    for entry in entries[1:]:
        if not paired.shared_seeds(entry.runs, first.runs):
            raise UsageError(
                f"--compare: {first.name} and {entry.name} have no seed in common, and cannot be paired: "
                "name one run of each"
            )


def _what_is_measured(config: Config) -> dict[str, Any]:
    """The settings that decide what the tasks are and, of a regression, what is measured on them."""
    found = {name: config.get(name) for name in TASKS}
    for name in ("loss", "loss_args"):
        found[name] = None if config.tasks.classification else config.get(name)
    kind, colon, path = config.tasks.dataset.partition(":")
    if kind in FILE_KINDS and colon:
        found["dataset"] = f"{kind}:{os.path.realpath(path)}"
    return found

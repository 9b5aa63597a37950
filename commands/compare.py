"""Compare trained runs (--compare): find them, check that they can be paired, measure them on the same tasks.

    folders and checkpoints -> sides {name: {seed: Subject}} -> evaluations -> tables, JSON, picture

A side is a run, or the runs of one setting by seed. Nothing is trained and nothing is written but the
results, so a run that is still being trained can take part.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.build import make_writable, prepare
from commands.call import Call
from commands.config import show
from commands.evaluate import Subject, summarise
from commands.names import describe_settings, select_meaningful
from commands.resolve import select_learned
from common.errors import UsageError, escape_text
from common.names import as_file_name
from evaluation import meta_test, paired
from evaluation.figures import comparison_figure, write_results
from evaluation.tables import Curve
from training.folders import BEST, LAST, find_checkpoint, find_runs

LONGEST_NAMES = 100  # characters of the sides' names in a file name

# Settings that decide the tasks and, for regression, the measure on them
TASKS = (
    *("dataset", "dataset_args", "ways", "shots", "queries", "noise"),
    *("omniglot_split", "icons_split", "quarter_turns", "split_shares", "columns"),
    *("exclude_columns", "min_examples", "image_range"),
)
MEASURE = ("loss", "loss_args", "standardise")
Runs = dict[int, Subject]  # one side of the comparison, by seed


def compare(call: Call, flags: Mapping[str, Any], command: str) -> None:
    """Measure the runs of --compare on the same tasks; print tables, write a record and a picture."""
    runs = read_sides(call, flags)
    check_pairs(runs)
    subjects = [subject for side in runs.values() for subject in side.values()]
    number = min(subject.config.evaluation.eval_tasks for subject in subjects)
    for subject in subjects:
        subject.config = subject.config.replace_settings(eval_tasks=number)
    chosen_by = max(subject.trained.training.val_tasks for subject in subjects)  # of best.pt
    first_task = chosen_by if call.split == "validation" else 0
    first = Path(call.compare[0])
    folder = make_writable(call.out or (first if first.is_dir() else first.parent).parent)
    names = as_file_name("-vs-".join(runs))
    if len(names) > LONGEST_NAMES:
        names = f"{names[: LONGEST_NAMES - 9]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    caption, tasks = summarise(subjects, call.split)
    stem = folder / f"comparison-{names}-{tasks}"
    device = prepare(subjects[0].config, call).describe()
    print(f"Comparing on {caption.title}\n  device   {device}", flush=True)
    curves = {}
    for subject in subjects:
        print(f"Measuring {subject.name}", flush=True)
        subject.build(call)
        subject.check_measure(subjects[0], same_loss=True)
        subject.evaluate(call.split, first_task=first_task)
        curves[subject] = subject.curves()
    caption, _ = summarise(subjects, call.split)  # with the loss's name, now that the data are known
    sides = [_make_side(name, side, curves) for name, side in runs.items()]
    print(f"\n{paired.settings_table(sides)}\n")
    which = f"{call.split} tasks" + ", none of which chose a checkpoint" * bool(first_task)
    print(paired.differences_table(sides, caption.loss_name, which))
    result = {
        "command": command,
        "split": call.split,
        "tasks": number,
        "first_task": first_task,
        "tasks_seed": meta_test.SEED,
        "measure": sides[0].results.measure(caption.loss_name),
        "sides": paired.record(sides),
        "runs": [
            {"name": name, "seed": seed, **run.record(), "split": call.split, "curves": curves[run]}
            for name, side in runs.items()
            for seed, run in side.items()
        ],
    }
    print(write_results(stem, result, comparison_figure(sides, caption)))


def _make_side(name: str, runs: Runs, curves: Mapping[Subject, dict[str, Any]]) -> paired.Side:
    """Return a side with the results and the validation curves of its runs."""
    subject = next(iter(runs.values()))
    saved, config = subject.trained, subject.config
    learned = {*select_learned(saved), "iterations"} - {"seed"}
    words = describe_settings(saved, [setting for setting in select_meaningful(saved) if setting in learned])
    measure = f"query_{subject.result.measure}"
    validation: dict[int, Curve] = {}
    for seed, run in runs.items():
        curve = curves[run]["validation"]
        validation[seed] = (curve["iteration"], curve[measure]) if measure in curve else ([], [])
    results = {seed: run.result for seed, run in runs.items()}
    steps = config.evaluation.test_steps
    return paired.Side(name, words, validation, results, config.choices.query_norm, steps)


def read_sides(call: Call, flags: Mapping[str, Any]) -> dict[str, Runs]:
    """Return the sides of --compare, named by path: a run, or each setting of a folder of many runs."""
    sides: dict[str, Runs] = {}
    paths = [Path(path).resolve() for path in call.compare]
    drives = {path.drive for path in paths}  # of Windows
    common = os.path.commonpath(paths) if len(drives) == 1 else ""
    for path in map(Path, call.compare):
        below = os.path.relpath(path.resolve(), common) if common else str(path.resolve())
        below = below.removesuffix(".pt").removeprefix(".")
        listed = find_runs(path) or [{"setting": "", "file": find_checkpoint(path, BEST, LAST)}]
        for setting in dict.fromkeys(run["setting"] for run in listed):
            name = escape_text(f"{below} {setting}".strip() or path.resolve().name)
            if name in sides:
                raise UsageError(f"--compare names {name} twice")
            subjects = [Subject.read(r["file"], call, flags) for r in listed if r["setting"] == setting]
            sides[name] = {subject.trained.training.seed: subject for subject in subjects}
    if len(sides) < 2:
        raise UsageError(f"--compare {call.compare[0]}: that is one setting: name another to compare it to")
    return sides


def check_pairs(sides: Mapping[str, Runs]) -> None:
    """Raise UsageError where sides differ in tasks or (in regression) loss, or share no seed."""
    (first_name, first), *others = sides.items()
    config = next(iter(first.values())).config
    measured = TASKS if config.tasks.classification or config.evaluation.metric else TASKS + MEASURE
    for name, runs in others:
        other = next(iter(runs.values())).config
        different = [setting for setting in measured if config.get(setting) != other.get(setting)]
        if different:
            words = (describe_settings(c, different).items() for c in (config, other))
            one, two = (", ".join(map(" ".join, settings)) for settings in words)
            raise UsageError(
                f"--compare: {first_name} ({one}) and {name} ({two}) have different tasks, which cannot be "
                "paired: give -k, -q, -n or --eval-dataset if they differ in these alone"
            )
        metrics = [(c.evaluation.metric, c.evaluation.metric_mode) for c in (config, other)]
        if metrics[0] != metrics[1]:
            raise UsageError(
                f"--compare: {first_name} has --metric {show(metrics[0][0])}, and {name} has "
                f"{show(metrics[1][0])}: give one for all, --metric NAME"
            )
        if not paired.shared_seeds(runs, first):
            raise UsageError(f"--compare: {first_name} and {name} have no seed in common: name a run of each")

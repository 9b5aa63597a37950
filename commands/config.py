"""Compose the options of all wings into the settings of one experiment, and write and read them as data.

    flags -> parser -> resolve -> Config(tasks, learner, choices, training, evaluation)

Each group is declared by the wing that uses it and handed down alone; only commands see all of them. The
standard library alone.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.choices import Choices
from common.errors import UsageError
from common.options import BY_DATASET, BY_LEARNER, BY_RULE, Flag, flags_of
from evaluation.options import EvaluationOptions
from learners.options import LearnerOptions
from tasks.options import TaskOptions
from training.options import TrainingOptions

SECTIONS: dict[str, type] = {
    "tasks": TaskOptions,
    "learner": LearnerOptions,
    "choices": Choices,
    "training": TrainingOptions,
    "evaluation": EvaluationOptions,
}
CONFIG_FLAGS: dict[str, Flag] = {}
SECTION_OF: dict[str, str] = {}  # by name of the setting
for _section, _options in SECTIONS.items():
    CONFIG_FLAGS |= flags_of(_options)
    SECTION_OF |= dict.fromkeys(flags_of(_options), _section)

GROUPS = (
    "what to do", "tasks", "learner", "algorithm", "inner loop", "outer loop", "evaluation", "logging",
    "files", "machine",
)  # fmt: skip
OWN_CODE = ("learner", "dataset", "loss")  # settings that may name the user's code
MOST_SHOWN = 6  # values of one setting, when several runs are described


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an experiment, every default resolved. Saved in its checkpoints."""

    tasks: TaskOptions
    learner: LearnerOptions
    choices: Choices
    training: TrainingOptions
    evaluation: EvaluationOptions

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Config:
        """Compose the groups from a flat dictionary by name of the setting."""
        sections: dict[str, Any] = {
            section: options(**{name: values[name] for name in values if SECTION_OF[name] == section})
            for section, options in SECTIONS.items()
        }
        return cls(**sections)

    def values(self) -> dict[str, Any]:
        """Return all settings, flat, by name: what a checkpoint holds."""
        return {name: self.get(name) for name in CONFIG_FLAGS}

    def get(self, name: str) -> Any:
        """Return a setting by its name, whichever group it is in."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    def replaced(self, **changes: Any) -> Config:
        """Return the settings with some changed, by name, whichever group they are in."""
        sections = {
            section: dataclasses.replace(
                getattr(self, section), **{n: v for n, v in changes.items() if SECTION_OF[n] == section}
            )
            for section in {SECTION_OF[name] for name in changes}
        }
        return dataclasses.replace(self, **sections)

    @property
    def training_shots(self) -> int:
        """Support examples of a training task, per class in classification."""
        tasks = self.tasks
        if self.choices.meta_gradient == "reptile":  # whose pool has the query examples as well
            return (tasks.train_shots or tasks.shots + tasks.queries) - tasks.queries
        return tasks.train_shots or tasks.shots


# ---- to and from a checkpoint --------------------------------------------------------------------


def config_from_plain(values: Any) -> Config:
    """Return the settings that a checkpoint holds; one that it lacks takes its default.

    Raises UsageError for unknown settings, for values that no flag allows, and for contradictions.
    """
    from commands.rules import check

    if not isinstance(values, dict):
        raise UsageError("its settings are missing")
    unknown = sorted(map(str, values.keys() - CONFIG_FLAGS.keys()))
    if unknown:
        names = ", ".join(unknown)
        raise UsageError(f"its settings {names!r:.60} are unknown; a newer version may know them")
    complete = {name: flag.default for name, flag in CONFIG_FLAGS.items()} | values
    for name, flag in CONFIG_FLAGS.items():
        value = complete[name]
        if value in (BY_DATASET, BY_LEARNER, BY_RULE):
            raise UsageError(f"its setting {name} is missing")
        problem = flag.problem(value)
        if flag.default is BY_RULE and value == "auto":
            problem = "settled"
        if problem:
            raise UsageError(f"its setting {name} should be {problem}, not {value!r}"[:200])
    config = Config.from_values(complete)
    check(config, {})
    return config


def config_of(plain: Any, source: Path | None) -> Config:
    """Return the settings of a checkpoint; a UsageError names its file."""
    try:
        return config_from_plain(plain)
    except UsageError as error:
        raise UsageError(" ".join(f"{source} cannot be used: {error}".split())) from error


# ---- in words ------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """Return a setting's value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)


def meaningful(config: Config) -> dict[str, Any]:
    """Return the settings that have a meaning with these data and this learner, by name."""
    from commands.rules import ONLY

    return {
        name: config.get(name)
        for name, flag in CONFIG_FLAGS.items()
        if flag.only is None or ONLY[flag.only](config) is None
    }


def in_words(config: Config, names: Iterable[str]) -> dict[str, str]:
    """Return some settings as people read them, by name of the flag."""
    return {CONFIG_FLAGS[name].name: show(config.get(name)) for name in names}


def by_flag(config: Config) -> dict[str, Any]:
    """Return all settings by name of the flag."""
    return {flag.name: config.get(name) for name, flag in CONFIG_FLAGS.items()}


def describe(*configs: Config) -> str:
    """Return the meaningful settings of one run or several, a line per group; of several, every value."""
    values: dict[str, list[Any]] = {}
    for config in configs:
        for name, value in meaningful(config).items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)

    def show_all(name: str) -> str:
        shown = [str(value) if name == "seed" else show(value) for value in values[name]]
        if len(shown) > MOST_SHOWN:
            return f"{shown[0]}, {shown[1]}, ... {shown[-1]} ({len(shown)} values)"
        return ", ".join(shown)

    lines = []
    for group in GROUPS:
        shown = [
            f"{name.replace('_', ' ')} {show_all(name)}"
            for name, flag in CONFIG_FLAGS.items()
            if flag.group == group and any(value not in (None, ()) for value in values.get(name, ()))
        ]
        if shown:
            text = textwrap.fill(" · ".join(shown), 96, subsequent_indent=" " * 14)
            lines.append(f"  {group:<11} {text}")
    return "\n".join(lines)

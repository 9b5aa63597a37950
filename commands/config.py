"""Compose the options of all wings into the settings of one experiment.

    flags -> parser -> resolve -> Config(tasks, learner, choices, training, evaluation)

Each group is declared by the wing that uses it and handed down alone; only commands see all of them.
The standard library alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints

from common.choices import Choices
from common.options import Flag, flags_of
from common.sizes import Size, Span, find_largest
from evaluation.options import EvaluationOptions
from learners.options import LearnerOptions
from tasks.options import TaskOptions
from training.options import TrainingOptions

GROUPS = (
    *("what to do", "tasks", "learner", "algorithm", "inner loop", "outer loop"),
    *("evaluation", "logging", "files", "machine"),
)
OWN_CODE = ("learner", "dataset", "loss", "metric")  # settings that may name the user's code


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
        sections: dict[str, Any] = {section: {} for section in SECTIONS}
        for name, value in values.items():
            sections[SECTION_OF[name]][name] = value
        return cls(**{section: SECTIONS[section](**values) for section, values in sections.items()})

    def values(self) -> dict[str, Any]:
        """Return all settings, flat, by name: what a checkpoint holds."""
        return {name: self.get(name) for name in CONFIG_FLAGS}

    def get(self, name: str) -> Any:
        """Return a setting by its name, whichever group it is in."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    def replace_settings(self, **changes: Any) -> Config:
        """Return the settings with some changed, by name, whichever group they are in."""
        return Config.from_values(self.values() | changes)

    @property
    def training_shots(self) -> Size:
        """Support examples of a training task, per class in classification."""
        tasks = self.tasks
        if self.choices.meta_gradient == "reptile" and tasks.train_shots:  # which has the query ones as well
            least, most = Span.of(tasks.train_shots)
            return Span(least - find_largest(tasks.queries), most - find_largest(tasks.queries)).size
        return tasks.train_shots or tasks.shots


SECTIONS: dict[str, type] = get_type_hints(Config)
CONFIG_FLAGS: dict[str, Flag] = {}
SECTION_OF: dict[str, str] = {}  # by name of the setting
for _section, _options in SECTIONS.items():
    CONFIG_FLAGS |= flags_of(_options)
    SECTION_OF |= dict.fromkeys(flags_of(_options), _section)


def show(value: Any) -> str:
    """Return a setting's value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)

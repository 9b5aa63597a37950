"""How a flag is declared: its names, meaning, default and check, in the metadata of a dataclass field."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Check = Callable[[Any], str | None]  # what was expected, where the value is not that


def at_least(minimum: int, most: int = 2**31 - 1) -> Check:
    def check(value: int) -> str | None:
        if value > most:
            return "a whole number below 2^31" if most == 2**31 - 1 else f"a whole number up to {most:,}"
        return None if value >= minimum else f"a whole number of at least {minimum}"

    return check


def above_zero(value: float) -> str | None:
    return None if math.isfinite(value) and value > 0 else "a number above 0"


def minutes(value: float) -> str | None:
    return None if 0 < value <= 525_600 else "a number of minutes above 0, of a year at most"


def below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else "a number from 0 to below 1"


def not_negative(value: float) -> str | None:
    return None if math.isfinite(value) and value >= 0 else "a number that is not negative"


def one_of(*choices: str) -> Check:
    return lambda v: None if v in choices else f"one of {', '.join(choices)}"


def seed_range(value: int) -> str | None:
    return None if 0 <= value < 2**63 else "a whole number from 0 to 2^63 - 1"


def key_and_value(text: str) -> str | None:
    key, equals, _ = text.partition("=")
    return None if equals and key.isidentifier() else "NAME=VALUE"


def key_and_values(text: str) -> str | None:
    key, equals, values = text.partition("=")
    return None if equals and key and all(values.split(",")) else "FLAG=A,B,..."


def plain_text(text: str) -> bool:
    """Whether files, terminals and TensorBoard can have it: no control characters, no broken UTF-8."""
    return not any(c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c < "\ue000" for c in text)


PLAIN_TEXT = "text without control characters, in UTF-8"
KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "true or false",
    tuple: "a list",
}


@dataclass(frozen=True)
class Flag:
    """A flag's declaration, kept in the metadata of its field."""

    names: tuple[str, ...]
    group: str
    help: str
    kind: type
    check: Check | None
    metavar: str | None
    choices: tuple[str, ...] | None
    only: str | None  # where it means something: see `config.ONLY`
    free_on_resume: bool  # may differ from the checkpoint when a run goes on
    free_on_eval: bool  # may differ from the checkpoint in --eval
    optional: bool  # None is a value too
    before: Any  # in checkpoints that are older than the flag
    default: Any

    def problem(self, value: Any) -> str | None:
        """What was expected of the value, or None where it is all right; of a list, each item counts."""
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                return KIND_NAMES[tuple]
            if not all(map(plain_text, value)):
                return PLAIN_TEXT
            return next((p for p in map(self.check, value) if p), None) if self.check else None
        if self.kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return KIND_NAMES.get(self.kind, self.kind.__name__)
        if self.kind in (str, Path) and not plain_text(str(value)):
            return PLAIN_TEXT
        return self.check(value) if self.check else None

    def parse(self, text: str) -> Any:
        """The value of a flag's argument; an argparse `type`."""
        try:
            value = (text,) if self.kind is tuple else self.kind(text)
        except ValueError:
            value = None
        problem = KIND_NAMES.get(self.kind) if value is None else self.problem(value)
        if problem:
            raise argparse.ArgumentTypeError(f"expected {problem}, got {text!r}")
        return text if self.kind is tuple else value


BY_DATASET = object()  # the default stands in `presets.DEFAULTS`
BY_LEARNER = object()  # the default stands in `presets.LEARNERS`
BY_RULE = object()  # "auto" is the default and `resolve_auto` settles it
NOT_THERE = object()  # the flag is as old as the checkpoints' format


def flag(
    *names: str,
    group: str,
    help: str,
    kind: type,
    default: Any = BY_DATASET,
    check: Check | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    only: str | None = None,
    free_on_resume: bool = False,
    free_on_eval: bool = False,
    optional: bool = False,
    before: Any = NOT_THERE,
) -> Any:
    declaration = Flag(
        names=names,
        group=group,
        help=help,
        kind=kind,
        check=one_of(*choices) if choices else check,
        metavar=metavar,
        choices=choices,
        only=only,
        free_on_resume=free_on_resume,
        free_on_eval=free_on_eval,
        optional=optional,
        before=before,
        default=default,
    )
    if default in (BY_DATASET, BY_LEARNER, BY_RULE):
        return field(metadata={"flag": declaration})
    return field(default=default, metadata={"flag": declaration})


def flags_of(settings: type) -> dict[str, Flag]:
    return {f.name: f.metadata["flag"] for f in dataclasses.fields(settings)}

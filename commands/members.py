"""Expand --seeds and --sweep into runs: their flags, and the names of their folders.

The standard library alone: a mistake in these flags answers before PyTorch is imported.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.resolve import resolve
from common.errors import UsageError

MOST_RUNS = 1000
LONGEST_VALUE = 40  # characters of a value in a folder's name: the last ones, in which paths differ


@dataclass(frozen=True)
class Member:
    """One of many runs."""

    setting: str  # of the sweep, as part of a folder's name; runs of one setting differ in their seed alone
    seed: int
    given: dict[str, Any]  # the flags of this run

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return "_".join(filter(None, (self.setting, f"seed-{self.seed}")))

    @cached_property
    def config(self) -> Config:
        """The settings of the run when it starts afresh."""
        try:
            return resolve(self.given)
        except UsageError as error:
            raise UsageError(f"run {self.name}: {error}") from error


def members_of(call: Call, given: Mapping[str, Any]) -> list[Member]:
    """Return the runs that --seeds and --sweep ask for, setting by setting.

    Raises UsageError for an unknown flag or value, and for a combination that is no valid run.
    """
    run_seeds = [given.get("seed", CONFIG_FLAGS["seed"].default)]
    if call.seeds is not None:
        run_seeds = parse_seeds(call.seeds)
    axes = _parse_axes(call.sweep, given)
    number = len(run_seeds) * math.prod(map(len, axes.values()))
    if number > MOST_RUNS:
        raise UsageError(f"--seeds and --sweep ask for {number:,} runs: at most {MOST_RUNS:,}")
    members = []
    for choice in itertools.product(*axes.values()):
        values = {name: axes[name][text] for name, text in zip(axes, choice, strict=True)}
        words = [f"{CONFIG_FLAGS[n].name.lstrip('-')}-{text}" for n, text in zip(axes, choice, strict=True)]
        members += [Member("_".join(words), seed, {**given, **values, "seed": seed}) for seed in run_seeds]
    if len({member.config.tasks.classification for member in members}) > 1:
        raise UsageError("--sweep: regression and classification have no measure in common: sweep them apart")
    return members


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "0-7", "1,5,9" or both."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})(?:-([0-9]{1,19}))?\s*", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not low <= high < min(low + MOST_RUNS, 2**63):
            raise UsageError(f"--seeds {text}: {part} is no number or range, like 0-7 or 0,2,5-9")
        numbers += range(low, high + 1)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--seeds {text} names a seed twice")
    return numbers


def _parse_axes(sweep: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each swept setting by name, its values by their text in a folder's name."""
    by_flag = {flag.lstrip("-"): name for name, f in CONFIG_FLAGS.items() for flag in f.names}
    axes: dict[str, dict[str, Any]] = {}
    for text in sweep:
        key, _, values = text.partition("=")
        name = by_flag.get(key.strip().lstrip("-").replace("_", "-"), "")
        flag = CONFIG_FLAGS.get(name)
        if flag is None or name == "seed" or flag.kind is tuple:
            raise UsageError(f"--sweep {text}: {key} cannot be swept (of seeds, give --seeds)")
        if name in axes or name in given:
            raise UsageError(f"{flag.name} is given twice: give all of its values at once")
        try:
            parts = [flag.parse(part.strip()) for part in values.split(",")]
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--sweep {text}: {error}") from error
        axes[name] = {_folder_text(value): value for value in parts}
        if len(axes[name]) < len(parts):
            raise UsageError(f"--sweep {text} names a value twice, or two whose folders would have one name")
    return axes


def _folder_text(value: Any) -> str:
    text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return "".join(c if c.isalnum() or c in "-.+" else "-" for c in text)[-LONGEST_VALUE:]

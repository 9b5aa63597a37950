"""Many runs of one command line (--seeds, --sweep): which they are, and what each is called.

The standard library alone (see config.py).
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from commands.call import Call
from commands.config import CONFIG_FLAGS, Config
from commands.resolve import resolve
from common.errors import UsageError
from common.options import Flag
from tasks.options import CURVES

MOST = 1000  # runs of a command line
LONGEST = 40  # characters of a value in a folder's name, its last ones: paths differ there
LONGEST_NAME = 200  # bytes of that of a folder
SWITCHES = {"yes": True, "no": False}


@dataclass(frozen=True)
class Member:
    """One of many runs."""

    setting: str  # of the sweep, in words; runs of one setting differ in their seed alone
    seed: int
    given: dict[str, Any]  # the flags, as if they had been given for this run

    @property
    def name(self) -> str:
        """Of its folder."""
        return "_".join(filter(None, (self.setting, f"seed-{self.seed}")))

    @property
    def config(self) -> Config:
        return resolve(self.given)


def members_of(call: Call, given: Mapping[str, Any]) -> list[Member]:
    """The runs that --seeds and --sweep ask for, grid by grid; empty without these flags.

    Raises UsageError for what is no flag, or no value of it, or makes no valid run.
    """
    if call.seeds is None and not call.sweep:
        return []
    axes = [_axis(text) for text in call.sweep]
    names = [name for name, _ in axes]
    for name in names:
        flag = CONFIG_FLAGS[name].names[0]
        if names.count(name) > 1:
            raise UsageError(f"--sweep has {flag} twice: give all of its values at once")
        if name in given:
            raise UsageError(f"{flag} is given, and in --sweep too: give one of them")
    default = CONFIG_FLAGS["seed"].default
    seeds = seeds_of(call.seeds) if call.seeds is not None else [given.get("seed", default)]
    number = len(seeds) * math.prod(len(values) for _, values in axes)
    if number > MOST:
        raise UsageError(f"--seeds and --sweep ask for {number:,} runs: at most {MOST:,}")
    texts = {name: _texts(values) for name, values in axes}
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(names, values, strict=True))
        setting = "_".join(f"{_plain_name(CONFIG_FLAGS[n])}-{texts[n][v]}" for n, v in chosen.items())
        found += [Member(setting, seed, {**given, **chosen, "seed": seed}) for seed in seeds]
    for member in found:
        if len(member.name.encode()) > LONGEST_NAME:
            raise UsageError(f"--sweep of {len(axes)} flags makes names too long for a folder: sweep fewer")
        try:
            config = member.config
        except UsageError as error:
            raise UsageError(f"run {member.name}: {error}") from error
        if member.given.get("compile") == "on" and (call.runs_at_once or 1) > 1 and not compiles(config):
            raise UsageError(
                "--compile on: many runs at once are compiled where they learn from curves that are "
                "computed; leave it out, or --runs-at-once"
            )
    if len({member.config.tasks.classification for member in found}) > 1:
        raise UsageError("--sweep: regression and classification have no measure in common; sweep them apart")
    return found


def compiles(config: Config) -> bool:
    """Whether many runs at once can be compiled."""
    return config.tasks.dataset in CURVES and (
        config.training.tasks_at_once is None
        or config.training.tasks_at_once >= config.training.meta_batch_size
    )


def seeds_of(text: str) -> list[int]:
    """Seeds from "0-7", "1,5,9" or both."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--seeds {text}: expected numbers and ranges like 0-7 or 0,2,5-9")
        long = len(first + last) > 2 * len(str(2**63))
        low, high = (0, 2**63) if long else (int(first), int(last or first))
        if high < low or high - low >= MOST or high >= 2**63:
            raise UsageError(f"--seeds {text}: {part.strip()} is no range of up to {MOST:,} seeds below 2^63")
        found += range(low, high + 1)
        if len(found) > MOST:
            raise UsageError(f"--seeds {text}: more than {MOST:,} runs")
    if len(set(found)) < len(found):
        raise UsageError(f"--seeds {text} names a seed twice")
    return found


def _axis(text: str) -> tuple[str, list[Any]]:
    """A setting and its values, from "inner-lr=0.01,0.1"."""
    key, _, values = text.partition("=")
    key = key.strip().lstrip("-").replace("_", "-")
    by_name = {n.lstrip("-"): name for name, flag in CONFIG_FLAGS.items() for n in flag.names}
    name = by_name.get(key)
    if name is None:
        raise UsageError(f"--sweep {text}: {key} is no setting (all flags: --help)")
    if name == "seed":
        raise UsageError("--sweep seed: use --seeds")
    flag = CONFIG_FLAGS[name]
    found = [_value(flag, each.strip(), text) for each in values.split(",")]
    if len(set(map(repr, found))) < len(found):
        raise UsageError(f"--sweep {text} names a value twice")
    return name, found


def _value(flag: Flag, text: str, given: str) -> Any:
    if flag.kind is tuple:
        raise UsageError(f"--sweep {given}: a list of arguments cannot be swept")
    if flag.kind is bool:
        if text not in SWITCHES:
            raise UsageError(f"--sweep {given}: {flag.names[0]} is yes or no, not {text!r}")
        return SWITCHES[text]
    try:
        return flag.parse(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--sweep {given}: {error}") from error


def _plain_name(flag: Flag) -> str:
    return flag.names[0].lstrip("-")


def _texts(values: Sequence[Any]) -> dict[Any, str]:
    """Values of a setting as parts of a folder's name, each another, also where case makes no difference."""
    found: dict[Any, str] = {}
    for number, value in enumerate(values):
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        text = "".join(c if c.isalnum() or c in "-.+" else "-" for c in text)[-LONGEST:]
        there = {each.casefold() for each in found.values()}
        found[value] = f"{text}-{number}" if text.casefold() in there else text
    return found

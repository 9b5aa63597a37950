"""Expand --seeds and --sweep into runs: their flags, and the names of their folders.

The standard library alone: a mistake in these flags answers before PyTorch is imported.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from commands.call import Call, find_setting, suggest_flag
from commands.config import CONFIG_FLAGS, Config, show
from commands.resolve import resolve
from common.errors import UsageError
from common.names import as_file_name

MOST_RUNS = 1000
LONGEST_VALUE = 40  # characters of a value in a folder's name: the last ones, in which paths differ


def list_members(call: Call, flags: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Config]]:
    """Return the flags and the settings of each run that --seeds and --sweep ask for, by its folder's name.

    Raises UsageError for an unknown flag or value, and for a combination that is no valid run.
    """
    seeds = parse_seeds(call.seeds) if call.seeds else [flags.get("seed", CONFIG_FLAGS["seed"].default)]
    axes = _parse_axes(call.sweep, flags)
    number = len(seeds) * math.prod(map(len, axes.values()))
    if number > MOST_RUNS:
        raise UsageError(f"--seeds and --sweep ask for {number:,} runs: at most {MOST_RUNS:,}")
    members, configs = {}, {}
    for words, seed in itertools.product(itertools.product(*axes.values()), seeds):
        name = "_".join([*words, f"seed-{seed}"])
        swept = {setting: axes[setting][word] for setting, word in zip(axes, words, strict=True)}
        members[name] = {**flags, **swept, "seed": seed}
        try:
            configs[name] = resolve(members[name])
        except UsageError as error:
            raise UsageError(f"run {name}: {error}") from error
    if len({config.tasks.classification for config in configs.values()}) > 1:
        raise UsageError("--sweep: regression and classification have no measure in common: sweep them apart")
    return members, configs


def extract_setting(name: str) -> str:
    """Return the part of a run's name that says its setting in the sweep; the rest is the seed."""
    return name.rpartition("seed-")[0].removesuffix("_")


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "0-7", "1,5,9" or both."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})(?:-([0-9]{1,19}))?\s*", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not low <= high < min(low + MOST_RUNS, 2**63):
            raise UsageError(f"--seeds {text}: {part} is not a number or a range, like 0-7 or 0,2,5-9")
        numbers += range(low, high + 1)
    return list(dict.fromkeys(numbers))


def _parse_axes(sweep: Sequence[str], flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each swept setting by name, its values by their words in a folder's name."""
    axes: dict[str, dict[str, Any]] = {}
    for text in sweep:
        key, _, values = text.partition("=")
        name = find_setting(key) or ""
        flag = CONFIG_FLAGS.get(name)
        if flag is None or name in ("seed", "metric", "metric_mode") or flag.kind is tuple:
            hint = ": give --seeds" if name == "seed" else "" if name else suggest_flag(key)
            raise UsageError(f"--sweep {text}: {key} cannot be swept{hint}")
        if name in axes or name in flags:
            raise UsageError(f"{flag.name} is given twice: give all of its values at once")
        try:
            parts = [flag.parse(part.strip()) for part in values.split(",")]
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--sweep {text}: {error}") from error
        words = [as_file_name(show(value).replace(",", ""))[-LONGEST_VALUE:] for value in parts]
        axes[name] = {f"{flag.name.lstrip('-')}-{word}": v for word, v in zip(words, parts, strict=True)}
        if len(axes[name]) < len(parts):
            raise UsageError(f"--sweep {text} names a value twice, or two whose folders would have one name")
    return axes

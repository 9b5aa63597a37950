"""Put settings into words: for people, and in the names of folders, result files and titles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commands.config import CONFIG_FLAGS, GROUPS, OWN_CODE, Config, show
from commands.rules import what_makes_meaningless
from common.names import as_file_name, is_own_code, parse_name, split_mixture
from common.sizes import as_file_part
from tasks.options import TaskOptions


def select_meaningful(config: Config) -> dict[str, Any]:
    """Return the settings that have a meaning with these data and this learner, by name."""
    return {
        name: config.get(name)
        for name, flag in CONFIG_FLAGS.items()
        if what_makes_meaningless(flag, config) is None
    }


def in_words(config: Config, names: Iterable[str]) -> dict[str, str]:
    """Return some settings as people read them, by name of the flag."""
    return {CONFIG_FLAGS[name].name: show(config.get(name)) for name in names}


def describe(*configs: Config) -> str:
    """Return the settings of one or more runs, without those at plain defaults, one line per group."""
    meaningful = [select_meaningful(config) for config in configs]

    def show_all(name: str) -> str:
        values = [settings[name] for settings in meaningful if name in settings]
        plain = (None, ()) if CONFIG_FLAGS[name].common else (None, (), CONFIG_FLAGS[name].default)
        if all(value in plain for value in values):
            return ""
        shown = list(dict.fromkeys(str(value) if name == "seed" else show(value) for value in values))
        if len(shown) > 6:
            return f"{shown[0]}, {shown[1]}, ... {shown[-1]} ({len(shown)} values)"
        return ", ".join(shown)

    lines = []
    for group in GROUPS:
        shown = [
            f"{name.replace('_', ' ')} {words}"
            for name, flag in CONFIG_FLAGS.items()
            if flag.group == group and (words := show_all(name))
        ]
        if shown:
            text = textwrap.fill(" · ".join(shown), 96, subsequent_indent=" " * 14, break_on_hyphens=False)
            lines.append(f"  {group:<11} {text}")
    return "\n".join(lines)


def file_name(name: str) -> str:
    """Return a dataset's or a learner's name for a file name: a path's stem, or the factory's name."""
    kind, source, factory = parse_name(name)
    if not kind:
        return name
    if kind == "mixture":
        return "+".join(map(file_name, split_mixture(name)))[:60]
    return as_file_name(factory or f"{kind}-{Path(source).stem or 'data'}")[:60]


def task_words(tasks: TaskOptions) -> str:
    """Return ways and shots for a title: `5-way 1-shot`."""
    return f"{tasks.ways}-way {tasks.shots}-shot" if tasks.classification else f"{tasks.shots}-shot"


def task_size(tasks: TaskOptions) -> str:
    """Return ways and shots as a part of a file's name: `5way-1to10shot`."""
    shots = f"{as_file_part(tasks.shots)}shot"
    return f"{as_file_part(tasks.ways)}way-{shots}" if tasks.classification and tasks.ways else shots


def own_code_flags(config: Config) -> list[str]:
    """Return the flags that must be given again with a checkpoint of these settings."""
    return [
        part for name in OWN_CODE if is_own_code(config.get(name)) for part in (f"--{name}", config.get(name))
    ]

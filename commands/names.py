"""Name things after settings: folders, result files, titles, and the flags that a command must repeat."""

from __future__ import annotations

from pathlib import Path

from commands.config import OWN_CODE, Config
from common.own_code import is_own_code
from tasks.options import TaskOptions


def file_name(name: str) -> str:
    """Return a dataset's or a learner's name for a file name: a path's stem, or the factory's name."""
    kind, colon, path = name.partition(":")
    if not colon:
        return name
    last = name.rpartition(":")[2] if is_own_code(name) else f"{kind}-{Path(path).stem or 'data'}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last)[:60]


def task_size(tasks: TaskOptions) -> str:
    """Return ways and shots as a part of a file's name: `5way-1shot`."""
    return f"{tasks.ways}way-{tasks.shots}shot" if tasks.classification else f"{tasks.shots}shot"


def task_words(tasks: TaskOptions) -> str:
    """Return ways and shots for a title: `5-way 1-shot`."""
    return f"{tasks.ways}-way {tasks.shots}-shot" if tasks.classification else f"{tasks.shots}-shot"


def own_code_flags(config: Config) -> list[str]:
    """Return the flags that must be given again with a checkpoint of these settings."""
    return [
        part for name in OWN_CODE if is_own_code(config.get(name)) for part in (f"--{name}", config.get(name))
    ]

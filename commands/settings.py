"""Keep settings in a file: `settings.toml` in a run's folder, --config FILE and --print-config.

    commands      the command lines that began and resumed the run
    [given]       what they gave
    [resolved]    what it resolved to: every other setting that has a meaning

What a file gives counts as typed, and a flag wins over it. Of [resolved] only what this version would resolve
otherwise counts as well: the file repeats its run, and a flag such as --algorithm keeps its whole meaning.
No PyTorch.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from commands.call import ALL_FLAGS, CLASHES, find_setting, suggest_flag
from commands.config import Config
from commands.names import select_meaningful
from commands.resolve import refuse_unnamed_code, resolve
from common.errors import UsageError, describe_os_error
from common.options import Flag


def render_settings(
    command: str, flags: Mapping[str, Any], config: Config, earlier: Path | None = None
) -> str:
    """Return a run's settings as TOML; what an `earlier` file says of a resumed run is kept.

    What the command did, and the run's name, are no settings: repeating the file starts another run.
    """
    before = _load(earlier)[0] if earlier and earlier.is_file() else {}
    settings = {n: v for n, v in flags.items() if ALL_FLAGS[n].group != "what to do" and n != "run_name"}
    shown = before.get("given", {}) | as_toml(settings)
    resolved = {k: v for k, v in as_toml(select_meaningful(config)).items() if shown.get(k) != v}
    commands = [*dict.fromkeys([*before.get("commands", []), command])]
    return tomli_w.dumps({"commands": commands, "given": shown, "resolved": resolved})


def as_toml(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by the names of their flags, without the empty ones, which TOML does not have."""
    plain = {tuple: list, bool: bool, int: int, float: float}
    return {
        ALL_FLAGS[name].name.lstrip("-"): plain.get(type(value), str)(value)
        for name, value in values.items()
        if value not in (None, ())
    }


def read_settings(file: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a settings file gives together with the flags, which win over it.

    Raises UsageError, which names file and line, for what no flag would allow, and for the user's code that
    no flag names: nothing is imported because a file says so.
    """
    settings, resolved = _read(file)
    try:
        now = resolve(settings).values() if resolved else {}
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    settings |= {name: value for name, value in resolved.items() if now.get(name) != value}
    settings = {name: value for name, value in settings.items() if name not in _find_displaced(flags)}
    refuse_unnamed_code(settings, flags, str(file))
    return {**settings, **flags}


def add_lines(message: str, flags: Mapping[str, Any]) -> str:
    """Return an error's text with the lines of the settings file that its flags come from."""
    if "config" not in flags:
        return message
    file, lines = flags["config"], []
    values = {name: value for part in _read(file) for name, value in part.items()}
    for name, number in _number_lines(_load(file)[1]).items():
        from_file = name in values and values[name] == flags.get(name)
        if from_file and re.search(rf"(?<![\w-]){ALL_FLAGS[name].name}(?![\w-])", message):
            lines.append(f"line {number}")
    return f"{message} ({file}, {', '.join(lines)})" if lines else message


def _load(file: Path) -> tuple[dict[str, Any], str]:
    """Return a file's tables, and its text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return tomllib.loads(text), text
    except OSError as error:
        raise UsageError(f"{file}: {describe_os_error(error)}") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise UsageError(f"{file} is no TOML file: {error}") from error


def _number_lines(text: str) -> dict[str, int]:
    """Return the number of the first line of each setting, by its name."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line):
            lines.setdefault(find_setting(match[1]) or match[1], number)
    return lines


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file gives and what that resolved to, by name, each value valid by itself."""
    tables, text = _load(file)
    lines = _number_lines(text)
    parts: dict[str, dict[str, Any]] = {"given": {}, "resolved": {}}
    for title, value in tables.items():
        if title == "commands":
            continue
        in_part = title in parts and isinstance(value, dict)
        for key, item in (value if in_part else {title: value}).items():
            name = find_setting(key) or key
            place = f"{file}, line {lines[name]}" if name in lines else f"{file}"
            part = parts[title if in_part else "given"]
            if name not in ALL_FLAGS:
                raise UsageError(f"{place}: {key} is no setting{suggest_flag(key)}")
            flag = ALL_FLAGS[name]
            if flag.group == "what to do":
                raise UsageError(f"{place}: {key} says what to do and is no setting: type {flag.name}")
            if name in part:
                raise UsageError(f"{file}: {flag.name} is set twice: leave one out")
            try:
                part[name] = _parse(flag, item)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"{place}: {flag.name}: {error}") from error
    return parts["given"], parts["resolved"]


def _parse(flag: Flag, value: Any) -> Any:
    """Return a value of a file as the flag parses it."""
    if flag.kind is tuple:
        return tuple(flag.parse(str(item)) for item in (value if isinstance(value, list) else [value]))
    if flag.joint and isinstance(value, list):
        value = flag.joint.join(map(str, value))
    return flag.parse(str(value) if not isinstance(value, bool) else "yes" if value else "no")


def _find_displaced(flags: Mapping[str, Any]) -> set[str]:
    """Return the settings of a file that typed flags take the place of."""
    axes = {find_setting(axis.partition("=")[0]) for axis in flags.get("sweep", ())}
    pairs = [(firsts.split(), seconds.split()) for firsts, seconds, _ in CLASHES]
    pairs += [(["samples"], ["queries"])]
    names = {*flags, *filter(None, axes)}
    for one, other in pairs:
        names |= {*other} if flags.keys() & {*one} else set()
        names |= {*one} if flags.keys() & {*other} else set()
    return names

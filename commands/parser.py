"""Make the command line of the declared flags. The standard library alone.

`--help` shows the flags that most people use and the first clause of their texts; `--help-all` shows all.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from commands.call import ALL_FLAGS, CAN_BE_SWITCHED_OFF, find_setting, suggest_flag
from commands.config import CONFIG_FLAGS, GROUPS, show
from commands.presets import (
    DEFAULT_COLUMNS,
    DEFAULTS,
    HARMONIC_DEFAULTS,
    PRESETS,
    SINUSOID_DEFAULTS,
)
from commands.settings import read_settings
from common.errors import UsageError
from common.options import BY_RULE, Flag

EXAMPLES = """\
  train      python main.py --dataset omniglot -n 5 -k 1
  watch      tensorboard --logdir checkpoints
  evaluate   python main.py --eval --load checkpoints/RUN
  adapt      python main.py --adapt my-images/ --load checkpoints/RUN
  list       python main.py --list checkpoints
  compare    python main.py --compare checkpoints/RUN checkpoints/OTHER
"""
MORE = "Every flag, and the settings of each algorithm: --help-all"
WIDTH = 100  # of the help, at most


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Write flags in one column and their texts in another."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(WIDTH, shutil.get_terminal_size().columns - 1))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        metavar = "" if action.nargs == 0 or not action.metavar else f" {action.metavar}"
        return f"{', '.join(action.option_strings)}{metavar}{' ...' if action.nargs == '+' else ''}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (all flags: --help-all)")


def build_parser(*, every_flag: bool = False) -> argparse.ArgumentParser:
    """Return the parser; its help shows the flags that most people use, or every one."""
    parser = _Parser(
        prog="main.py",
        usage="python main.py [FLAGS]",
        description=f"Gradient-based meta-learning: MAML and its family, in PyTorch.\n\n{EXAMPLES}",
        epilog=presets_table() if every_flag else MORE,
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    add_to_first = groups["what to do"].add_argument
    add_to_first("-h", "--help", action="help", help="show the usual flags")
    add_to_first("--help-all", action="store_true", help="show every flag, and what each algorithm sets")
    for name, flag in ALL_FLAGS.items():
        metavar = flag.metavar or "{" + ",".join(flag.choices or ()) + "}"
        reading: dict[str, Any] = {"type": flag.parse, "metavar": metavar}
        if flag.kind is bool:
            switch = argparse.BooleanOptionalAction if name in CAN_BE_SWITCHED_OFF else "store_true"
            reading = {"action": switch}
        elif flag.kind is tuple:
            reading |= {"nargs": "+", "action": "extend"}
        elif flag.joint:
            reading["nargs"] = "+"
        elif flag.bare is not None:
            reading |= {"nargs": "?", "const": flag.bare}
        text = argparse.SUPPRESS
        if every_flag or flag.common:
            text = _help_text(name, flag, in_full=every_flag).replace("%", "%%")
        action = groups[flag.group].add_argument(*flag.names, dest=name, help=text, **reading)
        if names := flag.choices or flag.suggestions:
            action.completer = lambda names=names, **_: names  # type: ignore[attr-defined]
    return parser


def _help_text(name: str, flag: Flag, *, in_full: bool) -> str:
    """Return a flag's text, or its first clause, and its default."""
    text, parenthesis, default = flag.help.partition(" (default")
    text = text if in_full else text.partition("; ")[0]
    if parenthesis:
        return f"{text} (default{default}"
    if name in DEFAULTS:
        regression, few_ways, many_ways, other = map(show, DEFAULTS[name])
        for dataset, own in (("sinusoid", SINUSOID_DEFAULTS), ("harmonic", HARMONIC_DEFAULTS)):
            regression += f" ({dataset} {show(own[name])})" if name in own else ""
        drawings = few_ways if few_ways == many_ways else f"{few_ways} (above 10 ways {many_ways})"
        default = f"regression {regression}, omniglot and icons {drawings}, else {other}"
    elif flag.default is None or flag.default is False or flag.default == ():
        return text
    else:
        default = "auto" if flag.default is BY_RULE else show(flag.default)
    return f"{text} (default: {default})"


def parse(arguments: list[str]) -> dict[str, Any]:
    """Return the given flags by name of the setting, each valid by itself; raise UsageError otherwise.

    What the file of --config gives is among them.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    namespace, unknown = build_parser().parse_known_args(arguments)
    flags = vars(namespace)
    if flags.pop("help_all", False):
        build_parser(every_flag=True).print_help()
        sys.exit()
    if unknown:
        raise UsageError(_explain_unknown(unknown, flags))
    for name, value in flags.items():
        if value == []:  # argparse takes the argument of --flag=-- for the end of the flags
            raise UsageError(f"{ALL_FLAGS[name].name}: expected an argument, got '--'")
        elif ALL_FLAGS[name].joint:
            flags[name] = _join(ALL_FLAGS[name], value)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return read_settings(flags["config"], flags) if "config" in flags else flags


def _join(flag: Flag, values: Sequence[str]) -> str:
    """Return several arguments as one value; UsageError if they do not go together."""
    value = flag.joint.join(values)
    if problem := flag.problem(value):
        raise UsageError(f"{flag.name} {' '.join(values)}: expected {problem}")
    return value


def _complete() -> None:
    """Answer a shell that asks for completions, and end, where argcomplete is installed."""
    with suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(build_parser(every_flag=True))


def _explain_unknown(words: Sequence[str], flags: Mapping[str, Any]) -> str:
    """Return what to type instead of words that belong to no flag."""
    typos = [word.partition("=")[0] for word in words if word.startswith("-")]
    if typos:
        return f"there is no flag {typos[0]}{suggest_flag(typos[0])} (all flags: --help-all)"
    word, quoted = words[0], shlex.quote(words[0])
    for flag in ALL_FLAGS.values():
        if word in (flag.choices or flag.suggestions):
            return f"{word}: did you mean {flag.name} {word}?"
    if word.endswith(".toml"):
        return f"{word} belongs to no flag: type --config {quoted} to take settings from it"
    if not Path(word).suffix and len(Path(word).parts) < 2:
        hint = suggest_flag(word) if find_setting(word) else ""
        return f"{word} belongs to no flag{hint} (all flags: --help-all)"
    resume = "" if "eval" in flags else f"--load {quoted} to resume a run, or "
    return f"{word} belongs to no flag: type {resume}--eval --load {quoted} to measure it"


def presets_table() -> str:
    """Return the settings of each algorithm, by the columns of the defaults where these matter."""
    lines = [
        "Settings of each --algorithm (half: of --iterations); where they depend on the data:",
        f"  {' / '.join(DEFAULT_COLUMNS)}\n",
    ]
    for algorithm, row in PRESETS.items():
        columns = {name: value if isinstance(value, tuple) else (value,) for name, value in row.items()}
        cells = [f"{CONFIG_FLAGS[name].name} {'/'.join(map(show, v))}" for name, v in columns.items()]
        text = f"  {algorithm}: {', '.join(cells) or 'the defaults'}"
        lines += textwrap.wrap(text, WIDTH - 2, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines)

"""Declare options: frozen dataclasses whose fields carry their flag, their help text and their check.

Each wing declares the options that it uses; `commands/config.py` composes them into one `Config`, and
`commands/parser.py` makes the command line of them. The standard library alone, so that `--help` and a
mistake answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.sizes import Size, Span

Check = Callable[[Any], str | None]  # returns what was expected, or None for a good value


def expect(expected: str, holds: Callable[[Any], Any]) -> Check:
    """Return a check that says what was expected of a value for which `holds` is false."""
    return lambda value: None if holds(value) else expected


def at_least(minimum: int, maximum: int = 2**31 - 1) -> Check:
    def check(value: int) -> str | None:
        if value > maximum:
            return f"a whole number up to {maximum:,}"
        return None if value >= minimum else f"a whole number of at least {minimum}"

    return check


def sizes_from(minimum: int, maximum: int = 2**31 - 1) -> Check:
    """Return the check of a size, all of whose numbers are in these limits."""
    check_number = at_least(minimum, maximum)

    def check(size: Size) -> str | None:
        try:
            span = Span.of(size)
        except ValueError:
            return KIND_NAMES[Size]
        if isinstance(size, str) and not span.varies:
            return "a range LOW-HIGH, the first number below the second"
        return check_number(span.least) or check_number(span.most)

    return check


above_zero = expect("a number above 0", lambda x: math.isfinite(x) and x > 0)
below_one = expect("a number from 0 to below 1", lambda x: 0 <= x < 1)
not_negative = expect("a number that is not negative", lambda x: math.isfinite(x) and x >= 0)
seed_range = expect("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
key_and_value = expect("NAME=VALUE", lambda text: "=" in text and text.partition("=")[0].isidentifier())
key_and_values = expect("FLAG=A,B,...", re.compile("[^=]+=[^,]+(,[^,]+)*").fullmatch)
folder_name = expect(
    "a name for a folder", lambda text: text.strip(". ") and not {*text} & {"/", "\\"} and len(text) <= 100
)

KIND_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
KIND_NAMES |= {bool: "yes or no", tuple: "a list", Size: "a whole number, or a range LOW-HIGH"}
SWITCHES = {"yes": True, "no": False}
MOST_NAMES = 5  # that an error lists
CLOSE = 0.7  # similarity, from 0 to 1, of a misspelt name and the one that is suggested
# what files, terminals and TensorBoard cannot show: control characters, and what is no valid UTF-8
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# Defaults that are no single value:
BY_DATASET = object()  # `presets.DEFAULTS` has one for each kind of data
BY_LEARNER = object()  # `learners.options.LEARNERS` has one for each learner
BY_RULE = object()  # `resolve.resolve` replaces "auto" by what was measured


def list_names(names: Iterable[str]) -> str:
    """Return names with commas between; of many, the first ones."""
    first = [*names]
    return ", ".join(first[:MOST_NAMES]) + ", ..." * (len(first) > MOST_NAMES)


def find_nearest(text: str, names: Iterable[str]) -> str | None:
    """Return the name that a misspelt one probably means: the shortest that begins so, or the closest."""
    lower, names = text.lower(), [*names]
    begun = sorted((name for name in names if name.startswith(lower)), key=len)
    return next(iter(begun or difflib.get_close_matches(lower, names, 1, CLOSE)), None)


def parse_whole(text: str) -> int:
    """Return a whole number, also from `10,000` and `1e4`; ValueError for anything else."""
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or abs(number) > 2**53:  # above, a float is not exact
            raise
        return int(number)


def parse_size(text: str) -> Size:
    """Return a size, a whole number or a range of two; ValueError for anything else."""
    ends = re.fullmatch("([^-]+)-([^-]+)", text)
    return "-".join(str(parse_whole(end)) for end in ends.groups()) if ends else parse_whole(text)


@dataclass(frozen=True)
class Flag:
    """The declaration of one flag, kept in the metadata of its field."""

    names: tuple[str, ...]
    group: str  # heading in --help
    help: str
    default: Any = BY_DATASET
    check: Check | None = None
    choices: tuple[str, ...] | None = None
    suggestions: tuple[str, ...] = ()  # valid values by name, where `check` allows others too
    joint: str = ""  # several arguments make one value, with this between them
    metavar: str | None = None
    bare: Any = None  # the value where an optional argument is left out
    only: str | None = None  # where the flag has a meaning: a key of `rules.ONLY`
    free_on_resume: bool = False  # may differ from the checkpoint when a run is resumed
    free_on_eval: bool = False  # may differ from the checkpoint with --eval
    common: bool = False  # shown by --help; the others by --help-all alone
    kind: Any = str  # a type, from the field's annotation, as is `optional`
    optional: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    def problem(self, value: Any) -> str | None:
        """Return what was expected of a value, or None if it is valid; each item of a list counts."""
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            if not isinstance(value, tuple):
                return KIND_NAMES[tuple]
            item = dataclasses.replace(self, kind=str)
            return next((problem for problem in map(item.problem, value) if problem), None)
        if self.kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return KIND_NAMES[self.kind]
        if self.kind in (str, Path) and UNPRINTABLE.search(str(value)):
            return "text without control characters, in UTF-8"
        if self.choices and value not in self.choices:
            return f"one of {list_names(self.choices)}"
        return self.check(value) if self.check else None

    def parse(self, text: str) -> Any:
        """Return the value of a flag's argument; an argparse `type`."""
        try:
            readers: dict[Any, Callable[[str], Any]]
            readers = {bool: SWITCHES.get, int: parse_whole, Size: parse_size}
            value = (text,) if self.kind is tuple else readers.get(self.kind, self.kind)(text)
        except ValueError:
            value = None
        problem = KIND_NAMES[self.kind] if value is None else self.problem(value)
        if problem:
            names = self.choices or self.suggestions if re.fullmatch(r"[\w+-]+", text) else ()
            near = find_nearest(text, names)
            hint = f"there is no {text!r}; did you mean {near}?"
            raise argparse.ArgumentTypeError(hint if near else f"expected {problem}, got {text!r}")
        return text if self.kind is tuple else value


def flag(*names: str, in_python: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """Return a dataclass field that carries a `Flag` of these names and attributes.

    `in_python` is the field's default where the command line's depends on other settings.
    """
    declaration = Flag(names, **declared)
    by_others = declaration.default in (BY_DATASET, BY_LEARNER, BY_RULE)
    return field(default=in_python if by_others else declaration.default, metadata={"flag": declaration})


def flags_of(options: type) -> dict[str, Flag]:
    """Return the flags of a dataclass by field name, with the kinds that the annotations say."""
    hints = typing.get_type_hints(options)
    flags = {}
    for option in dataclasses.fields(options):
        hint = hints[option.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        parts = [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
        kind = functools.reduce(operator.or_, parts)
        declaration = option.metadata["flag"]
        flags[option.name] = dataclasses.replace(declaration, kind=kind, optional=type(None) in kinds)
    return flags

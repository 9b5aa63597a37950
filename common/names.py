"""Parse the names that flags take, once for learners, datasets and losses. The standard library alone."""

from __future__ import annotations

from typing import NamedTuple

PREFIXES = ("images", "table", "torchvision")
AND = " + "  # between the data sets of a mixture


class Name(NamedTuple):
    kind: str  # one of `PREFIXES`; "code": the user's; "mixture": several; "": built in
    source: str  # path, model, module or file; of what is built in, the name
    factory: str = ""  # of the user's code


def parse_name(name: str) -> Name:
    """Return the parts of `sinusoid`, `images:FOLDER`, `torchvision:MODEL` or `file.py:factory`."""
    if AND in name:
        return Name("mixture", name)
    prefix, colon, rest = name.partition(":")
    if not colon or prefix in PREFIXES:
        return Name(prefix, rest) if colon else Name("", name)
    source, _, factory = name.rpartition(":")
    return Name("code", source, factory)


def split_mixture(dataset: str) -> tuple[str, ...]:
    """Return the names of the data sets in `omniglot + icons`; of a single one its own."""
    return tuple(dataset.split(AND))


def as_file_name(text: str) -> str:
    """Return a text with dashes in place of what no file's name should have."""
    return "".join(c if c.isalnum() or c in "-_.+=" else "-" for c in text)


def is_own_code(name: str | None) -> bool:
    return name is not None and parse_name(name).kind == "code"


def check_code_name(name: str, others: str) -> str | None:
    """Return what was expected of a name, `others` or code; None if it has the form of the user's code."""
    if name.endswith(".py"):
        return "the name of a function or class after a colon, as in file.py:factory"
    kind, module, factory = parse_name(name)
    in_module = all(part.isidentifier() for part in module.split(".")) or module.endswith(".py")
    good = kind == "code" and in_module and factory.isidentifier()
    return None if good else f"one of {others}, package.module:factory, file.py:factory"

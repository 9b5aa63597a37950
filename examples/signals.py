#!/usr/bin/env python3
"""Write a set of labelled signals as a table that `--dataset table:` reads: a row each, a column a channel.

pip install aeon                # its package holds some sets; --no-deps is enough
python examples/signals.py JapaneseVowels_eq vowels.parquet
python main.py --dataset table:vowels.parquet --columns class=label --learner conv1d \
    --learner-args signals=12 -n 2 -k 5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet


def find_files(name: str) -> list[Path]:
    """Return the .ts files of a set in the package aeon, or of a folder, such as one of the UCR archive."""
    package = find_spec("aeon")
    folder = Path(name)
    if not folder.is_dir() and package and package.origin:
        folder = Path(package.origin).parent / "datasets" / "data" / name.removesuffix("_eq")
    files = sorted(folder.glob("*.ts"))
    equal = [file for file in files if "_eq_" in file.name]
    return equal if name.endswith("_eq") else [file for file in files if file not in equal]


def read_signals(file: Path) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield the label and the channels of each case; ValueError where channels differ in length."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line and line[0] not in "@#":
            *channels, label = line.split(":")
            yield label, [np.array(channel.split(","), np.float32) for channel in channels]


def write_table(name: str, path: Path) -> str:
    """Write the table, and return its sizes in words; ValueError if there are no signals of one length."""
    cases = [case for file in find_files(name) for case in read_signals(file)]
    if not cases:
        raise ValueError(f"{name} is neither a folder with .ts files nor a set in the package aeon")
    labels, signals = zip(*cases, strict=True)
    sizes = {(len(channels), *map(len, channels)) for channels in signals}
    if len(sizes) > 1:
        raise ValueError(f"{name} has signals of different lengths: take a set of one length (NAME_eq)")
    channels = zip(*signals, strict=True)
    columns = {f"channel {number}": [*values] for number, values in enumerate(channels, 1)}
    parquet.write_table(pa.table({"label": labels, **columns}), path)
    length = len(signals[0][0])
    return f"{len(labels):,} cases of {len({*labels})} classes, {len(columns)} channels x {length}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="a folder of .ts files, or a set that the package aeon holds")
    parser.add_argument("path", type=Path, help="the Parquet file to write")
    options = parser.parse_args()
    try:
        print(write_table(options.name, options.path))
    except (OSError, ValueError) as error:
        parser.error(str(error))

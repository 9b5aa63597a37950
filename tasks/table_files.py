"""Read the columns of a user's CSV or Parquet file: path -> `TableFile` -> numbers, or names by row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UsageError, fold_message
from tasks.file_tasks import LFS_POINTER, explain

SEPARATORS = (",;\t|", ":~^#&!/\x1f ")  # the second where none of the first fits; a space may be repeated
SNIFFED = 50  # lines
MISSING = ("?",)  # besides pyarrow's: nothing, NA, N/A, nan, null, ...
NUMBER = r"^[+-]?[\d.,]+([eE][+-]?\d+)?$"
MAY_BE_THOUSANDS = r"^[+-]?[1-9]\d{0,2},\d{3}$"


def find_separator(lines: list[str]) -> str:
    """Return the character that divides all lines into most fields, quotes respected; "," if none does."""
    for marks in SEPARATORS:
        fields: dict[str, int] = {}
        ragged: dict[str, int] = {}
        for mark in marks:
            rows = csv.reader(lines, delimiter=mark, skipinitialspace=mark == " ")
            sizes = [len(row) for row in rows if row]
            if sizes and sizes[0] > 1:
                (fields if len({*sizes}) == 1 else ragged)[mark] = sizes[0]
        if fields or ragged:  # a ragged line is named by the reader
            return max(fields or ragged, key=(fields or ragged).__getitem__)
    return ","


@dataclass(frozen=True)
class TableFile:
    """A file's columns: text where it is CSV, trimmed, null where missing."""

    path: Path
    data: Any  # pyarrow.Table

    @classmethod
    def open(cls, path: Path) -> TableFile:
        """Read a .parquet file, or text with any separator; UsageError if it is neither."""
        import pyarrow as pa  # slow to import, and for tables alone
        from pyarrow import parquet

        if not path.is_file():
            problem = "is a folder: name a file in it" if path.is_dir() else "there is no such file"
            raise UsageError(f"{path}: {problem}")
        try:
            if path.suffix.lower() == ".parquet":
                return cls(path, parquet.read_table(path, partitioning=None))  # folders' names are no columns
            with pa.input_stream(path) as stream:  # unpacks .gz
                return cls(path, _parse(stream.read()))
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = explain(path, error)
            raise UsageError(f"{path} is not readable ({reason}): mend it, or save it as UTF-8") from error

    def fail(self, name: str, row: int, problem: str) -> UsageError:
        """Return an error about a cell; rows are counted from 1, without the header."""
        return UsageError(f"{self.path}: column {name!r}, data row {row}{problem}")

    def numbers(self, names: Sequence[str], others: Sequence[str]) -> Tensor:
        """Return columns as float64 `[rows, columns]`, NaN where missing; each element of a list is one.

        The decimal mark is the same in `others`, the table's other numbers.
        """
        flat = {name: self._flatten_lists(name) for name in (*names, *others)}
        columns = self._without_decimal_commas({name: column for name, (column, _) in flat.items()})
        parts = []
        for name in names:
            width = flat[name][1]
            values = self._cast(name, columns[name], "float64", width).to_numpy(zero_copy_only=False)
            parts.append(torch.tensor(values).view(-1, width))
        return torch.cat(parts, 1)

    def check_finite(self, names: Sequence[str], values: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
        """Raise UsageError for the first of these rows with a missing number, or one infinite in `dtype`."""
        bad = (~values.to(dtype).isfinite() & rows[:, None]).nonzero()
        if len(bad):
            row, position = bad[0].tolist()
            columns = [name for name in names for _ in range(self._flatten_lists(name)[1])]
            way = "mend it, or leave the column or the row out"
            problem = f" is empty, infinite or too large for {dtype}: {way}"
            raise self.fail(columns[position], row + 1, problem)

    def names(self, name: str, filled: Tensor | None = None) -> tuple[list[str], Tensor]:
        """Return a column's names in order of appearance, and each row's int64 position, -1 where missing.

        Rows marked in `filled` must have one. Numbers of classes become their names where the file has some
        (Hugging Face's `ClassLabel`).
        """
        import pyarrow as pa
        from pyarrow import compute

        column, classes = self.data.column(name), class_labels(self.data.schema, name)
        if pa.types.is_floating(column.type):
            column = compute.if_else(compute.is_nan(column), None, column)
        texts = compute.utf8_trim_whitespace(self._cast(name, column, "string"))
        if classes:  # -1: the label of a test set that has none
            texts = pa.array([classes.get(text) for text in texts.to_pylist()], "string")
        encoded = compute.if_else(compute.equal(texts, ""), None, texts).dictionary_encode()
        positions = torch.tensor(encoded.indices.fill_null(-1).cast("int64").to_numpy())
        if filled is not None and (empty := filled & (positions < 0)).any():
            raise self.fail(name, int(empty.nonzero()[0]) + 1, " is empty: fill it")
        return encoded.dictionary.to_pylist(), positions

    def _flatten_lists(self, name: str) -> tuple[Any, int]:
        """Return a column's elements, out of lists of one size, nested or not, and their number in a row."""
        import pyarrow as pa
        from pyarrow import compute

        column, width = self.data.column(name), 1
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        while any(is_kind(column.type) for is_kind in kinds):
            sizes = compute.fill_null(compute.list_value_length(column), 0).to_numpy()
            usual = torch.tensor(sizes).mode().values.item() or 1
            if (bad := sizes != usual).any():
                row = int(bad.argmax()) // width + 1
                raise self.fail(name, row, f" has {sizes[bad.argmax()]} elements, others {usual}: mend it")
            width, column = width * int(sizes[0]), compute.list_flatten(column)
        return column, width

    def _without_decimal_commas(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return columns with points for decimal commas; UsageError where a comma may mean thousands."""
        import pyarrow as pa
        from pyarrow import compute

        commas: dict[str, Any] = {}  # the numbers with a comma, and with a point, by column
        points: dict[str, Any] = {}
        for name, column in columns.items():
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                numbers = column.filter(compute.match_substring_regex(column, NUMBER))
                for mark, cells in ((",", commas), (".", points)):
                    if len(marked := numbers.filter(compute.match_substring(numbers, mark))):
                        cells[name] = marked
        if not commas:
            return columns
        either = (compute.all(compute.match_substring_regex(c, MAY_BE_THOUSANDS)) for c in commas.values())
        if points or all(answer.as_py() for answer in either):
            name, cells = next(iter(commas.items()))
            others = f", and {next(iter(points))!r} has points" if points else ""
            question = "does the comma stand before decimals or between thousands? Write 1.5 and 1000"
            raise UsageError(f"{self.path}: column {name!r} has {cells[0].as_py()!r}{others}: {question}")
        return columns | {name: compute.replace_substring(columns[name], ",", ".") for name in commas}

    def _cast(self, name: str, column: Any, kind: str, width: int = 1) -> Any:
        try:
            return column.cast(kind, safe=False).combine_chunks()
        except (ValueError, NotImplementedError) as error:  # pyarrow's, which names any cell, and no row
            with suppress(ValueError, NotImplementedError):
                return column.cast("bool").cast(kind).combine_chunks()  # true and false, in any case
            position, problem = _find_failure(column, kind) or (0, fold_message(error))
            if "struct" in str(column.type) or "binary" in str(column.type):
                problem = "holds bytes; images are read with --dataset images:FILE"
            row = position // width + 1
            way = "mend it, or leave the column out with --exclude-columns"
            raise self.fail(name, row, f": {problem}: {way}") from error


def _parse(content: bytes) -> Any:
    """Return CSV text as a pyarrow.Table of strings."""
    import pyarrow as pa
    from pyarrow import compute
    from pyarrow import csv as arrow_csv

    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        content = content.decode("utf-16").encode()
    if content.startswith((b"PK", b"{", b"[", LFS_POINTER)) or b"\0" in content[: 1 << 16]:
        raise ValueError("it is no text with columns: save it as CSV or Parquet")
    start = content[: 1 << 16].decode("utf-8-sig", errors="replace").splitlines()[: SNIFFED + 1]
    mark = find_separator(start[:-1] or start)  # the last line may be cut
    if mark == " ":
        content = re.sub(rb"(?m)^[ \t]+|[ \t]+(?=\r?$)", b"", content)
        content = re.sub(rb"[ \t]+", b" ", content)
    form = arrow_csv.ParseOptions(delimiter=mark)
    with arrow_csv.open_csv(pa.BufferReader(content), parse_options=form) as reader:
        types = dict.fromkeys(reader.schema.names, pa.string())
    options = arrow_csv.ConvertOptions(column_types=types)
    data = arrow_csv.read_csv(pa.BufferReader(content), None, form, options)
    missing = pa.array([*options.null_values, *MISSING])
    texts = [compute.utf8_trim_whitespace(column) for column in data.columns]
    texts = [compute.if_else(compute.is_in(text, missing), None, text) for text in texts]
    return pa.table(texts, [name.strip() for name in data.column_names])


def class_labels(schema: Any, name: str) -> dict[str, str]:
    """Return the names of a Hugging Face `ClassLabel` column by number, as text; empty for other columns."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {str(number): str(label) for number, label in enumerate(features[name]["names"])}
    except (KeyError, TypeError, ValueError):
        return {}


def _find_failure(column: Any, kind: str) -> tuple[int, str] | None:
    """Return the position of the first cell that is not of this kind, and why, or None."""
    for position, cell in enumerate(column):
        try:
            cell.cast(kind, safe=False)
        except (ValueError, NotImplementedError) as error:
            return position, fold_message(error)
    return None

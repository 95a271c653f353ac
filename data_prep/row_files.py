"""Rows of JSON, CSV and Parquet files, and of Arrow tables."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from data_prep.compressed import READ_ERRORS, InputFile, named_damage
from data_prep.row import SourceRow, other_column
from megalite.errors import DataError

Names = Sequence[str]

_LONGEST_NAME = 40
CHOOSE = "rename one, or name another by finetune.data.text_column, label_column or the like"
BATCH = 1024  # rows


def json_rows(path: str, *, array: bool) -> Iterator[SourceRow]:
    """Yield a row for each line. If `array`, the file may also be one JSON list of rows."""
    with named_damage(path, (*READ_ERRORS, ValueError)), closing(InputFile(path)) as file:
        if array and file.bytes.peek().lstrip()[:1] == b"[":
            for number, value in enumerate(json.load(file.bytes)):
                yield _json_row(number, f"{path} row {number}", value)
            return
        number = 0
        for line_number, line in enumerate(file.bytes, 1):
            if line := line.strip():
                place = f"{path} line {line_number}"
                try:
                    row = _json_row(number, place, json.loads(line))
                except (ValueError, RecursionError) as error:
                    row = SourceRow(number, place, fault=f"not readable JSON: {error}")
                yield row
                number += 1


def _json_row(number: int, place: str, value: Any) -> SourceRow:
    if isinstance(value, dict):
        return SourceRow(number, place, value)
    return SourceRow(number, place, fault=f"{value!r:.40} is not a JSON object")


def csv_rows(path: str, columns: Names, optional: Names, delimiter: str) -> Iterator[SourceRow]:
    csv.field_size_limit(sys.maxsize)
    damage = (*READ_ERRORS, csv.Error)
    with named_damage(path, damage), _utf8(path), closing(InputFile(path)) as file:
        text = io.TextIOWrapper(file.bytes, "utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        header = reader.fieldnames or ()
        check_columns(path, header, columns, optional)
        for number, values in enumerate(reader):
            place = f"{path} row {number} (to line {reader.line_num})"
            count = len(header) - list(values.values()).count(None) + len(values.pop(None, ()))
            wrong = count != len(header)
            yield SourceRow(
                number, place, values, f"{count} fields, not {len(header)}" if wrong else ""
            )


@contextmanager
def _utf8(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        before = error.object[: error.start][-30:].decode("utf-8", "replace")
        raise DataError(
            f"{path}: byte 0x{byte:02x} after {before!r} is not UTF-8; save the file as UTF-8"
        ) from None


def parquet_rows(path: str, columns: Names, optional: Names) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = (OSError, pa.ArrowException, UnicodeDecodeError)
    with named_damage(path, damage), closing(pq.ParquetFile(path)) as table:
        read = check_columns(path, table.schema_arrow.names, columns, optional)
        batches = table.iter_batches(BATCH, columns=read, use_threads=False)
        yield from table_rows(path, batches)


def table_rows(path: str, tables: Iterator[Any]) -> Iterator[SourceRow]:
    values = (row for table in tables for row in table.to_pylist())
    return (SourceRow(n, f"{path} row {n}", row) for n, row in enumerate(values))


def _shown(name: str) -> str:
    """Return a column's name for a message, quoted and shortened if it is unusual."""
    plain = name.isprintable() and name == name.strip() and "," not in name
    return name if plain and len(name) <= _LONGEST_NAME else f"{name!r:.{_LONGEST_NAME}}"


def check_columns(path: str, names: Names, columns: Names, optional: Names = ()) -> list[str]:
    """Return the columns to read: `columns`, and those of `optional` that exist.

    Raises:
        DataError: one of `columns` is missing, or a name is not unique.
    """
    read = [*columns, *(column for column in optional if column in names)]
    for column in read:
        if (count := list(names).count(column)) != 1:
            problem = "several columns are named" if count else "no column"
            have = ", ".join(map(_shown, names)) or "none"
            choose = other_column(names) or f": {CHOOSE}"
            if len(names) == 1 and (separators := [s for s in ";\t|" if s in names[0]]):
                choose = f"; separate columns by commas (in .tsv by tabs), not by {separators[0]!r}"
            elif any(len(name) > _LONGEST_NAME or "\n" in name for name in names):
                choose = "; the first row must name the columns"
            raise DataError(f"{path}: {problem} {column!r}; it has {have}{choose}")
    return read

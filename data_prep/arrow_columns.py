"""Columns of text in Arrow tables, from Parquet files and the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_prep.compressed import BUFFER
from data_prep.records import Record, records, text_of_bytes
from megalite.errors import DataError

_MOST_ROWS = 1024


def rows_at_once(size: int, rows: int) -> int:
    """Return the number of rows that fill a buffer, if `rows` rows take `size` bytes."""
    return min(max(1, BUFFER * rows // max(size, 1)), _MOST_ROWS)


def check_column(schema: Any, text_field: str, name: str) -> None:
    """Raise DataError if a table's schema has no such column, or not one of text."""
    import pyarrow as pa

    if text_field not in schema.names:
        raise DataError(
            f"{name}: no column {text_field!r}; it has {', '.join(schema.names)}: choose one with "
            "--text-field"
        )
    if schema.names.count(text_field) > 1:
        raise DataError(f"{name}: several columns are named {text_field!r}; rename all but one")
    column_type = schema.field(text_field).type
    is_dictionary = pa.types.is_dictionary(column_type)
    stored = column_type.value_type if is_dictionary else column_type
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    if stored not in (*texts, pa.null()):
        raise DataError(
            f"{name}: column {text_field!r} has {column_type}, not strings; choose another with "
            "--text-field"
        )


def column_records(column: Any, place: str, first_row: int) -> Iterator[Record]:
    """Yield the documents in a column.

    Args:
        place: name of a row's place in messages, to which its number is added.
        first_row: number of the first row.
    """
    import pyarrow as pa

    # Bytes, because a column of strings may contain invalid UTF-8.
    values = column.cast(pa.large_binary()).to_numpy(zero_copy_only=False)
    return records(values, text_of_bytes, lambda number: f"{place} {first_row + number}")

"""Columns of text out of tables: Parquet by row groups, and those that `datasets` hands over."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.packed import BUFFER, naming
from data_prep.records import Record, records, text_of_bytes
from megalite.errors import DataError

_MOST_ROWS = 1024


class ParquetTable:
    """An open Parquet file.

    Memory holds some rows and the pages they lie in, and of a column that is encoded by a
    dictionary that too; never a row group.

    Raises:
        DataError: a file without a footer that can be read.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self._damage = path, (OSError, pa.ArrowException)
        with naming(path, self._damage):
            # with a buffer, and unless told to fetch ahead, pages are read as they are needed
            self._file = pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
            self.size = os.path.getsize(path)  # bytes on disk

    def parts(self, part_bytes: int) -> list[range]:
        """Row groups in parts; sizes are those of the footer, of all columns unpacked."""
        footer = self._file.metadata
        sizes = [footer.row_group(n).total_byte_size for n in range(footer.num_row_groups)]
        return group_sizes(sizes, part_bytes)

    def records(self, text_field: str, groups: Sequence[int] | None = None) -> Iterator[Record]:
        """The rows of some row groups, or of all, in order.

        Raises:
            DataError: no such column, or not of text; a file that is damaged.
        """
        footer = self._file.metadata
        check_column(self._file.schema_arrow, text_field, self.path)
        sizes = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
        groups = range(footer.num_row_groups) if groups is None else groups
        row = sum(sizes[: groups[0]]) if groups else 0
        names = [footer.schema.column(n).path for n in range(footer.num_columns)]
        column = names.index(text_field)
        asked: dict[str, Any] = {"columns": [text_field], "use_threads": False}
        with naming(self.path, self._damage):
            for group in groups:
                unpacked = footer.row_group(group).column(column).total_uncompressed_size
                rows = rows_at_once(unpacked, sizes[group])
                for batch in self._file.iter_batches(rows, row_groups=[group], **asked):
                    yield from column_records(batch.column(0), f"{self.path} row", row)
                    row += batch.num_rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def group_sizes(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive things in groups whose sizes add up to `limit` at most; one larger is alone."""
    groups, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            groups.append(range(first, number))
            first, total = number, 0
        total += size
    return [*groups, range(first, len(sizes))]


def rows_at_once(size: int, rows: int) -> int:
    """Rows that make a buffer, where `rows` take `size` bytes."""
    return min(max(1, BUFFER * rows // max(size, 1)), _MOST_ROWS)


def even_parts(size: int, part_bytes: int) -> int:
    """Parts of about `part_bytes` that make up `size`; at least one."""
    return max(1, math.ceil(size / part_bytes))


def check_column(schema: Any, text_field: str, name: str) -> None:
    """DataError where a table's schema has no such column, or where it cannot hold text."""
    import pyarrow as pa

    if text_field not in schema.names:
        raise DataError(
            f"{name}: no column {text_field!r}; it has {', '.join(schema.names)}: choose one with "
            "--text-field"
        )
    if schema.names.count(text_field) > 1:
        raise DataError(f"{name}: several columns are named {text_field!r}; rename all but one")
    found = schema.field(text_field).type
    stored = found.value_type if pa.types.is_dictionary(found) else found
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    if stored not in (*texts, pa.null()):
        raise DataError(f"{name}: column {text_field!r} holds {found}, not strings")


def column_records(column: Any, place: str, first_row: int) -> Iterator[Record]:
    """The values of a column; `place` and a number name a row."""
    import pyarrow as pa

    # as bytes, since a column of strings may hold what is not UTF-8
    values = column.cast(pa.large_binary()).to_numpy(zero_copy_only=False)
    return records(values, text_of_bytes, lambda number: f"{place} {first_row + number}")

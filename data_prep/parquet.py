"""Parquet files, read by row groups."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from data_prep.arrow_columns import check_column, column_records, rows_at_once
from data_prep.compressed import BUFFER, named_damage
from data_prep.records import Record
from data_prep.streams import ReaderSpec, Stream, group_sizes


class ParquetTable:
    """An open Parquet file.

    Memory holds some rows, their pages and the column's dictionary, but never a row group.

    Raises:
        DataError: the file's footer cannot be read.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._damage = (OSError, pa.ArrowException)
        with named_damage(path, self._damage):
            # With a buffer and without `pre_buffer`, pages are read when they are needed.
            self._file = pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
            self.size = os.path.getsize(path)  # bytes on disk
        self.ended = False
        self.consumed = 0

    def parts(self, part_bytes: int) -> list[range]:
        """Return the row groups of each part, by the unpacked sizes of all columns."""
        footer = self._file.metadata
        sizes = [footer.row_group(n).total_byte_size for n in range(footer.num_row_groups)]
        return group_sizes(sizes, part_bytes)

    def records(self, text_field: str, groups: Sequence[int] | None = None) -> Iterator[Record]:
        """Yield the documents of some row groups, or of all, in order.

        Raises:
            DataError: there is no such column, or not one of text; the file is damaged.
        """
        footer = self._file.metadata
        check_column(self._file.schema_arrow, text_field, self.path)
        sizes = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
        groups = range(footer.num_row_groups) if groups is None else groups
        row = sum(sizes[: groups[0]]) if groups else 0
        names = [footer.schema.column(n).path for n in range(footer.num_columns)]
        column = names.index(text_field)
        options: dict[str, Any] = {"columns": [text_field], "use_threads": False}
        with named_damage(self.path, self._damage):
            for group in groups:
                unpacked = footer.row_group(group).column(column).total_uncompressed_size
                rows = rows_at_once(unpacked, sizes[group])
                for batch in self._file.iter_batches(rows, row_groups=[group], **options):
                    yield from column_records(batch.column(0), f"{self.path} row", row)
                    row += batch.num_rows

    def read_part(self, text_field: str, stream: Stream, part: int) -> Iterator[Record]:
        """Yield the documents of the row groups of one part."""
        groups = self.parts(stream.part_bytes)
        yield from self.records(text_field, groups[part])
        self.consumed = stream.size // len(groups)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def count_parts(path: str, size: int, part_bytes: int) -> int:
    """Return the number of parts of a file. Read the footer if the file is large."""
    if size <= part_bytes:
        return 1
    with closing(ParquetTable(path)) as table:
        return len(table.parts(part_bytes))


READER = ReaderSpec(
    open_file=ParquetTable,
    open_parts=lambda stream: ParquetTable(stream.paths[0]),
    count_parts=count_parts,
)

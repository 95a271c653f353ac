"""Documents out of the parts of a stream, one at a time: each is text, or a fault with its place.

A file that cannot be read to its end, that changed since it was found, or a table without the
column is not a matter of records, and ends the command.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar, cast

from data_prep.inputs import Kind, Stream
from data_prep.lines import Lines
from data_prep.packed import InputFile, naming
from data_prep.records import BadRecords, Fault, Record, records, text_of_bytes
from data_prep.sets import SetRows
from data_prep.tables import ParquetTable
from megalite.errors import DataError

__all__ = ["BadRecords", "Fault", "Reader", "Record", "read_streams"]

_Held = TypeVar("_Held", Lines, ParquetTable, SetRows)


class Reader:
    """Reads parts, and keeps what is open for the next part of the same stream.

    Memory holds one record, a few rows of a table, or a buffer. Parts may be read in any order;
    rising ones of packed files are unpacked once.
    """

    def __init__(self, text_field: str) -> None:
        self._field = text_field
        self._stream: Stream | None = None
        self._held: Lines | ParquetTable | SetRows | None = None
        # of the part read last, once its iterator is exhausted:
        self.ended = False  # the stream has no part after it
        self.consumed = 0  # about how many bytes on disk it took

    def read(self, stream: Stream, part: int) -> Iterator[Record]:
        """The records of one part, in order; none of a part beyond the end.

        Raises:
            DataError: a file that is damaged, cut or changed; a table or a data set without the
                column.
        """
        self.ended, self.consumed = False, 0
        if stream.parts is None or part < stream.parts:
            if stream.kind in ("hub", "saved"):
                yield from self._read_set(stream, part)
            elif stream.kind == "jsonl" and stream.parts != 1:
                yield from self._read_range(stream, part)
            elif stream.kind == "parquet" and stream.parts != 1:
                yield from self._read_row_groups(stream, part)
            else:
                yield from self._read_files(stream)
        self.ended = self.ended or (stream.parts is not None and part >= stream.parts - 1)

    def close(self) -> None:
        """Close what is kept open."""
        if self._held:
            self._held.close()
        self._stream = self._held = None

    def _keep(self, stream: Stream, make: Callable[[], _Held]) -> _Held:
        """What is open for the stream; made, and the last one closed, where it is another's."""
        if self._stream != stream:
            self.close()
            self._held = make()
            self._stream = stream
        return cast("_Held", self._held)

    def _read_set(self, stream: Stream, part: int) -> Iterator[Record]:
        name, saved = stream.paths[0], stream.kind == "saved"
        rows = self._keep(stream, lambda: SetRows(name, saved=saved, streaming=stream.streaming))
        parts = stream.parts or 1
        yield from rows.records(self._field, part, parts)
        self.consumed = stream.size // parts

    def _read_range(self, stream: Stream, part: int) -> Iterator[Record]:
        lines = self._keep(stream, lambda: Lines(stream.paths[0]))
        _check_size(stream, lines.size)
        start, stop = part * stream.part_bytes, (part + 1) * stream.part_bytes
        yield from lines.records(self._field, start, stop)
        if stream.parts is None:
            self.ended = lines.ends_by(stop)
            self.consumed = lines.disk_bytes()
        else:
            self.consumed = min(stop, stream.size) - start

    def _read_row_groups(self, stream: Stream, part: int) -> Iterator[Record]:
        table = self._keep(stream, lambda: ParquetTable(stream.paths[0]))
        _check_size(stream, table.size)
        groups = table.parts(stream.part_bytes)
        yield from table.records(self._field, groups[part])
        self.consumed = stream.size // len(groups)

    def _read_files(self, stream: Stream) -> Iterator[Record]:
        """All of several small files, or of a large one that is not cut."""
        for path in stream.paths:
            with closing(_FILES[stream.kind](path)) as file:
                yield from file.records(self._field)
            self.consumed += file.size
        _check_size(stream, self.consumed)


class _Text(InputFile):
    """A file that is one document."""

    def records(self, text_field: str) -> Iterator[Record]:
        del text_field
        with naming(self.path):
            data = self.bytes.read().removeprefix(codecs.BOM_UTF8)
        return records([data], text_of_bytes, lambda _: self.path)


_FILES: dict[Kind, Callable[[str], Lines | ParquetTable | _Text]] = {
    "jsonl": Lines,
    "parquet": ParquetTable,
    "text": _Text,
}


def read_streams(streams: Sequence[Stream], text_field: str) -> Iterator[Record]:
    """All records of all streams, in order."""
    with closing(Reader(text_field)) as reader:
        for stream in streams:
            part, reader.ended = 0, False
            while not reader.ended:
                yield from reader.read(stream, part)
                part += 1


def _check_size(stream: Stream, size: int) -> None:
    if size != stream.size:
        raise DataError(
            f"{stream}: {size:,} bytes, and {stream.size:,} when the command began; leave the "
            "input alone while it is read, and start again"
        )

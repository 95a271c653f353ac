"""Documents out of the parts of a stream, one at a time: each is text, or a fault with its place.

A file that cannot be read to its end, that changed since it was found, or a table without the
column is not a matter of records, and ends the command.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

from data_prep.inputs import Stream
from data_prep.lines import Lines
from data_prep.packed import DAMAGE, InputFile, unreadable
from data_prep.records import BadRecords, Fault, Record, Unusable, text_of_bytes, text_of_json
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
        _check_size(stream, lines.file.size)
        start, stop = part * stream.part_bytes, (part + 1) * stream.part_bytes
        yield from self._read_lines(lines, start, stop)
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
            if stream.kind == "parquet":
                table = ParquetTable(path)
                size, records = table.size, table.records(self._field)
                opened: ParquetTable | Lines | InputFile = table
            elif stream.kind == "jsonl":
                lines = Lines(path)
                size, records = lines.file.size, self._read_lines(lines, 0, sys.maxsize)
                opened = lines
            else:
                opened = file = InputFile(path)
                size, records = file.size, _read_text(file, path)
            try:
                yield from records
            finally:
                opened.close()
            self.consumed += size
        _check_size(stream, self.consumed)

    def _read_lines(self, lines: Lines, start: int, stop: int) -> Iterator[Record]:
        field = self._field
        for line in lines.part(start, stop):
            if not (line := line.strip(b" \t\r\n")):
                continue
            record: Record
            try:
                record = text_of_json(line, field)
            except Unusable as error:
                record = Fault(f"{lines.path} line {lines.number()}", str(error))
            yield record


def read_streams(streams: Sequence[Stream], text_field: str) -> Iterator[Record]:
    """All records of all streams, in order."""
    reader = Reader(text_field)
    try:
        for stream in streams:
            part, reader.ended = 0, False
            while not reader.ended:
                yield from reader.read(stream, part)
                part += 1
    finally:
        reader.close()


def _read_text(file: InputFile, path: str) -> Iterator[Record]:
    try:
        data = file.bytes.read()
    except DAMAGE as error:
        raise unreadable(path, error) from error
    record: Record
    try:
        record = text_of_bytes(data.removeprefix(codecs.BOM_UTF8))
    except Unusable as error:
        record = Fault(path, str(error))
    yield record


def _check_size(stream: Stream, size: int) -> None:
    if size != stream.size:
        raise DataError(
            f"{stream}: {size:,} bytes, and {stream.size:,} when the command began; leave the "
            "input alone while it is read, and start anew"
        )

"""The reader of parts of streams, which yields documents and bad records one at a time.

A damaged or changed file, or a table without the column, is not a bad record: it ends the command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from data_prep.readers import find_reader
from data_prep.records import Record
from data_prep.streams import OpenParts, Stream
from megalite.errors import DataError


class PartReader:
    """Reader of the parts of streams, which keeps one stream open.

    Memory holds one record, a few rows of a table, or a buffer. Parts may be read in any order. A
    compressed file is unpacked once if its parts are read in ascending order.

    Attributes:
        ended: whether the part that was read last is the stream's last one.
        consumed: approximate number of bytes on disk of the part that was read last.
    """

    def __init__(self, text_field: str) -> None:
        self._field = text_field
        self._stream: Stream | None = None
        self._open: OpenParts | None = None
        self.ended = False
        self.consumed = 0

    def read(self, stream: Stream, part: int) -> Iterator[Record]:
        """Yield the records of one part in order, or none for a part beyond the end.

        Raises:
            DataError: a file is damaged, truncated or changed; a table lacks the column.
        """
        self.ended = False
        self.consumed = 0
        if stream.parts is None or part < stream.parts:
            reader = find_reader(stream.kind)
            if reader.open_parts and (stream.parts != 1 or reader.open_file is None):
                yield from self._read_part(stream, part)
            else:
                yield from self._read_files(stream)
        self.ended = self.ended or (stream.parts is not None and part >= stream.parts - 1)

    def close(self) -> None:
        """Close the open stream."""
        if self._open:
            self._open.close()
        self._stream = self._open = None

    def _read_part(self, stream: Stream, part: int) -> Iterator[Record]:
        opened = self._opened(stream)
        if opened.size is not None:
            _check_size(stream, opened.size)
        yield from opened.read_part(self._field, stream, part)
        self.ended = opened.ended
        self.consumed = opened.consumed

    def _opened(self, stream: Stream) -> OpenParts:
        """Return the stream, opened. Close another stream if one is open."""
        if self._open is not None and self._stream == stream:
            return self._open
        self.close()
        make = find_reader(stream.kind).open_parts
        assert make is not None
        self._open = make(stream)
        self._stream = stream
        return self._open

    def _read_files(self, stream: Stream) -> Iterator[Record]:
        """Yield the records of several small files, or of a large file that is not divided."""
        make = find_reader(stream.kind).open_file
        assert make is not None
        for path in stream.paths:
            with closing(make(path)) as file:
                yield from file.records(self._field)
            self.consumed += file.size
        _check_size(stream, self.consumed)


def read_streams(streams: Sequence[Stream], text_field: str) -> Iterator[Record]:
    """Yield all records of all streams, in order."""
    with closing(PartReader(text_field)) as reader:
        for stream in streams:
            part = 0
            reader.ended = False
            while not reader.ended:
                yield from reader.read(stream, part)
                part += 1


def _check_size(stream: Stream, size: int) -> None:
    if size != stream.size:
        raise DataError(
            f"{stream}: got {size:,} bytes, but {stream.size:,} when the command began; do not "
            "change the input while it is read, and start again"
        )

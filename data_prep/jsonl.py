"""JSON lines, read in parts by ranges of unpacked bytes: a line belongs to the part it begins in.

A plain file is read from any offset. A compressed file is unpacked from its beginning, but only
once if its parts are read in ascending order.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from functools import partial

from data_prep.compressed import BUFFER, UNPACKED_RATIO, InputFile, is_compressed, named_damage
from data_prep.records import Record, records, text_of_json
from data_prep.streams import ReaderSpec, Stream, even_parts


class LineFile:
    """A file whose lines are read in parts, in any order.

    The file keeps its position between parts. No line begins between `_last` and `_position`. If
    `_fresh`, a line begins at `_position`; otherwise `_position` is inside a line that is longer
    than the part.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.ended = False
        self.consumed = 0
        self._packed = is_compressed(path)
        self._counted = (0, 0)  # an offset in a plain file, and the number of newlines before it
        self._rewind(InputFile(path))

    def _rewind(self, file: InputFile) -> None:
        self.file = file
        self.size = file.size
        self._position = 0
        self._last = -1
        self._fresh = True
        self._before = 0  # newlines before the part's first line, in compressed files only
        self._first = self._taken = 0  # offset of the part's first line, and lines read since
        self._first_disk = 0  # offset of the first line on disk

    def part(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the lines that begin in [start, stop), with their line ends.

        A byte order mark at the beginning of the file is removed. Memory holds a buffer and a line.

        Raises:
            DataError: the file cannot be read.
        """
        with named_damage(self.path):
            self._before = self._before + self._taken
            self._taken = 0
            self._find_line(start, stop)
            self._first = self._position
            self._first_disk = self.file.tell_disk()
            readline = self.file.bytes.readline
            while self._fresh and self._position < stop and (line := readline()):
                self._last = self._position
                self._position = self._position + len(line)
                self._taken += 1
                yield line if self._last else line.removeprefix(codecs.BOM_UTF8)

    def records(self, text_field: str, start: int = 0, stop: int = sys.maxsize) -> Iterator[Record]:
        """Yield the documents in the lines of a part, or of the whole file. Raises as `part`."""
        stripped = (line.strip(b" \t\r\n") for line in self.part(start, stop))
        text_of = partial(text_of_json, text_field=text_field)
        return records(
            filter(None, stripped), text_of, lambda _: f"{self.path} line {self.number()}"
        )

    def read_part(self, text_field: str, stream: Stream, part: int) -> Iterator[Record]:
        """Yield the documents of one part of `stream.part_bytes` unpacked bytes."""
        start = part * stream.part_bytes
        stop = (part + 1) * stream.part_bytes
        yield from self.records(text_field, start, stop)
        if stream.parts is None:
            self.ended = self.ends_by(stop)
            self.consumed = self.disk_bytes()
        else:
            self.ended = False
            self.consumed = min(stop, stream.size) - start

    def number(self) -> int:
        """Return the number, from 1, of the line that was read last."""
        if not self._packed:
            self._before = self._count_plain(self._first)
        return self._before + self._taken

    def ends_by(self, stop: int) -> bool:
        """Return whether the part that ends at `stop`, and was read last, is the last one."""
        with named_damage(self.path):
            return self._position <= stop and not self.file.bytes.peek(1)

    def disk_bytes(self) -> int:
        """Return the approximate number of bytes on disk of the part that was read last."""
        return self.file.tell_disk() - self._first_disk

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _find_line(self, start: int, stop: int) -> None:
        """Go to the first line that begins at `start` or later, but not beyond `stop`."""
        if self._fresh and self._last < start <= self._position:
            return
        if self._position > start:
            self.file.close()
            self._rewind(InputFile(self.path))
        if not start:
            return
        if self._position < start:
            self._skip(start - 1 - self._position)
        self._last = start - 1
        self._fresh = False
        readline = self.file.bytes.readline
        while not self._fresh and self._position < stop:
            piece = readline(min(BUFFER, stop - self._position))
            if not piece:
                return
            self._position += len(piece)
            self._fresh = piece.endswith(b"\n")
        self._before += self._fresh

    def _skip(self, size: int) -> None:
        if not self._packed:
            self._position += size
            self.file.bytes.seek(self._position)
            return
        while size and (piece := self.file.bytes.read(min(size, BUFFER))):
            size -= len(piece)
            self._position += len(piece)
            self._before += piece.count(b"\n")

    def _count_plain(self, offset: int) -> int:
        """Return the number of newlines before `offset`, from the last count on if possible."""
        at, lines = self._counted if self._counted[0] <= offset else (0, 0)
        with open(self.path, "rb", 0) as file:
            file.seek(at)
            while at < offset and (piece := file.read(min(BUFFER, offset - at))):
                at += len(piece)
                lines += piece.count(b"\n")
        self._counted = (at, lines)
        return lines


def count_parts(path: str, size: int, part_bytes: int) -> int | None:
    """Return the number of parts of a file, or None if it is unknown before the file is read."""
    if not is_compressed(path):
        return even_parts(size, part_bytes) if size > part_bytes else 1
    return None if size * UNPACKED_RATIO > part_bytes else 1


READER = ReaderSpec(
    open_file=LineFile,
    open_parts=lambda stream: LineFile(stream.paths[0]),
    count_parts=count_parts,
)

"""Streams, which are input that is read in parts, and the interface of readers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from data_prep.records import Record

HUB = "hf:"


@dataclass(frozen=True)
class Stream:
    """Input that is read in parts.

    Streams, their parts, and the documents of a part are in the order of the shards.

    Attributes:
        source: number of the --input.
        kind: name of the reader (`data_prep.readers`).
        paths: small files that form one part; or one file, data set or saved folder.
        identity: a hash of the input that decides the documents of each part.
        parts: number of parts. None means that it is unknown until the last part is read.
        part_bytes: size of a part, in bytes of uncompressed input.
        size: bytes on disk; 0 for a hub data set that is streamed.
        streaming: whether a hub data set is streamed; ignored for other kinds.
    """

    source: int
    kind: str
    paths: tuple[str, ...]
    identity: str
    parts: int | None
    part_bytes: int
    size: int
    streaming: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(self.paths))  # JSON turns tuples into lists

    def __str__(self) -> str:
        name = HUB + self.paths[0] if self.kind == "hub" else self.paths[0]
        return f"{name} and {len(self.paths) - 1} more" if len(self.paths) > 1 else name


class OpenFile(Protocol):
    """An open file whose documents are read from beginning to end."""

    @property
    def size(self) -> int:
        """The size on disk in bytes."""

    def records(self, text_field: str) -> Iterator[Record]:
        """Yield every document in order, or a `BadRecord` instead.

        Raises:
            DataError: there is no such column, or the file cannot be read to its end.
        """

    def close(self) -> None:
        """Close the file."""


class OpenParts(Protocol):
    """An open file or data set whose parts are read in any order.

    Attributes:
        ended: whether the part that was read last is the last one.
        consumed: approximate number of bytes on disk of the part that was read last.
    """

    ended: bool
    consumed: int

    @property
    def size(self) -> int | None:
        """The size on disk in bytes. None means not to compare it with the planned size."""

    def read_part(self, text_field: str, stream: Stream, part: int) -> Iterator[Record]:
        """Yield the documents of one part in order. Raises as `OpenFile.records`."""

    def close(self) -> None:
        """Close the file or data set."""


class DatasetFacts(NamedTuple):
    """Facts about a data set before it is read.

    Attributes:
        parts: number of parts.
        size: bytes of its tables. None means the size of its files.
        identity: JSON that is equal for equal rows. None means its files' names and times.
    """

    parts: int
    size: int | None = None
    identity: list[Any] | None = None


@dataclass(frozen=True)
class ReaderSpec:
    """The functions that read one kind of input.

    The simplest reader has only `open_file`. Each of its files is then read as a whole, and small
    files are grouped into parts.

    Attributes:
        open_file: function that opens the file at a path.
        open_parts: function that opens a large file or a data set to be read in parts.
        count_parts: function that returns the number of parts of a file from its path, its bytes
            on disk and `part_bytes`. None means that it is unknown until the last part is read.
        describe: function that returns facts about a data set from its name, `streaming` and
            `part_bytes`.
    """

    open_file: Callable[[str], OpenFile] | None = None
    open_parts: Callable[[Stream], OpenParts] | None = None
    count_parts: Callable[[str, int, int], int | None] | None = None
    describe: Callable[[str, bool, int], DatasetFacts] | None = None


def group_sizes(sizes: Sequence[int], limit: int) -> list[range]:
    """Group consecutive items so that the sizes in a group add up to at most `limit`.

    A larger item has a group of its own.
    """
    groups = []
    first = 0
    total = 0
    for number, size in enumerate(sizes):
        if number > first and total + size > limit:
            groups.append(range(first, number))
            first = number
            total = 0
        total += size
    return [*groups, range(first, len(sizes))]


def even_parts(size: int, part_bytes: int) -> int:
    """Return the number of parts of about `part_bytes` bytes in `size` bytes, at least 1."""
    return max(1, math.ceil(size / part_bytes))

"""A stream: input that is read in parts; and what a reader of one kind of input provides."""

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

    The order of streams, of parts, and of documents in a part is their order in the shards.

    Attributes:
        source: number of the --input.
        kind: name of the reader (`data_prep.readers`).
        paths: small files that make one part; or one file, data set or saved folder.
        identity: a digest, equal for equal documents in each part.
        parts: None means that only reading finds the last part.
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
        object.__setattr__(self, "paths", tuple(self.paths))  # a list, as JSON gives it back

    def __str__(self) -> str:
        name = HUB + self.paths[0] if self.kind == "hub" else self.paths[0]
        return f"{name} and {len(self.paths) - 1} more" if len(self.paths) > 1 else name


class OpenFile(Protocol):
    """An open file whose documents are read from its beginning to its end."""

    @property
    def size(self) -> int:
        """Bytes on disk."""

    def records(self, text_field: str) -> Iterator[Record]:
        """Yield every document in order, or a `BadRecord` in its place.

        Raises:
            DataError: no such column, or a file that cannot be read to its end.
        """

    def close(self) -> None:
        """Close the file."""


class OpenParts(Protocol):
    """An open file or data set whose parts are read in any order.

    Attributes:
        ended: after a part was read, whether no part follows it.
        consumed: about how many bytes on disk the part took.
    """

    ended: bool
    consumed: int

    @property
    def size(self) -> int | None:
        """Bytes on disk. None means that the size is not compared with the planned one."""

    def read_part(self, text_field: str, stream: Stream, part: int) -> Iterator[Record]:
        """Yield the documents of one part in order; errors as `OpenFile.records`."""

    def close(self) -> None:
        """Close the file or data set."""


class DatasetFacts(NamedTuple):
    """Description of a data set before it is read.

    Attributes:
        parts: number of parts.
        size: bytes of its tables. None means the size of its files.
        identity: equal for equal rows. None means that its files' names and times are used.
    """

    parts: int
    size: int | None = None
    identity: list[Any] | None = None


@dataclass(frozen=True)
class ReaderSpec:
    """How one kind of input is read.

    The simplest reader has `open_file` alone: each of its files is read whole, small ones several
    to a part.

    Attributes:
        open_file: opens the file at a path.
        open_parts: opens a large file, or a data set, that is read in parts.
        count_parts: number of parts of a file, from its path, its bytes on disk and `part_bytes`.
            The function may return None: then only reading finds the last part.
        describe: facts about a data set, from its name, `streaming` and `part_bytes`.
    """

    open_file: Callable[[str], OpenFile] | None = None
    open_parts: Callable[[Stream], OpenParts] | None = None
    count_parts: Callable[[str, int, int], int | None] | None = None
    describe: Callable[[str, bool, int], DatasetFacts] | None = None


def group_sizes(sizes: Sequence[int], limit: int) -> list[range]:
    """Group consecutive items so that the sizes of a group add up to at most `limit`.

    An item larger than that has a group to itself.
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
    """Return the number of parts of about `part_bytes` that make up `size`; at least one."""
    return max(1, math.ceil(size / part_bytes))

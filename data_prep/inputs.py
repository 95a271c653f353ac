"""The values of `--input`, and the division of inputs into parts.

corpus.jsonl              a file, by its ending: JSON lines (.jsonl .ndjson .json), Parquet
                          (.parquet), anything else one document of text; files that end in .gz,
                          .bz2, .xz or .zst, such as .jsonl.gz, are unpacked
"web/**/*.parquet"        a glob, quoted or expanded by the shell
src/                      a folder: every file below it, except names that begin with a dot; one
                          with several splits, or with a data card, is refused
saved/, saved/:SPLIT      a folder written by save_to_disk of `datasets`
hf:NAME[@CONFIG][:SPLIT]  a data set of the Hugging Face hub or a local folder of data files
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.clones import check_corpus
from data_prep.compressed import UNPACKED_RATIO, is_compressed
from data_prep.hf_datasets import saved_folder
from data_prep.readers import find_reader, kind_of
from data_prep.streams import HUB, Stream, group_sizes
from megalite.errors import CommandError
from megalite.log import logger

_PARTS = 256  # approximate number of parts of a large input
_MIN_PART = 1 << 20  # bytes
_MAX_PART = 64 << 20  # bytes
_FOOTER_READERS = 16


@dataclass(frozen=True)
class _Item:
    """A file or a data set of the input."""

    source: int
    kind: str
    path: str
    real: str  # the path without links
    size: int = 0
    stamps: tuple[Any, ...] = ()  # size and time, which change with the content

    @property
    def weight(self) -> int:
        return self.size * UNPACKED_RATIO if is_compressed(self.path) else self.size


def find_streams(
    inputs: Sequence[str], *, streaming: bool = True, part_bytes: int | None = None
) -> list[Stream]:
    """Return the streams of all inputs, in order. Files of a glob or a folder are sorted by name.

    Small files are grouped into parts. Large ones are divided into parts: JSON lines by ranges of
    bytes, Parquet by row groups. The division depends on the input and `part_bytes` only.

    Args:
        streaming: whether to stream hub data sets. If false, download them now.
        part_bytes: size of a part. None means to choose it by the size of the input.
    Raises:
        CommandError: an input does not exist, is not a regular file, or may not be read.
        DataError: a Parquet file or a data set cannot be opened.
    """
    items = _unique_items(inputs)
    part_bytes = part_bytes or choose_part_bytes(sum(one.weight for one in items))
    streams = [_stream(group, part_bytes, streaming) for group in _groups(items, part_bytes)]
    with ThreadPoolExecutor(_FOOTER_READERS) as pool:
        return list(pool.map(_with_parts, streams))


def choose_part_bytes(total: int) -> int:
    """Return a power of two of about `total` / 256, from 1 to 64 MiB."""
    return min(max(_MIN_PART, 1 << (total // _PARTS).bit_length() >> 1), _MAX_PART)


def _groups(items: Sequence[_Item], part_bytes: int) -> Iterator[list[_Item]]:
    """Yield the items of each stream: several small files of one input and kind, or one item."""
    for (_, kind), members in groupby(items, lambda one: (one.source, one.kind)):
        files = list(members)
        reader = find_reader(kind)
        alone = reader.describe is not None or reader.open_file is None
        limit = -1 if alone else part_bytes  # -1 puts each into a group of its own
        for group in group_sizes([one.weight for one in files], limit):
            yield files[group.start : group.stop]


def _stream(group: Sequence[_Item], part_bytes: int, streaming: bool) -> Stream:
    first = group[0]
    parts: int | None = 1
    size = sum(one.size for one in group)
    identity: list[Any] = [[one.real, *one.stamps] for one in group]
    describe = find_reader(first.kind).describe
    if describe is not None:
        facts = describe(first.path, streaming, part_bytes)
        parts = facts.parts
        size = size if facts.size is None else facts.size
        identity = identity if facts.identity is None else facts.identity
    content = json.dumps([first.kind, part_bytes, identity])
    return Stream(
        source=first.source,
        kind=first.kind,
        paths=tuple(one.path for one in group),
        identity=hashlib.sha256(content.encode()).hexdigest(),
        parts=parts,
        part_bytes=part_bytes,
        size=size,
        streaming=streaming,
    )


def _with_parts(stream: Stream) -> Stream:
    """Return the stream with its number of parts, for a single file that a reader divides."""
    count_parts = find_reader(stream.kind).count_parts
    if count_parts is None or len(stream.paths) > 1:
        return stream
    return replace(stream, parts=count_parts(stream.paths[0], stream.size, stream.part_bytes))


def _unique_items(inputs: Sequence[str]) -> list[_Item]:
    unique: dict[str, _Item] = {}
    repeated = 0
    for source, name in enumerate(inputs):
        for one in _find(source, name):
            repeated += one.real in unique
            unique.setdefault(one.real, one)
    if repeated:
        logger.warning("%d files are named by two inputs; each is read once", repeated)
    return list(unique.values())


def _find(source: int, name: str) -> Iterator[_Item]:
    if folder := saved_folder(name.removeprefix(HUB)):
        yield _saved(source, folder)
    elif name.startswith(HUB):
        if not name.removeprefix(HUB).strip(":@"):
            raise CommandError(f"--input {name}: no name; write hf:NAME[@CONFIG][:SPLIT]")
        yield _Item(source, "hub", name.removeprefix(HUB), name)
    else:
        yield from _files(source, name)


def _files(source: int, name: str) -> Iterator[_Item]:
    path = Path(name)
    # An existing file may have brackets in its name; only other names are patterns.
    exists = os.path.lexists(name)
    matches = [path] if exists else sorted(Path(m) for m in glob.glob(name, recursive=True))
    folders = {match for match in matches if match.is_dir()}
    count = 0
    for match in matches:
        if match in folders and (folder := saved_folder(str(match))):
            count += 1
            yield _saved(source, folder)
            continue
        files = _below(match) if match in folders else [match]
        if match in folders:
            check_corpus(match, files)
        for file in files:
            count += 1
            yield _file(source, file)
    if not count:
        what = "no file is below" if path.is_dir() else "no file matches"
        raise CommandError(
            f"--input {name}: {what} it (working directory {Path.cwd()}); give a file, a folder, a "
            'glob such as "corpus/**/*.jsonl", or hf:NAME[:SPLIT]'
        )


def _file(source: int, path: Path) -> _Item:
    name = str(path)
    try:
        status = os.stat(name)
    except OSError as error:
        raise CommandError(f"--input {name}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CommandError(
            f"--input {name}: not a regular file; copy a pipe or a device to a file first"
        )
    if not os.access(name, os.R_OK):
        raise CommandError(f"--input {name}: this user may not read it; set its permissions")
    return _Item(
        source,
        kind=kind_of(path),
        path=name,
        real=os.path.realpath(name),
        size=status.st_size,
        stamps=(status.st_size, status.st_mtime_ns),
    )


def _saved(source: int, folder: Path) -> _Item:
    files = [folder / "state.json", folder / "dataset_info.json", *sorted(folder.glob("*.arrow"))]
    items = [_file(source, file) for file in files]
    stamps = tuple([Path(one.real).name, *one.stamps] for one in items)
    return _Item(
        source,
        kind="saved",
        path=str(folder),
        real=os.path.realpath(folder),
        size=sum(one.size for one in items),
        stamps=stamps,
    )


def _below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted. Links to folders are followed, each folder once."""
    files: list[Path] = []
    entered: set[str] = set()

    def refuse(error: OSError) -> None:
        raise CommandError(f"--input {error.filename}: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += (Path(place, name) for name in names if not name.startswith("."))
    return sorted(files)

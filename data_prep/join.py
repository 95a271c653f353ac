"""Parts to shards: which documents go into which shard, and the shards themselves.

Where a shard ends is a function of the documents' lengths alone, known when all parts are done.
Duplicates are found by 128-bit hashes; the first document of a text in input order stays.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from data_prep.folder import Run, read, write
from data_prep.work import Encoder, Tally, read_header
from megalite.formats.manifest import ShardInfo
from megalite.formats.shards import ShardWriter

# Hashes sorted at once. All documents are gone through once for each bucket of hashes.
_BUCKET = 1 << 24


@dataclass(frozen=True)
class Join:
    """What the shards are made of.

    parts: names, in order, each with the number of its first document among all.
    shards: for each the documents it takes: (place in `parts`, first, end), in order.
    """

    parts: list[tuple[str, int]]
    shards: list[list[tuple[int, int, int]]]


def plan_join(run: Run, parts: Sequence[str], *, shard_tokens: int, deduplicate: bool) -> Join:
    """Cut the documents of all parts into shards of at most `shard_tokens` tokens.

    A document is never cut, so one that is longer than that has a shard to itself. Memory holds the
    lengths of one part, and with `deduplicate` a byte a document and a bucket of hashes.
    """
    placed, total = list[tuple[str, int]](), 0
    for name in parts:
        placed.append((name, total))
        total += read_header(run.part(name)).tally.documents
    if deduplicate:
        _drop_duplicates(run, placed, total)
    shards: list[list[tuple[int, int, int]]] = []
    used = 0
    for number, (name, first) in enumerate(placed):
        lengths = _array(run, name, "lengths")
        stay = ~_dropped(run, first, len(lengths))
        ends = np.cumsum(lengths * stay)
        at = 0
        while (following := np.flatnonzero(stay[at:])).size:
            at += int(following[0])
            before = int(ends[at - 1]) if at else 0
            fit = int(np.searchsorted(ends, before + shard_tokens - used, side="right"))
            if fit <= at or not shards:
                shards.append([])
                used = 0
                fit = int(np.searchsorted(ends, before + shard_tokens, side="right"))
            end = max(fit, at + 1)
            shards[-1].append((number, at, end))
            used += int(ends[end - 1]) - before
            at = end
    return Join(placed, shards)


def read_join(run: Run) -> Join:
    """What was planned; FileNotFoundError where the run is over."""
    if (found := read(run.join)) is None:
        raise FileNotFoundError(run.join)
    return Join(**found)


def write_shards(
    run: Run, join: Join, encoder: Encoder, *, wanted: Callable[[str], bool], first: int = 0
) -> None:
    """Write the shards that are wanted, from number `first` on, and say so in the run.

    Whoever writes a shard, also where another has begun it, writes the same bytes.
    """
    count = len(join.shards)
    for number in (*range(first, count), *range(first)):
        if wanted(shard_name(number)):
            _write_shard(run, join, number, encoder)


def _write_shard(run: Run, join: Join, number: int, encoder: Encoder) -> None:
    """One shard, made apart and renamed into place: another worker may be at the same one."""
    name, size = shard_name(number), encoder.tokenizer.vocab_size
    making = run.folder / f"making-{name}-{secrets.token_hex(4)}"
    making.mkdir()
    with ShardWriter(making, name, encoder.dtype, vocab_size=size) as writer:
        for place, start, end in join.shards[number]:
            writer.add_documents(*_documents(run, *join.parts[place], start, end))
        info = writer.close()
    for path in making.iterdir():
        os.replace(path, run.shards / path.name)
    making.rmdir()
    write(run.folder / f"{name}.json", info.model_dump(mode="json"))
    run.finish(name)


def shard_name(number: int) -> str:
    return f"shard_{number:05d}"


def read_shards(run: Run, count: int) -> list[ShardInfo]:
    """What the shards turned out to be, once all are done."""
    files = (run.folder / f"{shard_name(number)}.json" for number in range(count))
    return [ShardInfo.model_validate(read(file)) for file in files]


def kept(run: Run, name: str, first: int) -> Tally:
    """What a part gives to the shards, after duplicates were dropped."""
    tally = read_header(run.part(name)).tally
    if (dropped := _dropped(run, first, tally.documents)).any():
        tally.tokens -= int(_array(run, name, "lengths")[dropped].sum())
        tally.bytes -= int(_array(run, name, "bytes")[dropped].sum())
        tally.documents -= int(dropped.sum())
    return tally


def _documents(
    run: Run, name: str, first: int, start: int, end: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Documents of a part but for duplicates: their tokens in a row, and their lengths."""
    ends = np.cumsum(lengths := _array(run, name, "lengths"))
    begin, stop = int(ends[start - 1]) if start else 0, int(ends[end - 1])
    lengths = lengths[start:end]
    with safe_open(run.part(name), framework="np") as file:
        tokens = file.get_slice("tokens")[begin:stop]
    dropped = _dropped(run, first + start, end - start)
    if dropped.any():
        tokens, lengths = tokens[np.repeat(~dropped, lengths)], lengths[~dropped]
    return tokens, lengths


def _drop_duplicates(run: Run, parts: Sequence[tuple[str, int]], documents: int) -> None:
    """Mark every document whose text an earlier one has: a byte each in the file `dropped`."""
    with open(run.dropped, "wb") as file:
        file.truncate(documents)
    if not documents:
        return
    dropped = np.memmap(run.dropped, np.bool_, mode="r+", shape=(documents,))
    buckets = -(-documents // _BUCKET)
    for bucket in range(buckets):
        found, places = [], []
        for name, first in parts:
            hashes = _array(run, name, "hashes")
            chosen = np.flatnonzero(hashes[:, 0] % np.uint64(buckets) == bucket)
            found.append(hashes[chosen])
            places.append(first + chosen)
        hashes, place = np.concatenate(found), np.concatenate(places)
        order = np.lexsort((place, hashes[:, 1], hashes[:, 0]))
        again = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
        dropped[place[order[1:][again]]] = True
    dropped.flush()


def _dropped(run: Run, first: int, count: int) -> npt.NDArray[np.bool_]:
    """Which of some documents are duplicates; without `deduplicate` none."""
    if not count or not run.dropped.exists():
        return np.zeros(count, np.bool_)
    return np.fromfile(run.dropped, np.bool_, count=count, offset=first)


def _array(run: Run, part: str, name: str) -> npt.NDArray[Any]:
    with safe_open(run.part(part), framework="np") as file:
        found: npt.NDArray[Any] = file.get_tensor(name)
    return found

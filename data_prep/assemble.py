"""Assembly of shards from encoded parts, with deduplication and a held-out set.

When all parts are done, the lengths of the documents alone decide the ends of shards. Duplicates
have equal 128-bit hashes of their texts; the first in input order stays. The same hashes decide
which documents are held out, so that copies of a text are in one set.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from data_prep.encoder import Encoder
from data_prep.part_files import Counts, read_part_header
from data_prep.work_folder import PrepRun, read, write
from megalite.formats.manifest import ShardInfo
from megalite.formats.shards import ShardWriter

# Number of hashes sorted at a time; all hashes are read once for each bucket.
_BUCKET = 1 << 24


@dataclass(frozen=True)
class ShardPlan:
    """The contents of the shards of one output.

    Attributes:
        parts: names of all parts in order, each with the number of its first document.
        shards: each shard's ranges of documents: (index in `parts`, first, end), in order.
        valid_fraction: fraction of the documents to hold out. None means a single output.
        valid: whether this output is that of the held-out documents.
    """

    parts: list[tuple[str, int]]
    shards: list[list[tuple[int, int, int]]]
    valid_fraction: float | None = None
    valid: bool = False

    def folder(self, run: PrepRun) -> Path:
        """Return the folder that becomes the output."""
        return run.valid if self.valid else run.shards

    def pieces(self) -> list[str]:
        """Return the names of the shards, unique among both outputs."""
        prefix = "valid_" if self.valid else ""
        return [prefix + shard_name(number) for number in range(len(self.shards))]


def plan_shards(
    run: PrepRun,
    parts: Sequence[str],
    *,
    shard_tokens: int,
    deduplicate: bool,
    valid_fraction: float | None = None,
) -> list[ShardPlan]:
    """Return the plan of each output: one, or with `valid_fraction` two, the held-out one last."""
    placed = list[tuple[str, int]]()
    total = 0
    for name in parts:
        placed.append((name, total))
        total += read_part_header(run.part(name)).tally.documents
    if deduplicate:
        _drop_duplicates(run, placed, total)
    sides = (False,) if valid_fraction is None else (False, True)
    return [_cut(run, ShardPlan(placed, [], valid_fraction, side), shard_tokens) for side in sides]


def _cut(run: PrepRun, plan: ShardPlan, shard_tokens: int) -> ShardPlan:
    """Divide the documents of all parts into shards of at most `shard_tokens` tokens.

    A document is never divided, so a longer one has a shard of its own. Memory holds the lengths of
    one part, and with `deduplicate` a byte for each document and a bucket of hashes.
    """
    shards = plan.shards
    used = 0
    for number, (name, _) in enumerate(plan.parts):
        lengths = _array(run, name, "lengths")
        stay = ~_omitted(run, plan, number, 0, len(lengths))
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
    return plan


def write_shard_plans(run: PrepRun, plans: Sequence[ShardPlan]) -> None:
    """Write the plans for the workers."""
    write(run.shard_plans, [asdict(plan) for plan in plans])


def read_shard_plans(run: PrepRun) -> list[ShardPlan]:
    """Return the plans. Raise FileNotFoundError if the run is over."""
    if (plans := read(run.shard_plans)) is None:
        raise FileNotFoundError(run.shard_plans)
    return [ShardPlan(**plan) for plan in plans]


def write_shards(
    run: PrepRun,
    plans: Sequence[ShardPlan],
    encoder: Encoder,
    *,
    wanted: Callable[[str], bool],
    share: float = 0.0,
) -> None:
    """Write shards and record that they are done.

    Two writers of a shard write the same bytes.

    Args:
        wanted: function that returns whether to write a shard, by its unique name.
        share: where to start, as a fraction of all shards in [0, 1).
    """
    pieces = [(plan, number, name) for plan in plans for number, name in enumerate(plan.pieces())]
    first = int(share * len(pieces))
    for plan, number, name in pieces[first:] + pieces[:first]:
        if wanted(name):
            _write_shard(run, plan, number, name, encoder)


def _write_shard(run: PrepRun, plan: ShardPlan, number: int, piece: str, encoder: Encoder) -> None:
    """Write a shard to a temporary folder and rename it, because others may write it, too."""
    name = shard_name(number)
    size = encoder.tokenizer.vocab_size
    making = run.folder / f"making-{piece}-{secrets.token_hex(4)}"
    making.mkdir()
    with ShardWriter(making, name, encoder.dtype, vocab_size=size) as writer:
        for place, start, end in plan.shards[number]:
            writer.add_documents(*_documents(run, plan, place, start, end))
        info = writer.close()
    for path in making.iterdir():
        os.replace(path, plan.folder(run) / path.name)
    making.rmdir()
    write(run.folder / f"{piece}.json", info.model_dump(mode="json"))
    run.finish(piece)


def shard_name(number: int) -> str:
    return f"shard_{number:05d}"


def read_shards(run: PrepRun, plan: ShardPlan) -> list[ShardInfo]:
    """Return the manifest's entries of all shards."""
    files = (run.folder / f"{piece}.json" for piece in plan.pieces())
    return [ShardInfo.model_validate(read(file)) for file in files]


def retained_counts(run: PrepRun, plan: ShardPlan, place: int) -> Counts:
    """Return the counts of a part's documents in an output, without duplicates.

    Bad records are counted in the training shards' manifest.
    """
    name, _ = plan.parts[place]
    tally = read_part_header(run.part(name)).tally
    if plan.valid:
        tally.bad_records = 0
    if (dropped := _omitted(run, plan, place, 0, tally.documents)).any():
        tally.tokens -= int(_array(run, name, "lengths")[dropped].sum())
        tally.bytes -= int(_array(run, name, "bytes")[dropped].sum())
        tally.documents -= int(dropped.sum())
    return tally


def _documents(
    run: PrepRun, plan: ShardPlan, place: int, start: int, end: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the tokens, as one array, and the lengths of a part's documents in an output."""
    name, _ = plan.parts[place]
    ends = np.cumsum(lengths := _array(run, name, "lengths"))
    begin = int(ends[start - 1]) if start else 0
    stop = int(ends[end - 1])
    lengths = lengths[start:end]
    with safe_open(run.part(name), framework="np") as file:
        tokens = file.get_slice("tokens")[begin:stop]
    dropped = _omitted(run, plan, place, start, end - start)
    if dropped.any():
        tokens = tokens[np.repeat(~dropped, lengths)]
        lengths = lengths[~dropped]
    return tokens, lengths


def _drop_duplicates(run: PrepRun, parts: Sequence[tuple[str, int]], documents: int) -> None:
    """Write the file `dropped`, with a byte for each document: 1 if an earlier one has its text."""
    with open(run.dropped, "wb") as file:
        file.truncate(documents)
    if not documents:
        return
    dropped = np.memmap(run.dropped, np.bool_, mode="r+", shape=(documents,))
    buckets = -(-documents // _BUCKET)
    for bucket in range(buckets):
        hash_arrays = []
        number_arrays = []
        for name, first in parts:
            hashes = _array(run, name, "hashes")
            chosen = np.flatnonzero(hashes[:, 0] % np.uint64(buckets) == bucket)
            hash_arrays.append(hashes[chosen])
            number_arrays.append(first + chosen)
        hashes = np.concatenate(hash_arrays)
        numbers = np.concatenate(number_arrays)
        order = np.lexsort((numbers, hashes[:, 1], hashes[:, 0]))
        repeated = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
        dropped[numbers[order[1:][repeated]]] = True
    dropped.flush()


def _omitted(
    run: PrepRun, plan: ShardPlan, place: int, start: int, count: int
) -> npt.NDArray[np.bool_]:
    """Return which documents of a part are not in an output: duplicates, or in the other one."""
    name, first = plan.parts[place]
    omitted = np.zeros(count, np.bool_)
    if count and run.dropped.exists():
        omitted = np.fromfile(run.dropped, np.bool_, count=count, offset=first + start)
    if count and plan.valid_fraction is not None:
        with safe_open(run.part(name), framework="np") as file:
            hashes = file.get_slice("hashes")[start : start + count]
        omitted |= is_held_out(hashes, plan.valid_fraction) != plan.valid
    return omitted


def is_held_out(hashes: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Return which documents are held out: those whose hashes are in the lowest `fraction`.

    The choice depends on a document's text only, not on other documents, their order, the
    tokenizer or the number of workers. A larger fraction holds out the same documents and more.

    Args:
        hashes: [N, 2], 128-bit hashes, of which the second 64 bits decide.
    """
    return np.asarray(hashes[:, 1] < np.uint64(int(fraction * 2.0**64)))


def _array(run: PrepRun, part: str, name: str) -> npt.NDArray[Any]:
    with safe_open(run.part(part), framework="np") as file:
        values: npt.NDArray[Any] = file.get_tensor(name)
    return values

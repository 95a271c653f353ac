"""Shards: pairs of `NAME.bin`, raw token ids, and `NAME.idx`, where its documents lie, in a folder
whose manifest says what they should be.

A folder's shards, in manifest order, are one stream of tokens. `ShardSet` reads any part of it
through memory maps; nothing is trusted that was not compared with the manifest first.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megalite.errors import DataError
from megalite.files import sha256_file, sync_file
from megalite.formats.index import (
    LONGEST_SEQUENCE,
    Dtype,
    Index,
    Integers,
    read_index,
    write_index,
)
from megalite.formats.manifest import (
    Manifest,
    ShardInfo,
    fingerprint,
    load_manifest,
    write_manifest,
)
from megalite.formats.verify import (
    bin_path,
    check_bin,
    check_hash,
    checked_index,
    idx_path,
    size_faults,
    verify_folder,
)

__all__ = [
    "Manifest",
    "ShardInfo",
    "ShardSet",
    "ShardWriter",
    "fingerprint",
    "load_manifest",
    "open_shards",
    "verify_folder",
    "write_manifest",
]

# A mapped file holds a descriptor, of which a process has 1,024 by default.
_MAPPED_SHARDS = 64
# Indices of this size together are checked whole when a folder is opened, in some 0.1 s; those
# of larger folders one by one, when first used.
_CHECKED_AT_OPEN = 64 << 20  # bytes
_BUFFER = 1 << 20  # bytes
_NAMED_FAULTS = 20


def open_shards(folder: Path | str, *, verify: bool = False) -> ShardSet:
    """Open a shard folder and compare its files with its manifest; the tokens are not read.

    Args:
        verify: hash each shard before its first use.

    Raises:
        DataError: no folder, no manifest or a bad one; a shard missing, cut, or of another dtype;
            an `.idx` that is damaged or not this `.bin`'s. All of them are named.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    faults = [fault for shard in manifest.shards for fault in size_faults(folder, manifest, shard)]
    index_bytes = sum(20 * shard.documents for shard in manifest.shards)
    if not faults and index_bytes <= _CHECKED_AT_OPEN:
        for shard in manifest.shards:
            try:
                checked_index(folder, manifest, shard)
            except DataError as error:
                faults.append(str(error))
    if faults:
        more = len(faults) - _NAMED_FAULTS
        named = faults[:_NAMED_FAULTS] + ([f"{folder}: and {more} more faults"] if more > 0 else [])
        raise DataError("\n".join(named))
    return ShardSet(folder, manifest, verify=verify)


class ShardWriter:
    """Writes one shard, document by document; each id is checked before it is narrowed to `dtype`.

    As a context manager it closes the file after an error; only `close` makes the shard whole.
    """

    def __init__(self, folder: Path, name: str, dtype: Dtype, *, vocab_size: int) -> None:
        self.name, self.tokens = name, 0
        self._folder, self._dtype = folder, dtype
        self._ids = min(vocab_size, int(np.iinfo(dtype).max) + 1)
        self._lengths: list[int] = []
        self._hash = hashlib.sha256()
        self._file = open(bin_path(folder, name), "wb", buffering=_BUFFER)  # noqa: SIM115

    def add_document(self, ids: Sequence[int] | Integers) -> None:
        """Append a document of one sequence.

        Raises:
            DataError: an id below 0 or not below the vocabulary's size; a document of more than
                2^31 - 1 tokens. Nothing of the document is written.
        """
        values = np.asarray(ids)
        if values.size:
            assert values.dtype.kind in "iu", f"token ids of type {values.dtype}"
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self._ids:
                wrong = low if low < 0 else high
                raise DataError(
                    f"{self.name}: document {len(self._lengths)} holds token id {wrong}, outside 0 "
                    f"to {self._ids - 1}; is it another tokenizer's?"
                )
        if values.size > LONGEST_SEQUENCE:
            raise DataError(
                f"{self.name}: document {len(self._lengths)} has {values.size} tokens, the format "
                f"holds {LONGEST_SEQUENCE}; split it"
            )
        data = values.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(values.size)
        self.tokens += values.size

    def close(self) -> ShardInfo:
        """Write the `.idx`, sync both files, and return the shard's line of the manifest."""
        self._file.close()
        bin_file, idx_file = bin_path(self._folder, self.name), idx_path(self._folder, self.name)
        documents = np.arange(len(self._lengths) + 1)
        write_index(idx_file, self._lengths, documents, self._dtype)
        sync_file(bin_file)
        sync_file(idx_file)
        return ShardInfo(
            name=self.name,
            documents=len(self._lengths),
            tokens=self.tokens,
            bytes=self.tokens * self._dtype.itemsize,
            sha256=self._hash.hexdigest(),
            index_sha256=sha256_file(idx_file),
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class ShardSet:
    """The shards of one folder as a stream of `tokens` ids; made by `open_shards`.

    Arrays are read-only views of memory maps where they lie in one shard. Reading is safe from
    several threads.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, verify: bool = False) -> None:
        self.folder, self.manifest = folder, manifest
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.vocab_size, self.tokens = manifest.vocab_size, manifest.tokens
        self.documents = manifest.documents
        self._unsigned = np.dtype(f"<u{self.dtype.itemsize}")  # in which a negative id is a big one
        self._verify, self._verified, self._checked = verify, set[int](), set[int]()
        counts = [(shard.tokens, shard.documents) for shard in manifest.shards]
        self._starts = list(accumulate((tokens for tokens, _ in counts), initial=0))
        self._firsts = list(accumulate((documents for _, documents in counts), initial=0))
        self._ids = lru_cache(_MAPPED_SHARDS)(self._map_bin)
        self._index = lru_cache(_MAPPED_SHARDS)(self._map_index)

    @cached_property
    def fingerprint(self) -> str:
        """See `megalite.formats.manifest.fingerprint`."""
        return fingerprint(self.manifest)

    def read(self, start: int, count: int) -> Integers:
        """Tokens start to start + count of the stream, in the shards' dtype.

        Raises:
            DataError: an id outside the vocabulary, a shard that changed or, where `verify` was
                asked for, one whose hash is not the manifest's.
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        pieces = []
        while count:
            shard = bisect_right(self._starts, start) - 1
            offset = start - self._starts[shard]
            piece = self._ids(shard)[offset : offset + count]
            if int(piece.view(self._unsigned).max()) >= self.vocab_size:
                raise self._out_of_range(shard, offset, piece)
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where documents begin strictly between two positions of the stream, in order.

        Raises:
            DataError: an `.idx` that is damaged or not this `.bin`'s.
        """
        found = [np.empty(0, np.int64)]
        for shard in range(max(0, bisect_right(self._starts, start) - 1), len(self._starts) - 1):
            base = self._starts[shard]
            if base >= stop:
                break
            index = self._index(shard)
            documents = range(index.header.boundaries - 1)
            low = bisect_right(documents, start - base, key=index.document_start)
            high = bisect_left(documents, stop - base, lo=low, key=index.document_start)
            sequences = index.documents[low:high]
            sequences = sequences[sequences < index.header.sequences]
            found.append(index.pointers[sequences] // self.dtype.itemsize + base)
        # a document without tokens begins where the next one does
        return np.unique(np.concatenate(found))

    def document(self, number: int) -> Integers:
        """The tokens of one document of the folder, counted from 0."""
        assert 0 <= number < self.documents, (number, self.documents)
        shard = bisect_right(self._firsts, number) - 1
        index, base = self._index(shard), self._starts[shard]
        first = index.document_start(number - self._firsts[shard])
        return self.read(
            base + first, index.document_start(number - self._firsts[shard] + 1) - first
        )

    def document_lengths(self, shard: int) -> npt.NDArray[np.int64]:
        """The tokens of each document of one shard."""
        index = self._index(shard)
        ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
        return np.diff(ends[index.documents])

    def _map_bin(self, shard: int) -> Integers:
        info = self.manifest.shards[shard]
        path = bin_path(self.folder, info.name)
        check_bin(path, self.manifest, info)  # it may have changed since the folder was opened
        if self._verify and shard not in self._verified:
            check_hash(path, info.sha256)
            self._verified.add(shard)
        if not info.bytes:
            return np.empty(0, self.dtype)
        # as a plain array: a slice of np.memmap itself costs ten times as much
        return np.asarray(np.memmap(path, self.dtype, mode="r"))

    def _map_index(self, shard: int) -> Index:
        info = self.manifest.shards[shard]
        if shard in self._checked:
            return read_index(idx_path(self.folder, info.name), check=False)
        index = checked_index(self.folder, self.manifest, info)
        self._checked.add(shard)
        return index

    def _out_of_range(self, shard: int, offset: int, piece: Integers) -> DataError:
        at = int(np.argmax(piece.view(self._unsigned) >= self.vocab_size))
        path = bin_path(self.folder, self.manifest.shards[shard].name)
        return DataError(
            f"{path}: token {offset + at} is {int(piece[at])}, the vocabulary has "
            f"{self.vocab_size} ids; the shard is damaged: run "
            f"`python -m data_prep verify {self.folder}`"
        )

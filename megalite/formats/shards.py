"""Shards: pairs of `NAME.bin` (raw token ids) and `NAME.idx` (document boundaries) with a manifest.

A folder's shards, in the manifest's order, are one stream of tokens, and `ShardSet` reads any part
of it. Every file is compared with the manifest before its first use.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalite.errors import DataError
from megalite.files import sha256_file, sync_file
from megalite.formats import verify as checks
from megalite.formats.index import (
    LONGEST_SEQUENCE,
    DocumentStarts,
    Dtype,
    Index,
    Integers,
    OpenFiles,
    read_index,
    write_index,
)
from megalite.formats.manifest import ShardInfo, ShardManifest, fingerprint, load_manifest
from megalite.formats.verify import bin_path, idx_path
from megalite.log import logger

_MAPPED_INDICES = 16  # mapped to read whole documents; windows need none
# If all .idx files of a folder have at most this size, they are checked when it is opened, in about
# 0.2 s; otherwise each is checked at its first use. Opening a file costs as much as reading 64 KB.
CHECKED_AT_OPEN = 64 << 20  # bytes
_INDEX_COST = 64 << 10  # bytes
_BUFFER = 1 << 20  # bytes
_NAMED_FAULTS = 20


def open_shards(
    folder: Path | str,
    *,
    verify: bool = False,
    vocab_size: int | None = None,
    files: OpenFiles | None = None,
    check_bytes: int = CHECKED_AT_OPEN,
) -> ShardSet:
    """Open a shard folder and compare its files with its manifest, without reading the tokens.

    Shards made by Megatron need no manifest: open a folder of pairs, in the order of their names,
    or one pair by its prefix (`data/my_text_document`). Their `.idx` files are read and hashed,
    about 40 MB for a billion tokens. A warning lists the checks that are impossible. If the folder
    has a `tokenizer/`, it defines the vocabulary size.

    Args:
        verify: If true, hash each shard before its first use.
        vocab_size: vocabulary size if there is neither a manifest nor a tokenizer.
        files: cache of open files, which several shard sets may share. None means a new one.
        check_bytes: check all `.idx` files now if they have at most this size in total; otherwise
            check each one at its first use.
    Raises:
        DataError: the folder or its manifest is missing or invalid; a shard is missing, truncated,
            or of another dtype; an `.idx` is damaged or belongs to another `.bin`. The message
            lists all faults.
    """
    path = Path(folder)
    if (names := checks.megatron_names(path)) is not None:
        folder = path if path.is_dir() else path.parent
        manifest = checks.describe_megatron(folder, names, vocab_size=vocab_size)
        _warn(path, manifest, verify)
        return ShardSet(folder, manifest, path=path, files=files, checked=True)
    manifest = load_manifest(path)
    faults = [fault for one in manifest.shards for fault in checks.size_faults(path, manifest, one)]
    cost = 20 * manifest.documents + _INDEX_COST * len(manifest.shards)
    check = cost <= check_bytes and not faults
    for shard in manifest.shards if check else ():
        faults += checks.fault_of(checks.checked_index, path, manifest, shard)
    if faults:
        more = len(faults) - _NAMED_FAULTS
        named = faults[:_NAMED_FAULTS] + ([f"{path}: and {more} more faults"] if more > 0 else [])
        raise DataError("\n".join(named))
    return ShardSet(path, manifest, verify=verify, files=files, checked=check)


def _warn(path: Path, manifest: ShardManifest, verify: bool) -> None:
    """Warn about the checks that are impossible without a manifest."""
    tokenizer = manifest.tokenizer
    logger.warning(
        "%s: %d shards without a manifest. Checked: sizes, and the structure of every .idx. Not "
        "checked: whether a token was changed (no hashes%s), %s. Ids are compared with a "
        "vocabulary of %d as they are read",
        path,
        len(manifest.shards),
        ", so data.verify does nothing here" if verify else "",
        f"whether {tokenizer.path} made them" if tokenizer.sha256 else "which tokenizer made them",
        manifest.vocab_size,
    )


class ShardWriter:
    """Writer of one shard, which checks each id before it casts it to `dtype`.

    The context manager closes the file after an error. Only `close` completes the shard.
    """

    def __init__(self, folder: Path, name: str, dtype: Dtype, *, vocab_size: int) -> None:
        self.name = name
        self.tokens = 0
        self._folder, self._dtype = folder, dtype
        self._ids = min(vocab_size, int(np.iinfo(dtype).max) + 1)
        self._lengths: list[int] = []
        self._hash = hashlib.sha256()
        self._file = open(bin_path(folder, name), "wb", buffering=_BUFFER)  # noqa: SIM115

    def add_document(self, ids: Sequence[int] | Integers) -> None:
        """Append a document of one sequence. Raises as `add_documents`."""
        values = np.asarray(ids)
        self.add_documents(values, np.array([values.size]))

    def add_documents(self, ids: Integers, lengths: Integers) -> None:
        """Append documents of one sequence each.

        Args:
            ids: the ids of all documents, concatenated.
            lengths: the number of ids of each document.
        Raises:
            DataError: an id is negative or not below the vocabulary size, or a document has more
                than 2^31 - 1 tokens. None of these documents is written.
        """
        assert ids.size == lengths.sum(), (ids.size, lengths.sum())
        if ids.size:
            assert ids.dtype.kind in "iu", f"token ids of type {ids.dtype}"
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self._ids:
                at = int(np.argmax((ids < 0) | (ids >= self._ids)))
                number = len(self._lengths) + int(np.searchsorted(np.cumsum(lengths), at, "right"))
                raise DataError(
                    f"{self.name}: document {number} has token id {ids[at]}, outside 0 to "
                    f"{self._ids - 1}; use the tokenizer of these shards"
                )
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            number = len(self._lengths) + int(np.argmax(lengths))
            raise DataError(
                f"{self.name}: document {number} has {lengths.max()} tokens, the format allows "
                f"{LONGEST_SEQUENCE}; split it"
            )
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.extend(lengths.tolist())
        self.tokens += ids.size

    def close(self) -> ShardInfo:
        """Write the `.idx`, sync both files, and return the shard's entry in the manifest."""
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

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ShardSet:
    """The shards of one folder as a stream of `tokens` ids, opened by `open_shards`.

    `path` is the path that was opened: the folder, or the prefix of one pair in it. Several threads
    may read.
    """

    def __init__(
        self,
        folder: Path,
        manifest: ShardManifest,
        *,
        path: Path | None = None,
        verify: bool = False,
        files: OpenFiles | None = None,
        checked: bool = False,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.path = path or folder
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.vocab_size, self.tokens = manifest.vocab_size, manifest.tokens
        self.documents = manifest.documents
        self._files = files or OpenFiles()
        self._unsigned = np.dtype(f"<u{self.dtype.itemsize}")  # makes a negative id a large one
        self._verify, self._all_checked = verify, checked
        self._bin_paths: dict[int, str] = {}  # of the shards in use
        self._starts = list(accumulate((one.tokens for one in manifest.shards), initial=0))
        self._firsts = list(accumulate((one.documents for one in manifest.shards), initial=0))
        self._document_starts: dict[int, DocumentStarts] = {}
        self._index = lru_cache(_MAPPED_INDICES)(self._map_index)

    @cached_property
    def fingerprint(self) -> str:
        """See `megalite.formats.manifest.fingerprint`."""
        return fingerprint(self.manifest)

    def read(self, start: int, count: int) -> Integers:
        """Return `count` tokens of the stream from token `start` on, in the shards' dtype.

        Raises:
            DataError: an id is outside the vocabulary, or a shard changed since it was opened. With
                `verify`, also if a shard's hash differs from the manifest's.
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        pieces: list[Integers] = []
        while count:
            shard = bisect_right(self._starts, start) - 1
            here = min(count, self._starts[shard + 1] - start)
            pieces.append(self._read_shard(shard, start - self._starts[shard], here))
            start += here
            count -= here
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the starts of documents strictly between two positions of the stream, in order.

        Raises:
            DataError: an `.idx` is damaged or belongs to another `.bin`.
        """
        parts = []
        for shard in range(max(0, bisect_right(self._starts, start) - 1), len(self._starts) - 1):
            base = self._starts[shard]
            if base >= stop:
                break
            starts = self._document_starts.get(shard) or self._outline(shard)
            parts.append(starts.between(self._files, start - base, stop - base) + base)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def document(self, number: int) -> Integers:
        """Return the tokens of one document of the folder, counted from 0."""
        assert 0 <= number < self.documents, (number, self.documents)
        shard = bisect_right(self._firsts, number) - 1
        index = self._index(shard)
        number = number - self._firsts[shard]
        first = index.document_start(number)
        end = index.document_start(number + 1)
        return self.read(self._starts[shard] + first, end - first)

    def document_lengths(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the tokens of each document of one shard."""
        return np.diff(self._index(shard).document_bounds())

    def _read_shard(self, shard: int, offset: int, count: int) -> Integers:
        path = self._bin_paths.get(shard) or self._check_bin(shard)
        ids = self._files.read(path, self.dtype, offset * self.dtype.itemsize, count)
        if int(ids.view(self._unsigned).max()) >= self.vocab_size:
            raise self._out_of_range(shard, offset, ids)
        return ids

    def _check_bin(self, shard: int) -> str:
        """Return the path of a `.bin` after a check: it may have changed since it was opened."""
        info = self.manifest.shards[shard]
        path = bin_path(self.folder, info.name)
        checks.check_bin(path, self.manifest, info)
        if self._verify:
            checks.check_hash(path, info.sha256)
        self._bin_paths[shard] = str(path)
        return self._bin_paths[shard]

    def _outline(self, shard: int) -> DocumentStarts:
        path = idx_path(self.folder, self.manifest.shards[shard].name)
        self._document_starts[shard] = DocumentStarts(path, self._map_index(shard))
        return self._document_starts[shard]

    def _map_index(self, shard: int) -> Index:
        info = self.manifest.shards[shard]
        if self._all_checked or shard in self._document_starts:
            return read_index(idx_path(self.folder, info.name), check=False)
        return checks.checked_index(self.folder, self.manifest, info)

    def _out_of_range(self, shard: int, offset: int, piece: Integers) -> DataError:
        at = int(np.argmax(piece.view(self._unsigned) >= self.vocab_size))
        path = bin_path(self.folder, self.manifest.shards[shard].name)
        advice = (
            "raise model.vocab_size, or copy or make the shard again if it is damaged"
            if self.manifest.format == "mmididx"
            else f"the shard is damaged: run `python -m data_prep verify {self.folder}`"
        )
        return DataError(
            f"{path}: token {offset + at} is {int(piece[at])}, the vocabulary has "
            f"{self.vocab_size} ids; {advice}"
        )

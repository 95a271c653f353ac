"""Shards: pairs of `NAME.bin`, raw token ids, and `NAME.idx`, where its documents lie, in a folder
whose manifest says what they should be.

A folder's shards, in manifest order, are one stream of tokens. `ShardSet` reads any part of it;
nothing is trusted that was not compared with the manifest first.
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

_MAPPED_INDICES = 16  # for whole documents; windows need none
# Indices of this size together are checked whole when a folder is opened, in some 0.2 s; those
# of larger folders one by one, when first used. A file costs as much as 64 KB more of it.
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
    """Open a shard folder and compare its files with its manifest; the tokens are not read.

    Megatron's own shards open without a manifest: a folder of pairs, in the order of their names,
    or one pair by its prefix (`data/my_text_document`). Their `.idx` files are read whole and
    hashed, some 40 MB for a billion tokens; a warning says what cannot be checked. A `tokenizer/`
    next to them is taken as theirs.

    Args:
        verify: hash each shard before its first use.
        vocab_size: the bound of ids if neither a manifest nor a tokenizer states it.
        files: what to read through, shared by the sets of a process; None: a new one.
        check_bytes: size up to which all `.idx` files are checked whole now, and not at first use.

    Raises:
        DataError: no folder, no manifest or a bad one; a shard missing, cut, or of another dtype;
            an `.idx` that is damaged or not this `.bin`'s. All of them are named.
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
    """Say what nobody can know about shards without a manifest."""
    known = bool(manifest.tokenizer.sha256)
    logger.warning(
        "%s: %d shards without a manifest. Checked: sizes, and the structure of every .idx. Not "
        "checked: whether a token was changed (no hashes%s), %s. Ids are compared with a "
        "vocabulary of %d as they are read",
        path,
        len(manifest.shards),
        ", so data.verify does nothing here" if verify else "",
        f"whether {manifest.tokenizer.path} made them" if known else "which tokenizer made them",
        manifest.vocab_size,
    )


class ShardWriter:
    """Writes one shard, document by document; each id is checked before it is narrowed to `dtype`.

    As a context manager it closes the file after an error; only `close` makes the shard whole.
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
        """Append a document of one sequence; errors are those of `add_documents`."""
        values = np.asarray(ids)
        self.add_documents(values, np.array([values.size]))

    def add_documents(self, ids: Integers, lengths: Integers) -> None:
        """Append documents of one sequence each: their ids in a row, and how many each one has.

        Raises:
            DataError: an id below 0 or not below the vocabulary's size; a document of more than
                2^31 - 1 tokens. Nothing of these documents is written.
        """
        assert ids.size == lengths.sum(), (ids.size, lengths.sum())
        if ids.size:
            assert ids.dtype.kind in "iu", f"token ids of type {ids.dtype}"
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self._ids:
                at = int(np.argmax((ids < 0) | (ids >= self._ids)))
                number = len(self._lengths) + int(np.searchsorted(np.cumsum(lengths), at, "right"))
                raise DataError(
                    f"{self.name}: document {number} holds token id {ids[at]}, outside 0 to "
                    f"{self._ids - 1}; is it another tokenizer's?"
                )
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            number = len(self._lengths) + int(np.argmax(lengths))
            raise DataError(
                f"{self.name}: document {number} has {lengths.max()} tokens, the format holds "
                f"{LONGEST_SEQUENCE}; split it"
            )
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.extend(lengths.tolist())
        self.tokens += ids.size

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

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ShardSet:
    """The shards of one folder as a stream of `tokens` ids; made by `open_shards`.

    `path` is what was requested: the folder, or the prefix of one pair in it. Reading is safe from
    several threads.
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
        self._unsigned = np.dtype(f"<u{self.dtype.itemsize}")  # in which a negative id is a big one
        self._verify, self._all_checked = verify, checked
        self._used: dict[int, str] = {}  # paths of the .bin files in use
        self._starts = list(accumulate((one.tokens for one in manifest.shards), initial=0))
        self._firsts = list(accumulate((one.documents for one in manifest.shards), initial=0))
        self._document_starts: dict[int, DocumentStarts] = {}
        self._index = lru_cache(_MAPPED_INDICES)(self._map_index)

    @cached_property
    def fingerprint(self) -> str:
        """See `megalite.formats.manifest.fingerprint`."""
        return fingerprint(self.manifest)

    def read(self, start: int, count: int) -> Integers:
        """Return tokens start to start + count of the stream, in the shards' dtype.

        Raises:
            DataError: an id outside the vocabulary, a shard that changed or, where `verify` was
                requested, one whose hash is not the manifest's.
        """
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        pieces: list[Integers] = []
        while count:
            shard = bisect_right(self._starts, start) - 1
            here = min(count, self._starts[shard + 1] - start)
            pieces.append(self._read_shard(shard, start - self._starts[shard], here))
            start = start + here
            count = count - here
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the starts of documents strictly between two positions of the stream, in order.

        Raises:
            DataError: an `.idx` that is damaged or not this `.bin`'s.
        """
        found = []
        for shard in range(max(0, bisect_right(self._starts, start) - 1), len(self._starts) - 1):
            base = self._starts[shard]
            if base >= stop:
                break
            starts = self._document_starts.get(shard) or self._outline(shard)
            found.append(starts.between(self._files, start - base, stop - base) + base)
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])

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
        path = self._used.get(shard) or self._first_use(shard)
        ids = self._files.read(path, self.dtype, offset * self.dtype.itemsize, count)
        if int(ids.view(self._unsigned).max()) >= self.vocab_size:
            raise self._out_of_range(shard, offset, ids)
        return ids

    def _first_use(self, shard: int) -> str:
        """Return the path of a `.bin`, which may have changed since the folder was opened."""
        info = self.manifest.shards[shard]
        path = bin_path(self.folder, info.name)
        checks.check_bin(path, self.manifest, info)
        if self._verify:
            checks.check_hash(path, info.sha256)
        self._used[shard] = str(path)
        return self._used[shard]

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
        told = (
            "model.vocab_size is too small for these shards, or they are damaged"
            if self.manifest.format == "mmididx"
            else f"the shard is damaged: run `python -m data_prep verify {self.folder}`"
        )
        return DataError(
            f"{path}: token {offset + at} is {int(piece[at])}, the vocabulary has "
            f"{self.vocab_size} ids; {told}"
        )

"""The MMIDIDX `.idx` file, as Megatron-LM reads and writes it next to a `.bin` of raw token ids.

S sequences   D documents + 1   little-endian, packed, so the arrays are not aligned:

    9 bytes  b"MMIDIDX\\0\\0"      u64 version, 1      u8 dtype code      u64 S      u64 D
    i32 lengths[S] in tokens      i64 pointers[S] in bytes      i64 documents[D]
    i8 modes[S], in multimodal files only

`documents[d]` is the first sequence of document d; it begins with 0 and ends with S. A sequence may
have no token and a document no sequence. 34 + 12 S + 8 D bytes, and S more with modes.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import mmap
import os
import resource
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalite.errors import DataError

Integers = npt.NDArray[np.integer]
Dtype = np.dtype[np.integer]

DTYPES: dict[int, Dtype] = {
    1: np.dtype("uint8"),
    2: np.dtype("int8"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FORKED_CODES = (6, 7)  # float32/float64 in one fork, float64/float32 in another

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_CHECKED_AT_ONCE = 1 << 20  # sequences: 20 MB of temporaries however large the file is
_OUTLINE_STEP = 1024  # documents
_MOST_OPEN = 4096  # files
_INT64 = np.dtype("<i8")

HEADER_BYTES = _HEADER.size  # 34
LONGEST_SEQUENCE = 2**31 - 1  # tokens: lengths are int32


@dataclass(frozen=True)
class Header:
    """The first 34 bytes of an `.idx`, and what follows from them and the file's size."""

    dtype: Dtype
    sequences: int
    boundaries: int  # D: documents + 1
    has_modes: bool

    @property
    def pointers_offset(self) -> int:
        return HEADER_BYTES + 4 * self.sequences

    @property
    def documents_offset(self) -> int:
        return HEADER_BYTES + 12 * self.sequences


@dataclass(frozen=True)
class Index:
    """One `.idx`, checked; the arrays are views of the mapped file, unaligned and read-only.

    lengths [S] tokens; pointers [S] bytes; documents [D] sequences; modes [S] or None.
    """

    dtype: Dtype
    lengths: Integers
    pointers: Integers
    documents: Integers
    modes: Integers | None
    tokens: int
    header: Header

    def document_start(self, document: int) -> int:
        """Return the first token of a document, or of the end for the one past the last."""
        sequence = int(self.documents[document])
        if sequence == self.header.sequences:
            return self.tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Return the first token of each document, and the end: D numbers."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return np.concatenate(([0], ends))[self.documents]


def dtype_for(vocab_size: int) -> Dtype:
    """Return the dtype that shards of a vocabulary have: uint16 up to 65,536 ids, else int32."""
    return DTYPES[8] if vocab_size <= 1 << 16 else DTYPES[4]


def write_index(
    path: Path,
    lengths: Sequence[int] | Integers,
    document_indices: Sequence[int] | Integers,
    dtype: Dtype,
    modes: Sequence[int] | Integers | None = None,
) -> None:
    """Write an `.idx` whose sequences lie one after the other in the `.bin`.

    lengths [S] in tokens; document_indices [D], from 0 to S; modes [S] for multimodal files.
    """
    codes = [code for code, known in DTYPES.items() if known == dtype]
    assert codes, f"no MMIDIDX code for {dtype}"
    counts = np.asarray(lengths, dtype=np.int64)
    documents = np.asarray(document_indices, dtype="<i8")
    assert counts.size == 0 or 0 <= counts.min() <= counts.max() <= LONGEST_SEQUENCE
    assert (documents[0], documents[-1]) == (0, counts.size)
    pointers = (np.cumsum(counts) - counts) * dtype.itemsize
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, codes[0], counts.size, documents.size))
        file.write(counts.astype("<i4").tobytes())
        file.write(pointers.astype("<i8").tobytes())
        file.write(documents.tobytes())
        if modes is not None:
            assert len(modes) == counts.size
            file.write(np.asarray(modes, dtype=np.int8).tobytes())


def read_header(path: Path | str) -> Header:
    """Return the header of an `.idx`, checked against the file's size; 34 bytes are read.

    Raises:
        DataError: not an MMIDIDX file, another version, an unknown dtype code, a wrong size.
    """
    try:
        file = os.open(path, os.O_RDONLY)  # plain calls: thousands of shards are opened at once
        try:
            data = os.pread(file, HEADER_BYTES, 0)
            size = os.fstat(file).st_size
        finally:
            os.close(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, an .idx begins with {HEADER_BYTES}; it is cut")
    magic, version, code, sequences, boundaries = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise DataError(f"{path}: begins with {magic!r}, not with {_MAGIC!r}: not an .idx file")
    if version != _VERSION:
        raise DataError(f"{path}: version {version} of the format; only {_VERSION} is known")
    if code not in DTYPES:
        hint = " (it means different types in different forks)" if code in _FORKED_CODES else ""
        known = ", ".join(f"{key} {value.name}" for key, value in DTYPES.items())
        raise DataError(f"{path}: dtype code {code} is refused{hint}; known codes: {known}")
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if boundaries < 1 or size not in (expected, expected + sequences):
        raise DataError(
            f"{path}: {sequences} sequences and {boundaries} document boundaries make {expected} "
            f"bytes, the file has {size}; it is cut, or not what its header says"
        )
    return Header(DTYPES[code], sequences, boundaries, size != expected)


def read_index(path: Path, *, check: bool = True) -> Index:
    """Map an `.idx` and, unless that was done before, check its whole structure.

    Raises:
        DataError: as `read_header`; a negative length, a pointer that does not follow from the
            lengths, document boundaries that do not lead from the first sequence to the last.
    """
    header = read_header(path)
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(dtype: str, count: int, offset: int) -> Integers:
        return np.frombuffer(buffer, dtype=dtype, count=count, offset=offset)

    S, D = header.sequences, header.boundaries
    lengths = view("<i4", S, HEADER_BYTES)
    pointers = view("<i8", S, header.pointers_offset)
    documents = view("<i8", D, header.documents_offset)
    modes = view("i1", S, header.documents_offset + 8 * D) if header.has_modes else None
    if check:
        _check_sequences(path, lengths, pointers, header.dtype.itemsize)
        _check_documents(path, documents, S)
    tokens = int(pointers[-1]) // header.dtype.itemsize + int(lengths[-1]) if S else 0
    return Index(
        dtype=header.dtype,
        lengths=lengths,
        pointers=pointers,
        documents=documents,
        modes=modes,
        tokens=tokens,
        header=header,
    )


def _check_sequences(path: Path, lengths: Integers, pointers: Integers, itemsize: int) -> None:
    """Check that each sequence begins at the end of the one before it."""
    tokens = 0
    for first in range(0, len(lengths), _CHECKED_AT_ONCE):
        counts = lengths[first : first + _CHECKED_AT_ONCE].astype(np.int64)
        if counts.min() < 0:
            wrong = first + int(np.argmin(counts))
            raise DataError(f"{path}: sequence {wrong} has {int(lengths[wrong])} tokens")
        starts = (tokens + np.cumsum(counts) - counts) * itemsize
        found = pointers[first : first + _CHECKED_AT_ONCE]
        if not np.array_equal(starts, found):
            at = int(np.argmax(starts != found))
            raise DataError(
                f"{path}: sequence {first + at} points at byte {int(found[at])}, but those before "
                f"it end at {int(starts[at])}; the file is damaged"
            )
        tokens += int(counts.sum())


def _check_documents(path: Path, documents: Integers, sequences: int) -> None:
    if documents[0] != 0 or documents[-1] != sequences:
        raise DataError(
            f"{path}: document boundaries run from {int(documents[0])} to {int(documents[-1])}, "
            f"not from 0 to {sequences}; the file is damaged"
        )
    for first in range(0, len(documents) - 1, _CHECKED_AT_ONCE):
        steps = np.diff(documents[first : first + _CHECKED_AT_ONCE + 1])
        if steps.min() < 0:
            wrong = first + int(np.argmin(steps)) + 1
            raise DataError(
                f"{path}: document {wrong} begins before document {wrong - 1}; the file is damaged"
            )


class OpenFiles:
    """Reads parts of any number of files, of which the last used ones stay open.

    Reading by offset is as fast as a memory map where parts are a few KB, and a file that is cut
    or lost meanwhile is an error with its name, where a map ends the process by a signal. It is
    safe from several threads: a descriptor that is in use when its turn to go comes is closed after
    its use.
    """

    def __init__(self, most: int | None = None) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        half = soft // 2 if soft > 0 else _MOST_OPEN  # the other half is the rest of the process's
        self._opened = lru_cache(most or min(half, _MOST_OPEN))(_Descriptor)

    def read(self, path: str, dtype: Dtype, offset: int, count: int) -> Integers:
        """`count` numbers from byte `offset` on.

        Raises:
            DataError: the file cannot be read, or ends before.
        """
        values = np.empty(count, dtype)
        done = 0
        try:
            file = self._opened(path)  # by name, so that it outlives the read
            done = os.preadv(file.number, [values.data], offset)
            while done < values.nbytes:
                found = os.preadv(file.number, [values.view(np.uint8)[done:].data], offset + done)
                if not found:
                    raise DataError(
                        f"{path}: ends before byte {offset + values.nbytes}, it is cut: copy or "
                        "make it again"
                    )
                done += found
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return values


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class DocumentStarts:
    """Starts of the documents of one `.idx`, with every 1,024th in memory.

    A search then reads 8 KB of the file, and what is kept of a trillion tokens in documents of 500
    is 16 MB.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self._path = str(path)
        self._header = index.header
        self._itemsize = index.dtype.itemsize
        self._end = index.tokens * self._itemsize
        self._documents = len(index.documents) - 1
        self._sentences = not _counts_up(index.documents)  # several sequences a document, or none
        self._empty = self._sentences or bool(np.any(index.lengths == 0))  # some may hold nothing
        kept = np.array(index.documents[: self._documents : _OUTLINE_STEP])
        inside = kept < index.header.sequences
        outline = np.full(len(kept), self._end)  # bytes
        outline[inside] = index.pointers[kept[inside]]
        self._outline = array("q", outline.tobytes())  # bisected three times as fast as NumPy's

    def between(self, files: OpenFiles, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the first tokens of the documents that begin after `start` and before `stop`.

        They are in order. A document without tokens has the start of the next one, and cannot be
        distinguished from it.
        """
        first = start * self._itemsize
        last = min(stop * self._itemsize, self._end)
        low = max(0, bisect_right(self._outline, first) - 1) * _OUTLINE_STEP
        high = bisect_left(self._outline, last) * _OUTLINE_STEP
        begins = self._read(files, low, min(high, self._documents))
        begins = begins[begins.searchsorted(first, "right") : begins.searchsorted(last, "left")]
        found = (begins // self._itemsize).astype(np.int64, copy=False)
        return np.unique(found) if self._empty else found

    def _read(self, files: OpenFiles, low: int, high: int) -> Integers:
        """Return the first bytes of documents low to high, without those that begin at the end."""
        if high <= low:
            return np.empty(0, _INT64)
        if not self._sentences:
            offset = self._header.pointers_offset + 8 * low
            return files.read(self._path, _INT64, offset, high - low)
        offset = self._header.documents_offset + 8 * low
        sequences = files.read(self._path, _INT64, offset, high - low)
        sequences = sequences[sequences < self._header.sequences]
        if not sequences.size:
            return sequences
        first = int(sequences[0])
        last = int(sequences[-1])
        offset = self._header.pointers_offset + 8 * first
        pointers = files.read(self._path, _INT64, offset, last + 1 - first)
        return pointers[sequences - first]


def _counts_up(documents: Integers) -> bool:
    """Return whether each document is one sequence."""
    firsts = range(0, len(documents), _CHECKED_AT_ONCE)
    parts = ((first, documents[first : first + _CHECKED_AT_ONCE]) for first in firsts)
    return all(np.array_equal(part, np.arange(n, n + len(part))) for n, part in parts)

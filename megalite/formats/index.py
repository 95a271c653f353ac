"""Megatron-LM's MMIDIDX index: the `.idx` file of a `.bin` file of raw token ids.

S is the number of sequences, D the number of documents plus one. The file is little-endian and
packed, so its arrays are not aligned:

    9 bytes  b"MMIDIDX\\0\\0"      u64 version, 1      u8 dtype code      u64 S      u64 D
    i32 lengths[S] in tokens      i64 pointers[S] in bytes      i64 documents[D]
    i8 modes[S], in multimodal files only

`documents[d]` is the first sequence of document d; the array begins with 0 and ends with S. A
sequence may have no tokens, and a document no sequences. The file has 34 + 12 S + 8 D bytes, plus S
bytes of modes. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
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
_CHUNK = 1 << 20  # sequences checked at a time, with 20 MB of temporary arrays
_OUTLINE_STEP = 1024  # documents
_MAX_OPEN = 4096  # files
_INT64 = np.dtype("<i8")
_DAMAGED = "the file is damaged: copy or make it again"

HEADER_BYTES = _HEADER.size  # 34
LONGEST_SEQUENCE = 2**31 - 1  # tokens: lengths are int32


@dataclass(frozen=True)
class Header:
    """The header of an `.idx` file: its first 34 bytes, and whether it has modes."""

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
    """An `.idx` file; the arrays are unaligned, read-only views of the mapped file.

    lengths [S] in tokens; pointers [S] in bytes; documents [D] in sequences; modes [S] or None.
    """

    dtype: Dtype
    lengths: Integers
    pointers: Integers
    documents: Integers
    modes: Integers | None
    tokens: int
    header: Header

    def document_start(self, document: int) -> int:
        """Return the first token of a document; the end of the tokens for `document` D - 1."""
        sequence = int(self.documents[document])
        if sequence == self.header.sequences:
            return self.tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Return the first token of each document and the end of the last one: D numbers."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return np.concatenate(([0], ends))[self.documents]


def dtype_for(vocab_size: int) -> Dtype:
    """Return the dtype of shards with a vocabulary: uint16 up to 65,536 ids, else int32."""
    return DTYPES[8] if vocab_size <= 1 << 16 else DTYPES[4]


def write_index(
    path: Path,
    lengths: Sequence[int] | Integers,
    document_indices: Sequence[int] | Integers,
    dtype: Dtype,
    modes: Sequence[int] | Integers | None = None,
) -> None:
    """Write the `.idx` of a `.bin` that contains the sequences without gaps.

    lengths [S] in tokens; document_indices [D], from 0 to S; modes [S] for multimodal files.
    """
    codes = [code for code, value in DTYPES.items() if value == dtype]
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
    """Read the header of an `.idx` and compare it with the file's size. Only 34 bytes are read.

    Raises:
        DataError: it is not an MMIDIDX file, or has another version, an unknown dtype code or the
            wrong size.
    """
    try:
        file = os.open(path, os.O_RDONLY)  # system calls, because thousands of shards are opened
        try:
            data = os.pread(file, HEADER_BYTES, 0)
            size = os.fstat(file).st_size
        finally:
            os.close(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) < HEADER_BYTES:
        raise DataError(
            f"{path}: got {size} bytes, but the header alone has {HEADER_BYTES}; the file is "
            "truncated: copy or make it again"
        )
    magic, version, code, sequences, boundaries = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise DataError(f"{path}: begins with {magic!r}, not with {_MAGIC!r}: not an .idx file")
    if version != _VERSION:
        raise DataError(
            f"{path}: got version {version} of the format; only {_VERSION} is supported"
        )
    if code not in DTYPES:
        hint = " (it means different types in different forks)" if code in _FORKED_CODES else ""
        codes = ", ".join(f"{key} {value.name}" for key, value in DTYPES.items())
        raise DataError(f"{path}: dtype code {code} is refused{hint}; supported codes: {codes}")
    expected = HEADER_BYTES + 12 * sequences + 8 * boundaries
    if boundaries < 1 or size not in (expected, expected + sequences):
        raise DataError(
            f"{path}: {sequences} sequences and {boundaries} document boundaries take {expected} "
            f"bytes, the file has {size}; {_DAMAGED}"
        )
    return Header(DTYPES[code], sequences, boundaries, size != expected)


def read_index(path: Path, *, check: bool = True) -> Index:
    """Map an `.idx`.

    Args:
        check: If true, check all lengths, pointers and document boundaries.
    Raises:
        DataError: as `read_header`; a length is negative, a pointer contradicts the lengths, or
            the document boundaries do not increase from 0 to S.
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
    for first in range(0, len(lengths), _CHUNK):
        counts = lengths[first : first + _CHUNK].astype(np.int64)
        if counts.min() < 0:
            wrong = first + int(np.argmin(counts))
            raise DataError(
                f"{path}: sequence {wrong} has {int(lengths[wrong])} tokens; {_DAMAGED}"
            )
        expected = (tokens + np.cumsum(counts) - counts) * itemsize
        actual = pointers[first : first + _CHUNK]
        if not np.array_equal(expected, actual):
            at = int(np.argmax(expected != actual))
            raise DataError(
                f"{path}: sequence {first + at} points at byte {int(actual[at])}, but those before "
                f"it end at {int(expected[at])}; {_DAMAGED}"
            )
        tokens += int(counts.sum())


def _check_documents(path: Path, documents: Integers, sequences: int) -> None:
    if documents[0] != 0 or documents[-1] != sequences:
        raise DataError(
            f"{path}: document boundaries run from {int(documents[0])} to {int(documents[-1])}, "
            f"not from 0 to {sequences}; {_DAMAGED}"
        )
    for first in range(0, len(documents) - 1, _CHUNK):
        steps = np.diff(documents[first : first + _CHUNK + 1])
        if steps.min() < 0:
            wrong = first + int(np.argmin(steps)) + 1
            raise DataError(
                f"{path}: document {wrong} begins before document {wrong - 1}; {_DAMAGED}"
            )


class OpenFiles:
    """Reader of parts of many files, with a cache of open files.

    For parts of a few KB this is as fast as a memory map. If a file is truncated or lost while in
    use, it raises an error with the file's name; a map would kill the process by a signal.
    Several threads may use it: a file evicted from the cache is closed after its last read.
    """

    def __init__(self, most: int | None = None) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        half = soft // 2 if soft > 0 else _MAX_OPEN  # the rest of the process gets the other half
        self._opened = lru_cache(most or min(half, _MAX_OPEN))(_Descriptor)

    def read(self, path: str, dtype: Dtype, offset: int, count: int) -> Integers:
        """Read `count` numbers from byte `offset` on.

        Raises:
            DataError: the file cannot be read, or is too short.
        """
        values = np.empty(count, dtype)
        done = 0
        try:
            file = self._opened(path)  # this reference keeps the file open during the read
            done = os.preadv(file.number, [values.data], offset)
            while done < values.nbytes:
                size = os.preadv(file.number, [values.view(np.uint8)[done:].data], offset + done)
                if not size:
                    raise DataError(
                        f"{path}: ends before byte {offset + values.nbytes}; the file is "
                        "truncated: copy or make it again"
                    )
                done += size
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
    """Document starts of one `.idx`, of which every 1,024th is in memory.

    A search reads 8 KB of the file. For a trillion tokens in documents of 500, memory holds 16 MB.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self._path = str(path)
        self._header = index.header
        self._itemsize = index.dtype.itemsize
        self._end = index.tokens * self._itemsize
        self._documents = len(index.documents) - 1
        self._one_sequence_each = _is_one_sequence_each(index.documents)
        self._may_be_empty = not self._one_sequence_each or bool(np.any(index.lengths == 0))
        sequences = np.array(index.documents[: self._documents : _OUTLINE_STEP])
        inside = sequences < index.header.sequences
        outline = np.full(len(sequences), self._end)  # bytes
        outline[inside] = index.pointers[sequences[inside]]
        self._outline = array("q", outline.tobytes())  # bisect is three times as fast as on NumPy's

    def between(self, files: OpenFiles, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the sorted, distinct first tokens of documents strictly between two tokens.

        A document without tokens begins at the next document's first token.
        """
        first = start * self._itemsize
        last = min(stop * self._itemsize, self._end)
        low = max(0, bisect_right(self._outline, first) - 1) * _OUTLINE_STEP
        high = bisect_left(self._outline, last) * _OUTLINE_STEP
        begins = self._read(files, low, min(high, self._documents))
        begins = begins[begins.searchsorted(first, "right") : begins.searchsorted(last, "left")]
        tokens = (begins // self._itemsize).astype(np.int64, copy=False)
        return np.unique(tokens) if self._may_be_empty else tokens

    def _read(self, files: OpenFiles, low: int, high: int) -> Integers:
        """Return the first bytes of documents low to high, except those at the end of the file."""
        if high <= low:
            return np.empty(0, _INT64)
        if self._one_sequence_each:
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


def _is_one_sequence_each(documents: Integers) -> bool:
    """Return whether each document is one sequence."""
    firsts = range(0, len(documents), _CHUNK)
    parts = ((first, documents[first : first + _CHUNK]) for first in firsts)
    return all(np.array_equal(part, np.arange(n, n + len(part))) for n, part in parts)

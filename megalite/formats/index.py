"""The MMIDIDX `.idx` file, as Megatron-LM reads and writes it beside a `.bin` of raw token ids.

S sequences   D documents + 1   little-endian, packed, so the arrays are not aligned:

    9 bytes  b"MMIDIDX\\0\\0"      u64 version, 1      u8 dtype code      u64 S      u64 D
    i32 lengths[S] in tokens      i64 pointers[S] in bytes      i64 documents[D]
    i8 modes[S], in multimodal files only

`documents[d]` is the first sequence of document d; it begins with 0 and ends with S. A sequence may
have no token and a document no sequence. 34 + 12 S + 8 D bytes, and S more with modes.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
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
    buffer: memoryview
    header: Header

    def document_start(self, document: int) -> int:
        """The first token of a document, or of the end for the one past the last.

        Two reads of 8 bytes at their place: a binary search through it touches a few pages of a
        file of any size, where `np.searchsorted` would first copy the unaligned array.
        """
        (sequence,) = _INT64.unpack_from(self.buffer, self.header.documents_offset + 8 * document)
        if sequence == self.header.sequences:
            return self.tokens
        (pointer,) = _INT64.unpack_from(self.buffer, self.header.pointers_offset + 8 * sequence)
        return int(pointer) // self.dtype.itemsize


_INT64 = struct.Struct("<q")


def dtype_for(vocab_size: int) -> Dtype:
    """The dtype that shards of a vocabulary have: uint16 up to 65,536 ids, else int32."""
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


def read_header(path: Path) -> Header:
    """The header of an `.idx`, checked against the file's size; 34 bytes are read.

    Raises:
        DataError: not an MMIDIDX file, another version, an unknown dtype code, a wrong size.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(HEADER_BYTES)
            size = file.seek(0, 2)
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
    buffer = np.memmap(path, dtype=np.uint8, mode="r").data

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
    return Index(header.dtype, lengths, pointers, documents, modes, tokens, buffer, header)


def _check_sequences(path: Path, lengths: Integers, pointers: Integers, itemsize: int) -> None:
    """Each sequence must begin where the one before it ends."""
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

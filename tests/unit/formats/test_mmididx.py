# covers: megalite/formats/index.py
"""The `.idx` format, byte for byte as Megatron-LM writes it (commit d98e8a64ddf3)."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.errors import DataError
from megalite.formats import index as module
from megalite.formats.index import (
    DTYPES,
    DocumentStarts,
    OpenFiles,
    dtype_for,
    read_header,
    read_index,
    write_index,
)

HEAD = "4d4d4944494458000001000000000000000"  # magic and version 1; the dtype code follows


def words(size: int, *numbers: int) -> str:
    return b"".join(number.to_bytes(size, "little") for number in numbers).hex()


# name: (.idx in hexadecimal, dtype, lengths, pointers, documents, modes, document starts)
GOLDEN = {
    "three documents": (
        HEAD + "8" + words(8, 3, 4) + words(4, 3, 2, 4) + words(8, 0, 6, 10, 0, 1, 2, 3),
        ("uint16", [3, 2, 4], [0, 6, 10], [0, 1, 2, 3], None, [0, 3, 5, 9]),
    ),
    "several sequences a document, int32": (
        HEAD + "4" + words(8, 3, 3) + words(4, 2, 3, 1) + words(8, 0, 8, 20, 0, 2, 3),
        ("int32", [2, 3, 1], [0, 8, 20], [0, 2, 3], None, [0, 5, 6]),
    ),
    "a document without a sequence": (
        HEAD + "8" + words(8, 2, 4) + words(4, 1, 2) + words(8, 0, 2, 0, 1, 1, 2),
        ("uint16", [1, 2], [0, 2], [0, 1, 1, 2], None, [0, 1, 1, 3]),
    ),
    "a sequence without a token": (
        HEAD + "8" + words(8, 3, 4) + words(4, 1, 0, 2) + words(8, 0, 2, 2, 0, 1, 2, 3),
        ("uint16", [1, 0, 2], [0, 2, 2], [0, 1, 2, 3], None, [0, 1, 1, 3]),
    ),
    "multimodal": (
        HEAD + "8" + words(8, 2, 2) + words(4, 2, 1) + words(8, 0, 4, 0, 2) + "0001",
        ("uint16", [2, 1], [0, 4], [0, 2], [0, 1], [0, 3]),
    ),
}
# One file byte by byte, in case the composition of the others has a mistake.
THREE_DOCUMENTS = (
    "4d4d494449445800000100000000000000080300000000000000040000000000000003000000020000000400000000"
    "00000000000000060000000000000"
    "00a000000000000000000000000000000010000000000000002000000000000000300000000000000"
)


def test_golden_file_is_composed_correctly() -> None:
    assert GOLDEN["three documents"][0] == THREE_DOCUMENTS


@pytest.mark.parametrize("name", GOLDEN)
def test_index_is_read_and_rewritten_byte_for_byte(name: str, tmp_path: Path) -> None:
    content, (dtype, lengths, pointers, documents, modes, starts) = GOLDEN[name]
    path, again = tmp_path / "a.idx", tmp_path / "b.idx"
    path.write_bytes(bytes.fromhex(content))
    index = read_index(path)
    assert index.dtype.name == dtype
    assert index.lengths.tolist() == lengths
    assert index.pointers.tolist() == pointers
    assert index.documents.tolist() == documents
    assert (None if index.modes is None else index.modes.tolist()) == modes
    assert [index.document_start(number) for number in range(len(documents))] == starts
    assert index.tokens == sum(lengths)
    write_index(again, index.lengths, index.documents, index.dtype, index.modes)
    assert again.read_bytes() == path.read_bytes()


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=6),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_index_is_read_as_written(
    lengths: list[int],
    cuts: list[int],
    dtype: np.dtype[np.integer],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    size = len(lengths)
    documents = [0, *sorted(min(cut, size) for cut in cuts), size]
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    write_index(path, lengths, documents, dtype)
    assert path.stat().st_size == 34 + 12 * size + 8 * len(documents)
    index = read_index(path)
    assert (index.dtype, index.lengths.tolist()) == (dtype, lengths)
    assert index.documents.tolist() == documents
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    assert [index.document_start(n) for n in range(len(documents))] == starts.tolist()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 3), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=30) | st.none(),
    bounds=st.tuples(st.integers(-2, 70), st.integers(-2, 70)),
    step=st.integers(1, 5),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_document_starts_are_searched_in_parts_of_the_file(
    lengths: list[int],
    cuts: list[int] | None,
    bounds: tuple[int, int],
    step: int,
    dtype: np.dtype[np.integer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Documents have one sequence or any number; one in `step` documents is in memory."""
    monkeypatch.setattr(module, "_OUTLINE_STEP", step)
    size = len(lengths)
    inner = range(1, size) if cuts is None else sorted(min(cut, size) for cut in cuts)
    documents = [0, *inner, size] if size else [0]
    path = tmp_path / "a.idx"
    write_index(path, lengths, documents, dtype)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents[:-1]]
    low, high = sorted(bounds)
    expected = {one for one in starts.tolist() if low < one < min(high, sum(lengths))}
    between = DocumentStarts(path, read_index(path)).between(OpenFiles(), low, high)
    assert sorted(between.tolist()) == between.tolist()
    assert set(between.tolist()) == expected


def test_open_files_are_closed_beyond_the_limit_and_reopened(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}") for number in range(5)]
    for number, path in enumerate(paths):
        np.arange(number, number + 10, dtype="<u2").tofile(path)
    files = OpenFiles(most=2)
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        for number, path in enumerate(paths):
            assert files.read(path, DTYPES[8], 4, 3).tolist() == [number + 2 + k for k in range(3)]
    assert files.read(paths[0], DTYPES[8], 4, 0).size == 0
    assert len(os.listdir("/dev/fd")) == before + 2
    with pytest.raises(DataError, match=r"4: ends before byte 22; the file is truncated"):
        files.read(paths[4], DTYPES[8], 16, 3)
    with pytest.raises(DataError, match=r"none: cannot be read: No such file"):
        files.read(str(tmp_path / "none"), DTYPES[8], 0, 1)
    del files
    assert len(os.listdir("/dev/fd")) == before


def test_open_files_are_shared_by_many_threads(tmp_path: Path) -> None:
    """A file that another thread evicts from the cache stays open until its reader is done."""
    paths = [str(tmp_path / f"{number}") for number in range(8)]
    for number, path in enumerate(paths):
        np.full(1000, number, dtype="<u2").tofile(path)
    files = OpenFiles(most=1)

    def read(seed: int) -> bool:
        chosen = np.random.default_rng(seed).integers(0, 8, 400)
        return all((files.read(paths[n], DTYPES[8], 0, 1000) == n).all() for n in chosen)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


def edit(content: bytes, position: int, packed: bytes) -> bytes:
    return content[:position] + packed + content[position + len(packed) :]


# A message, and the damage that it reports.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "begins with": lambda data: b"MMIDIDY" + data[7:],
    "version 2": lambda data: edit(data, 9, struct.pack("<Q", 2)),
    "code 7 is refused (it means different": lambda data: edit(data, 17, b"\x07"),
    "code 9 is refused; supported codes: 1 uint8": lambda data: edit(data, 17, b"\x09"),
    "102 bytes, the file has 101": lambda data: data[:-1],
    "102 bytes, the file has 110": lambda data: data + bytes(8),
    "got 20 bytes, but the header alone has 34": lambda data: data[:20],
    "got 0 bytes, but the header alone has 34": lambda data: b"",
    "sequence 1 has -2 tokens": lambda data: edit(data, 38, struct.pack("<i", -2)),
    "sequence 2 points at byte 8, but those before it end at 10": lambda data: edit(
        data, 62, struct.pack("<q", 8)
    ),
    "sequence 1 points at byte 6, but those before it end at 8": lambda data: edit(
        data, 34, struct.pack("<i", 4)
    ),
    "boundaries run from 0 to 4, not from 0 to 3": lambda data: edit(
        data, 94, struct.pack("<q", 4)
    ),
    "document 2 begins before document 1": lambda data: edit(data, 78, struct.pack("<q", 3)),
    "and 0 document boundaries": lambda data: edit(data[:70], 26, struct.pack("<Q", 0)),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_index_is_reported(message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(DAMAGES[message](bytes.fromhex(THREE_DOCUMENTS)))
    with pytest.raises(DataError) as caught:
        read_index(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_header_of_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.idx")


def test_dtype_depends_on_the_vocabulary_size() -> None:
    assert [dtype_for(size).name for size in (258, 65_536, 65_537)] == ["uint16", "uint16", "int32"]


EDIT = st.tuples(st.integers(0, 130), st.binary(min_size=1, max_size=9))


@settings(
    max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(sorted(GOLDEN)), st.lists(EDIT, max_size=3), st.integers(-20, 20), st.binary()
)
def test_index_of_any_bytes_is_refused_or_read_correctly(
    tmp_path: Path, name: str, edits: list[tuple[int, bytes]], end: int, tail: bytes
) -> None:
    content = bytes.fromhex(GOLDEN[name][0])
    for position, packed in edits:
        content = edit(content, position, packed)
    content = content[:end] if end < 0 else content + tail[:end]
    path = tmp_path / "any.idx"
    path.write_bytes(content)
    try:
        index = read_index(path)
    except DataError as error:
        if str(path) not in str(error):
            raise
        return
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", content, 9)
    assert (content[:9], version) == (b"MMIDIDX\0\0", 1)
    assert index.dtype == DTYPES[code]
    assert len(content) in (
        34 + 12 * sequences + 8 * boundaries,
        34 + 13 * sequences + 8 * boundaries,
    )
    lengths = struct.unpack_from(f"<{sequences}i", content, 34)
    pointers = struct.unpack_from(f"<{sequences}q", content, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{boundaries}q", content, 34 + 12 * sequences)
    assert [tuple(index.lengths), tuple(index.pointers)] == [lengths, pointers]
    assert tuple(index.documents) == documents
    assert min(lengths, default=0) >= 0
    assert list(pointers) == [
        sum(lengths[:number]) * index.dtype.itemsize for number in range(sequences)
    ]
    assert list(documents) == sorted(documents)
    assert (documents[0], documents[-1]) == (0, sequences)

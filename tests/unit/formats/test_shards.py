# covers: megalite/formats/shards.py megalite/formats/manifest.py
from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.errors import DataError
from megalite.formats.index import DTYPES, OpenFiles, write_index
from megalite.formats.manifest import fingerprint, load_manifest
from megalite.formats.shards import ShardWriter, open_shards
from megalite.formats.verify import verify_folder

MakeFolder = Callable[..., Path]
SHARDS = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10], [11, 12]]]
STREAM = list(range(1, 13))


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove_index_hashes(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards=[{**shard, "index_sha256": None} for shard in shards])


def test_stream_is_read_from_any_token_to_any_other(make_folder: MakeFolder) -> None:
    shards = open_shards(make_folder(SHARDS), verify=True)
    assert (shards.tokens, shards.documents, shards.vocab_size) == (12, 5, 100)
    assert shards.dtype == np.dtype("<u2")
    for start in range(13):
        for stop in range(start, 13):
            ids = shards.read(start, stop - start)
            assert ids.tolist() == STREAM[start:stop]
            assert ids.dtype == shards.dtype


def test_documents_are_read_by_number(make_folder: MakeFolder) -> None:
    shards = open_shards(make_folder(SHARDS))
    documents = [document for shard in SHARDS for document in shard]
    assert [shards.document(number).tolist() for number in range(5)] == documents
    assert [shards.document_lengths(number).tolist() for number in range(3)] == [
        [3, 2],
        [1],
        [4, 2],
    ]
    assert shards.document_starts(0, 12).tolist() == [3, 5, 6, 10]
    assert shards.document_starts(3, 10).tolist() == [5, 6]
    assert shards.document_starts(-1, 1).tolist() == [0]
    assert shards.document_starts(5, 6).tolist() == []


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=5),
    data=st.data(),
)
def test_document_starts_with_empty_documents_and_shards(
    lengths: list[list[int]], data: st.DataObject, make_folder: MakeFolder
) -> None:
    folder = make_folder([[[1] * n for n in shard] for shard in lengths])
    try:
        shards = open_shards(folder)
        flat = [n for shard in lengths for n in shard]
        starts = set(list(accumulate(flat, initial=0))[:-1]) - {sum(flat)}
        begin = data.draw(st.integers(0, sum(flat)))
        end = data.draw(st.integers(begin, sum(flat)))
        expected = sorted(start for start in starts if begin < start < end)
        assert shards.document_starts(begin, end).tolist() == expected
        assert [shards.document(n).size for n in range(len(flat))] == flat
    finally:
        shutil.rmtree(folder)


def test_document_may_have_several_sequences(make_folder: MakeFolder) -> None:
    """Megatron-LM writes a sequence for each sentence. Document 0 has two, 1 none, 2 one."""
    folder = make_folder([[[10, 11, 12, 13, 14], [], [70000]]], vocab_size=70001)
    write_index(folder / "shard_00000.idx", [2, 3, 1], [0, 2, 2, 3], DTYPES[4])
    remove_index_hashes(folder)
    shards = open_shards(folder)
    assert shards.document(0).tolist() == [10, 11, 12, 13, 14]
    assert shards.document(1).tolist() == []
    assert shards.document(2).tolist() == [70000]
    assert shards.document_starts(0, 6).tolist() == [5]
    assert shards.document_lengths(0).tolist() == [5, 0, 1]


def test_stream_may_have_more_shards_than_open_files(make_folder: MakeFolder) -> None:
    shards = open_shards(make_folder([[[n, n]] for n in range(90)]), files=OpenFiles(most=7))
    for _ in range(2):
        assert shards.read(0, 180).tolist() == [n for n in range(90) for _ in range(2)]
        assert shards.document_starts(0, 180).size == 89


@pytest.mark.parametrize(("bad", "vocab_size"), [(-1, 100), (100, 100), (70_000, 65_536)])
def test_writer_refuses_bad_ids_before_the_cast(bad: int, vocab_size: int, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "a", DTYPES[8], vocab_size=vocab_size) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match=rf"document 1 has token id {bad}, outside 0 to"):
            writer.add_document([5, bad, 6])
        info = writer.close()
    assert (info.documents, info.tokens, info.bytes) == (1, 1, 2)
    assert (tmp_path / "a.bin").read_bytes() == b"\x01\x00"


def test_writer_accepts_the_highest_id_of_a_full_vocabulary(make_folder: MakeFolder) -> None:
    assert open_shards(make_folder([[[65535, 0]]], vocab_size=65536)).read(0, 2).tolist() == [
        65535,
        0,
    ]
    large = open_shards(make_folder([[[70000]]], vocab_size=70001, name="large"))
    assert large.dtype == np.dtype("<i4")
    assert large.read(0, 1).tolist() == [70000]


def test_fingerprint_depends_on_the_tokens(make_folder: MakeFolder) -> None:
    one = make_folder(SHARDS)
    same, other = make_folder(SHARDS, name="same"), make_folder(SHARDS[::-1], name="other")
    edit_manifest(same, arguments={"input": "elsewhere"})
    before = open_shards(one).fingerprint
    assert len(before) == 64
    assert open_shards(same).fingerprint == before == fingerprint(load_manifest(one))
    assert open_shards(other).fingerprint != before
    edit_manifest(same, eos=3)
    assert open_shards(same).fingerprint != before


def truncate(folder: Path) -> None:
    path = folder / "shard_00000.bin"
    path.write_bytes(path.read_bytes()[:-3])


def set_id(folder: Path, value: int) -> None:
    path = folder / "shard_00000.bin"
    path.write_bytes(struct.pack("<H", value) + path.read_bytes()[2:])


def swap_index(folder: Path) -> None:
    """Write an index with the same counts and total, which only its hash reveals."""
    write_index(folder / "shard_00000.idx", [2, 3], [0, 1, 2], DTYPES[8])


# A message, and the damage that it reports.
FAULTS: dict[str, Callable[[Path], object]] = {
    "shard_00000.bin: got 7 bytes, the manifest says 10 (5 tokens of uint16); the file is "
    "truncated": truncate,
    "12 bytes, the manifest says 10": lambda folder: (folder / "shard_00000.bin").write_bytes(
        bytes(12)
    ),
    "shard_00001.bin: missing": lambda folder: (folder / "shard_00001.bin").unlink(),
    "shard_00001.idx: missing": lambda folder: (folder / "shard_00001.idx").unlink(),
    "1 documents, the manifest says 2; it belongs to another .bin": lambda folder: shutil.copy(
        folder / "shard_00001.idx", folder / "shard_00000.idx"
    ),
    "got 6 tokens in its sequences, the manifest says 5": lambda folder: shutil.copy(
        folder / "shard_00002.idx", folder / "shard_00000.idx"
    ),
    "shard_00000.idx: got sha256": swap_index,
    "got int32, the manifest says uint16": lambda folder: write_index(
        folder / "shard_00000.idx", [3, 2], [0, 1, 2], DTYPES[4]
    ),
    "the file has 74; the file is damaged": lambda folder: (folder / "shard_00000.idx").write_bytes(
        (folder / "shard_00000.idx").read_bytes()[:-8]
    ),
    "manifest.json: tokens 13, but its shards add up to 12": lambda folder: edit_manifest(
        folder, tokens=13
    ),
    "manifest.json: documents 4, but": lambda folder: edit_manifest(folder, documents=4),
    "vocab_size 70000 does not fit in uint16": lambda folder: edit_manifest(
        folder, vocab_size=70000
    ),
    "eos 100 is not below": lambda folder: edit_manifest(folder, eos=100),
    "manifest.json: dtype: Input should be 'uint8'": lambda folder: edit_manifest(
        folder, dtype="float32"
    ),
    "vocab_size: Input should be a valid integer": lambda folder: edit_manifest(
        folder, vocab_size="100"
    ),
    "format: Input should be 'megalite-shards-1'": lambda folder: edit_manifest(
        folder, format="other"
    ),
    "not valid JSON": lambda folder: (folder / "manifest.json").write_text('{"format"'),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "does not exist": lambda folder: folder.rename(folder.with_name("moved")),
}


@pytest.mark.parametrize("message", FAULTS)
def test_folder_with_damage_is_not_opened(message: str, make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS)
    FAULTS[message](folder)
    with pytest.raises(DataError) as caught:
        open_shards(folder)
    assert message in str(caught.value)
    if folder.exists():
        assert message in "\n".join(verify_folder(folder))


def test_indices_too_large_to_check_at_once_are_checked_at_their_first_use(
    make_folder: MakeFolder,
) -> None:
    folder = make_folder(SHARDS)
    swap_index(folder)
    shards = open_shards(folder, check_bytes=0)
    assert shards.read(0, 12).tolist() == STREAM
    assert shards.document_starts(6, 12).tolist() == [10]
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard_00000\.idx: got sha256"):
            shards.document_starts(0, 12)


def test_faults_are_reported_together_up_to_a_limit(make_folder: MakeFolder) -> None:
    folder = make_folder([[[1]]] * 30)
    for path in folder.glob("*.bin"):
        path.unlink()
    with pytest.raises(DataError) as caught:
        open_shards(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("and 10 more faults")


def test_shard_name_cannot_leave_the_folder(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards=[{**shards[0], "name": "../other"}, *shards[1:]])
    with pytest.raises(DataError, match=r"shards\.0\.name: String should match"):
        open_shards(folder)


def test_id_outside_the_vocabulary_is_reported_when_read(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS)
    set_id(folder, 100)
    shards = open_shards(folder)
    assert shards.read(1, 11).tolist() == STREAM[1:]
    with pytest.raises(
        DataError, match=r"shard_00000\.bin: token 0 is 100, the vocabulary has 100"
    ):
        shards.read(0, 12)


def test_negative_id_is_outside_the_vocabulary(make_folder: MakeFolder) -> None:
    folder = make_folder([[[1, 2]]], vocab_size=70_000)
    np.array([1, -1], "<i4").tofile(folder / "shard_00000.bin")
    with pytest.raises(DataError, match=r"token 1 is -1"):
        open_shards(folder).read(0, 2)
    assert any("token 1 is outside" in fault for fault in verify_folder(folder))


def test_changed_byte_is_reported_with_verify(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS)
    set_id(folder, 99)
    assert open_shards(folder).read(0, 1).tolist() == [99]
    shards = open_shards(folder, verify=True)
    assert shards.read(5, 7).tolist() == STREAM[5:]  # of the other shards
    with pytest.raises(DataError, match=r"shard_00000\.bin: got sha256 .* the file changed"):
        shards.read(0, 1)


def test_shard_truncated_after_opening_is_reported(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS)
    shards = open_shards(folder)
    truncate(folder)
    with pytest.raises(DataError, match="the file is truncated"):
        shards.read(0, 1)


def test_shard_truncated_while_in_use_is_reported(make_folder: MakeFolder) -> None:
    """A memory map would kill the process by SIGBUS."""
    folder = make_folder([[[1] * 9000]])
    shards = open_shards(folder)
    assert shards.read(8000, 1000).tolist() == [1] * 1000
    (folder / "shard_00000.bin").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"shard_00000\.bin: ends before byte 18000; the file is truncated"
    ):
        shards.read(8000, 1000)

# covers: megalite/formats/verify.py
from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.errors import DataError
from megalite.formats.verify import verify_folder

MakeFolder = Callable[..., Path]
SHARDS = [[[1, 2, 3], [4, 5]], [[6]]]


def overwrite(path: Path, place: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


def test_a_whole_folder_has_no_fault(make_folder: MakeFolder) -> None:
    assert verify_folder(make_folder(SHARDS, vocab_size=258)) == []
    assert verify_folder(make_folder([], name="empty", vocab_size=258)) == []


def test_a_flipped_bit_anywhere_is_found(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    for path in [*folder.glob("shard_*"), folder / "tokenizer" / "bytes.json"]:
        content = path.read_bytes()
        for place in range(len(content)):
            overwrite(path, place, bytes([content[place] ^ 1]))
            assert any(str(path) in fault for fault in verify_folder(folder)), (path, place)
            overwrite(path, place, content[place : place + 1])
    assert verify_folder(folder) == []


def test_an_id_out_of_range_is_placed(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    overwrite(folder / "shard_00000.bin", 6, struct.pack("<H", 300))
    faults = verify_folder(folder)
    assert len(faults) == 2
    assert "sha256" in faults[0]
    assert "token 3 lies outside the vocabulary of 258 ids" in faults[1]


def test_every_fault_of_every_shard_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    (folder / "shard_00000.bin").unlink()
    (folder / "shard_00001.idx").unlink()
    (folder / "shard_00007.bin").write_bytes(b"")
    (folder / "tokenizer" / "bytes.json").unlink()
    faults = verify_folder(folder)
    assert [fault.split(": ")[0].rsplit("/")[-1] for fault in faults] == [
        "shard_00000.bin",
        "shard_00001.idx",
        "bytes.json",
        "shard_00007.bin",
    ]


def test_a_bad_manifest_is_a_fault_and_no_folder_an_error(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    (folder / "manifest.json").write_text("[]")
    assert "manifest.json: the whole file" in verify_folder(folder)[0]
    (folder / "manifest.json").unlink()
    assert "has no manifest.json" in verify_folder(folder)[0]
    with pytest.raises(DataError, match="there is no folder"):
        verify_folder(folder / "none")


def test_a_manifest_edited_by_hand_is_found(make_folder: MakeFolder) -> None:
    """What the tokenizer next to it, or the documents' ends, can tell."""
    folder = make_folder([[[1, 2, 257], [4, 257]], [[257], []]], vocab_size=258)
    path = folder / "manifest.json"
    whole = path.read_text()
    for key, found, value, told in (
        ("eos", "null", "257", None),
        ("eos", "null", "256", "eos is 256, the tokenizer next to it says 257"),
        ("eos", "null", "256", "document 0 has id 257 where the manifest says eos 256"),
        ("bos", "null", "256", "document 0 has id 1 where the manifest says bos 256"),
        ("vocab_size", "258", "300", "vocab_size is 300, the tokenizer next to it says 258"),
    ):
        path.write_text(whole.replace(f'"{key}": {found}', f'"{key}": {value}'))
        faults = verify_folder(folder)
        assert faults == [] if told is None else any(told in fault for fault in faults), faults

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


def overwrite(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


def test_folder_without_damage_has_no_faults(make_folder: MakeFolder) -> None:
    assert verify_folder(make_folder(SHARDS, vocab_size=258)) == []
    assert verify_folder(make_folder([], name="empty", vocab_size=258)) == []


def test_folder_with_any_flipped_bit_has_a_fault(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    for path in [*folder.glob("shard_*"), folder / "tokenizer" / "bytes.json"]:
        content = path.read_bytes()
        for position in range(len(content)):
            overwrite(path, position, bytes([content[position] ^ 1]))
            assert any(str(path) in fault for fault in verify_folder(folder)), (path, position)
            overwrite(path, position, content[position : position + 1])
    assert verify_folder(folder) == []


def test_id_out_of_range_is_reported_with_its_position(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    overwrite(folder / "shard_00000.bin", 6, struct.pack("<H", 300))
    faults = verify_folder(folder)
    assert len(faults) == 2
    assert "sha256" in faults[0]
    assert "token 3 is outside the vocabulary of 258 ids" in faults[1]


def test_faults_of_all_shards_are_reported(make_folder: MakeFolder) -> None:
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


def test_bad_manifest_is_a_fault_and_a_missing_folder_an_error(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, vocab_size=258)
    (folder / "manifest.json").write_text("[]")
    assert "manifest.json: the whole file" in verify_folder(folder)[0]
    (folder / "manifest.json").unlink()
    assert "has no manifest.json" in verify_folder(folder)[0]
    with pytest.raises(DataError, match="there is no folder"):
        verify_folder(folder / "none")


def test_manifest_is_compared_with_tokenizer_and_documents(make_folder: MakeFolder) -> None:
    folder = make_folder([[[1, 2, 257], [4, 257]], [[257], []]], vocab_size=258)
    path = folder / "manifest.json"
    original = path.read_text()
    for key, old, new, message in (
        ("eos", "null", "257", None),
        ("eos", "null", "256", "eos is 256, but 257 in "),
        ("eos", "null", "256", "document 0 has eos 257, the manifest says 256"),
        ("bos", "null", "256", "document 0 has bos 1, the manifest says 256"),
        ("vocab_size", "258", "300", "vocab_size is 300, but 258 in "),
    ):
        path.write_text(original.replace(f'"{key}": {old}', f'"{key}": {new}'))
        faults = verify_folder(folder)
        matches = [fault for fault in faults if message is not None and message in fault]
        assert matches if message is not None else faults == [], faults

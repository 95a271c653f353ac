# covers: megalite/formats/checkpoint.py
"""A checkpoint's manifest: it is read as it was written, and errors name anything else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite import files
from megalite.errors import CheckpointError, OtherVersion
from megalite.formats.checkpoint import (
    MANIFEST,
    CheckpointManifest,
    FileEntry,
    StateEntry,
    TensorEntry,
    find_damage,
    folder_name,
    published,
    read_manifest,
    write_manifest,
)

CONTENTS = {"model-0.safetensors": b"weights" * 9, "config.json": b"{}", "tokenizer/a.model": b"\0"}

STATE = StateEntry(file="model-0.safetensors", sha256="0" * 64)


def make(folder: Path, **changes: Any) -> CheckpointManifest:
    """Write files to a folder and return their manifest without writing it."""
    entries = {}
    for name, content in CONTENTS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        entries[name] = FileEntry(bytes=len(content), sha256=files.sha256_file(path))
    values: dict[str, Any] = {
        "format": "megalite-checkpoint-1",
        "step": 1000,
        "samples": 512_000,
        "tokens": 2**40,
        "progress": {"updates": 998, "loss_scale": 65536.0, "tiny": 1e-300, "none": None},
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95], "lr": 3e-4},
        "data_fingerprint": "ab" * 32,
        "tokenizer_sha256": "cd" * 32,
        "versions": {"megalite": "0.1", "author": "Zoë"},
        "tensors": {
            "a.weight": TensorEntry(shape=[3, 5], states={"weight": STATE}),
            "scalar": TensorEntry(shape=[], states={}),
        },
        "files": entries,
    }
    return CheckpointManifest(**values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step_00001000"
    path.mkdir()
    write_manifest(path, make(path))
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    """Change the manifest on disk. If `seal`, write the checksum of the changed content."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    if seal:
        from megalite.formats.checkpoint import _checksum

        content.pop("checksum", None)
        content["checksum"] = _checksum(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_manifest_is_read_as_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest == make(folder)
    assert manifest.progress == {
        "updates": 998,
        "loss_scale": 65536.0,
        "tiny": 1e-300,
        "none": None,
    }
    assert find_damage(folder, manifest) == []
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_manifest_may_be_indented_or_sorted(folder: Path) -> None:
    """The checksum depends on the content only, so that another tool may format the text."""
    rewrite(folder, lambda content: None)
    reordered = dict(reversed(json.loads((folder / MANIFEST).read_text()).items()))
    (folder / MANIFEST).write_text(json.dumps(reordered, ensure_ascii=False), encoding="utf-8")
    assert read_manifest(folder) == make(folder)


def test_manifest_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json: not a complete checkpoint"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        read_manifest(tmp_path / "nowhere")


def test_manifest_that_is_a_folder_or_below_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "step_00000001").write_text("a file")
    with pytest.raises(CheckpointError, match="step_00000001"):
        read_manifest(tmp_path / "step_00000001")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format": "mega', b"\0" * 400])
def test_manifest_that_is_not_json_is_reported(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("[]", "'list'"),
        ("3", "'int'"),
        ("null", "'NoneType'"),
        ("{}", "None"),
        ('{"format": "megalite-checkpoint-2"}', "'megalite-checkpoint-2'"),
        ('{"format": "megalite-shards-1", "shards": []}', "'megalite-shards-1'"),
        ('{"format": ["megalite-checkpoint-1"]}', r"\['megalite-checkpoint-1'\]"),
    ],
)
def test_manifest_of_another_format_is_reported(folder: Path, content: str, kind: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=f"got format {kind}.*'megalite-checkpoint-1'"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(step=1001),
        lambda content: content.update(step=1000.0),
        lambda content: content["progress"].update(updates=999),
        lambda content: content["tensors"]["a.weight"].update(shape=[5, 3]),
        lambda content: content["files"]["config.json"].update(bytes=3),
        lambda content: content["files"].pop("config.json"),
        lambda content: content.update(extra=1),
        lambda content: content.pop("samples"),
        lambda content: content.pop("checksum"),
        lambda content: content.update(checksum=None),
        lambda content: content.update(checksum="0" * 64),
    ],
)
def test_manifest_change_is_detected(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="changed or damaged since it was written"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(step="1000"),
        lambda content: content.update(step=None),
        lambda content: content.pop("samples"),
        lambda content: content.update(extra=1),
        lambda content: content.update(files=[]),
        lambda content: content["files"]["config.json"].pop("sha256"),
        lambda content: content["tensors"]["a.weight"].update(shape=["3"]),
    ],
)
def test_manifest_of_another_version_names_the_version(
    folder: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    rewrite(folder, change, seal=True)
    with pytest.raises(OtherVersion, match=r"is intact, but MegaLite .* use MegaLite 0.1"):
        read_manifest(folder)


def test_manifest_with_any_flipped_bit_is_refused(folder: Path) -> None:
    """The only flip without an effect turns one kind of white space into another."""
    path, expected = folder / MANIFEST, make(folder)
    original = path.read_bytes()
    chosen = random.Random(4)
    for _ in range(400):
        position, bit = chosen.randrange(len(original)), chosen.randrange(8)
        changed = bytearray(original)
        changed[position] ^= 1 << bit
        path.write_bytes(bytes(changed))
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            continue
        assert manifest == expected
        assert original[position : position + 1].isspace(), (position, bit)


@pytest.mark.parametrize("end", [0, 1, 100, 700, -1, -2])
def test_manifest_that_is_truncated_is_reported(folder: Path, end: int) -> None:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:end])
    if end == -1:  # only the final newline is missing
        assert read_manifest(folder) == make(folder)
        return
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(folder)


def test_manifest_with_a_number_that_json_lacks_is_not_written(folder: Path) -> None:
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(folder, make(folder, progress={"loss_scale": float("inf")}))
    assert (folder / MANIFEST).read_bytes() == before


# --- the checkpoint's files ---


def test_find_damage_names_every_fault(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "config.json").unlink()
    data = bytearray(CONTENTS["model-0.safetensors"])
    data[17] ^= 1
    (folder / "model-0.safetensors").write_bytes(bytes(data))
    (folder / "tokenizer" / "a.model").write_bytes(b"\0\0")
    missing, hashed, sized = sorted(find_damage(folder, manifest))
    assert missing == f"{folder / 'config.json'} is missing"
    assert hashed.startswith(f"{folder / 'model-0.safetensors'}: its bytes are not those")
    assert sized == f"{folder / 'tokenizer/a.model'}: 1 bytes were written, got 2"


@pytest.mark.parametrize("position", range(0, 63, 7))
def test_find_damage_reports_any_changed_byte(folder: Path, position: int) -> None:
    path = folder / "model-0.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x80
    path.write_bytes(bytes(data))
    assert len(find_damage(folder, read_manifest(folder))) == 1


def test_find_damage_reads_only_the_named_files(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "config.json").unlink()
    names = list(manifest.files)
    shares = [find_damage(folder, manifest, names[rank::3]) for rank in range(3)]
    assert sorted(len(share) for share in shares) == [0, 0, 1]
    assert find_damage(folder, manifest, []) == []


def test_find_damage_reports_a_folder_in_place_of_a_file(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert find_damage(folder, manifest) == [f"{folder / 'config.json'} is missing"]


def test_find_damage_reports_an_unreadable_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception on one rank would leave the others waiting in the next collective."""
    manifest = read_manifest(folder)

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(files, "sha256_file", fail)
    problems = find_damage(folder, manifest)
    assert len(problems) == len(CONTENTS)
    assert all("Input/output error" in problem for problem in problems)


def test_find_damage_ignores_files_that_are_not_listed(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert find_damage(folder, read_manifest(folder)) == []


# --- the folders of checkpoints ---


def test_published_returns_only_checkpoints_newest_first(tmp_path: Path) -> None:
    steps = (20, 3, 99_999_999, 100_000_000, 1000)
    for name in (
        *map(folder_name, steps),
        "step_0001000",
        "step_00001000.1",
        ".staging_00002000",
        ".deleted_step_00002000",
        "bad_00002000",
        "step_0000300x",
        "xstep_00003000",
    ):
        (tmp_path / name).mkdir()
    names = [path.name for path in published(tmp_path)]
    assert names == [folder_name(step) for step in sorted(steps, reverse=True)]
    assert names[0] == "step_100000000"


def test_published_is_empty_without_checkpoints(tmp_path: Path) -> None:
    assert published(tmp_path) == []
    assert published(tmp_path / "none") == []
    (tmp_path / "file").write_text("")
    assert published(tmp_path / "file") == []


@pytest.mark.parametrize(("step", "name"), [(0, "step_00000000"), (1000, "step_00001000")])
def test_folder_name_pads_the_step(step: int, name: str) -> None:
    assert folder_name(step) == name

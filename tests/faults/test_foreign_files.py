"""Foreign folders: names that lead out of them, and wrong manifests with valid checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalite import files
from megalite.checkpoint import open_checkpoint, set_aside_damaged
from megalite.checkpoint.huggingface import HuggingFaceFolder
from megalite.errors import CheckpointError, CommandError, MegaLiteError
from megalite.evaluate import open_model
from megalite.parallel import Grid
from tests.helpers.checkpoints import find, publish, reseal
from tests.helpers.folders import MAKERS
from tests.helpers.models import run_config, world_of_one

STEP = "checkpoints/step_00000003"


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with world_of_one() as single:
        yield single


@pytest.fixture(scope="module")
def whole(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("checkpoint", "huggingface")}
    for name, folder in folders.items():
        MAKERS[name](folder, grid)
    return folders


@pytest.mark.parametrize("of_tensor", [False, True])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", "", "a\x1b[2J"])
def test_manifest_cannot_name_a_file_outside_its_folder(
    whole: dict[str, Path], tmp_path: Path, name: str, of_tensor: bool
) -> None:
    folder = shutil.copytree(whole["checkpoint"] / STEP, tmp_path / "step_00000003")
    content = files.read_json(folder / "manifest.json")
    if of_tensor:
        next(iter(content["tensors"].values()))["states"]["weight"]["file"] = name
    else:
        content["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    seal(folder, content)
    with pytest.raises(CheckpointError, match=r"which is not a file of this checkpoint"):
        open_checkpoint(folder)


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with a valid checksum, as a forger would."""
    del content["checksum"]
    text = json.dumps(content, sort_keys=True).encode()
    content["checksum"] = hashlib.sha256(text).hexdigest()
    files.write_json(folder / "manifest.json", content)


def test_sealed_manifest_without_a_tensor_is_refused(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(whole["checkpoint"] / STEP, tmp_path / "step_00000003")
    tensors = files.read_json(folder / "manifest.json")["tensors"]
    name = next(iter(tensors))
    del tensors[name]
    reseal(folder, tensors=tensors)
    with pytest.raises(CheckpointError, match=f"has no weight of {name}"):
        open_model(folder)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 50_000, b"", b"\xff", b"9" * 5000, b"null"]
)
def test_manifest_that_cannot_be_parsed_is_set_aside_on_resume(
    grid: Grid, tmp_path: Path, content: bytes
) -> None:
    root = tmp_path / "run" / "checkpoints"
    older, newer = (publish(root, step, run_config()) for step in (5, 10))
    (newer / "manifest.json").write_bytes(content)
    origin = find(grid, root, run_config())
    assert origin is not None
    assert (origin.folder, origin.damaged) == (older, (newer,))
    set_aside_damaged(origin.damaged, grid)
    assert sorted(path.name for path in root.iterdir()) == ["bad_00000010", "step_00000005"]


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        *({"a": value} for value in ("..", "", 3, None, ["b"], {}, "half \ud83d", "\x1b[2J")),
        *([], "text", 3, None),
    ],
)
def test_index_cannot_name_a_file_outside_its_folder(
    whole: dict[str, Path], tmp_path: Path, weight_map: Any
) -> None:
    folder = shutil.copytree(whole["huggingface"] / "hf", tmp_path / "hf")
    index = folder / "model.safetensors.index.json"
    files.write_json(index, files.read_json(index) | {"weight_map": weight_map})
    with pytest.raises(
        CommandError, match=r"weight_map (names .*, which is not a file of|is \w+, not)"
    ):
        HuggingFaceFolder(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"{", b"\xff\xfe", b""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_damaged_file_of_hugging_face_is_refused(
    whole: dict[str, Path], tmp_path: Path, name: str, content: bytes
) -> None:
    folder = shutil.copytree(whole["huggingface"] / "hf", tmp_path / "hf")
    (folder / name).write_bytes(content)
    with pytest.raises(MegaLiteError):
        open_model(folder)

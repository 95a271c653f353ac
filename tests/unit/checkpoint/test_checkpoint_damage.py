# covers: megalite/checkpoint/compare.py megalite/checkpoint/load.py
"""Bytes that are not those that were written: found, named, and never taken for the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite import arch, checkpoint, files
from megalite.errors import CheckpointError, DamagedCheckpoint
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import make_engine, train_steps


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("kind", ["model", "exp_avg"])
def test_every_byte_of_a_tensor_file_is_looked_at_once(grid: Grid, root: Path, kind: str) -> None:
    """How it begins when it is found, the tensors themselves as the engine holds them."""
    trained = make_engine()
    train_steps(trained, range(1, 3))
    folder = save_checkpoint(trained, grid, root)
    path = next(folder.glob(f"{kind}-*"))
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    engine, manifest = make_engine(), disk.read_manifest(folder)
    for place in (0, 3, 8, 40, body - 1, body, (body + len(whole)) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        found = disk.find_damage(folder, manifest, tensors=False)
        assert bool(found) == (place < body)
        if place >= body:
            with pytest.raises(DamagedCheckpoint, match=rf"{path.name}: its bytes are not those"):
                checkpoint.restore(
                    engine, engine.config, grid=grid, folder=folder, manifest=manifest
                )
    path.write_bytes(whole)
    assert not disk.find_damage(folder, manifest, tensors=False)
    checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)


def test_a_tensor_that_cannot_be_read_is_damage(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told when all ranks are together: raised at once, it would leave the others waiting."""
    engine = make_engine()
    folder = save_checkpoint(engine, grid, root)
    manifest, readings = disk.read_manifest(folder), list[str]()

    def fail(path: Path, name: str, *_: Any) -> None:
        readings.append(name)
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(disk, "read_tensor", fail)
    monkeypatch.setattr(files, "sha256_file", lambda path: fail(path, ""))
    with pytest.raises(DamagedCheckpoint, match="Input/output error"):
        checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)
    assert len(readings) > len(arch.parameters(engine.config.model))  # every one was tried


def test_minus_zero_is_zero(grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed puts cut parameters together by adding zeros; what was written is loaded all the
    same, and a number that really differs is not taken for it."""
    trained = make_engine()
    train_steps(trained, range(1, 3))
    for parameter in trained.model.parameters():
        parameter.data.view(-1)[0] = -0.0
    folder = save_checkpoint(trained, grid, root)
    manifest, engine = disk.read_manifest(folder), make_engine()
    read = engine.read_state
    monkeypatch.setattr(engine, "read_state", lambda *where: read(*where) + 0.0)
    checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)
    monkeypatch.setattr(engine, "read_state", lambda *where: read(*where) + 1e-3)
    with pytest.raises(CheckpointError, match="the engine holds something else"):
        checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)

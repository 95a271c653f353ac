# covers: megalite/checkpoint/compare.py megalite/checkpoint/load.py
"""Changed bytes of a checkpoint are detected, named, and never loaded as the model."""

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
def test_every_byte_of_a_tensor_file_is_checked_once(grid: Grid, root: Path, kind: str) -> None:
    """The header is checked before the load, and the tensors in the engine after it."""
    trained = make_engine()
    train_steps(trained, range(1, 3))
    folder = save_checkpoint(trained, grid, root)
    path = next(folder.glob(f"{kind}-*"))
    original = path.read_bytes()
    size, body = len(original), 8 + int.from_bytes(original[:8], "little")
    engine, manifest = make_engine(), disk.read_manifest(folder)
    for position in (0, 3, 8, 40, body - 1, body, (body + size) // 2, size - 1):
        data = bytearray(original)
        data[position] ^= 1
        path.write_bytes(data)
        faults = disk.find_damage(folder, manifest, tensors=False)
        assert bool(faults) == (position < body)
        if position >= body:
            with pytest.raises(DamagedCheckpoint, match=rf"{path.name}: its bytes are not those"):
                checkpoint.restore(
                    engine, engine.config, grid=grid, folder=folder, manifest=manifest
                )
    path.write_bytes(original)
    assert not disk.find_damage(folder, manifest, tensors=False)
    checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)


def test_unreadable_tensor_is_damage(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised by all ranks together: an exception on one would leave others waiting."""
    engine = make_engine()
    folder = save_checkpoint(engine, grid, root)
    manifest, attempts = disk.read_manifest(folder), list[str]()

    def fail(path: Path, name: str, *_: Any) -> None:
        attempts.append(name)
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(disk, "read_tensor", fail)
    monkeypatch.setattr(files, "sha256_file", lambda path: fail(path, ""))
    with pytest.raises(DamagedCheckpoint, match="Input/output error"):
        checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)
    assert len(attempts) > len(arch.parameters(engine.config.model))  # all tensors were tried


def test_minus_zero_equals_zero_after_a_load(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed assembles a parameter by adding zeros, which turns -0 into 0."""
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
    with pytest.raises(CheckpointError, match="values differ from the loaded"):
        checkpoint.restore(engine, engine.config, grid=grid, folder=folder, manifest=manifest)

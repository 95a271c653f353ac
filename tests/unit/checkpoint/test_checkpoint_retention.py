# covers: megalite/checkpoint/retention.py
"""Retention: failures to remove old checkpoints, and starts without a lease."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megalite import checkpoint
from megalite.checkpoint import Lease, set_aside_newer
from megalite.config import CheckpointConfig
from megalite.errors import Superseded
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid
from tests.helpers.checkpoints import publish
from tests.helpers.models import run_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs" / "mine" / "checkpoints"
    for step in (5, 10, 15):
        publish(root, step, run_config())
    return root


def names(root: Path) -> list[str]:
    return [folder.name for folder in disk.published(root)]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EROFS])
def test_retain_warns_if_a_rename_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(path: Path, target: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="megalite"):
        patch.setattr(Path, "rename", refuse)
        checkpoint.retain(root, CheckpointConfig(keep=1)).join()
    assert names(root) == ["step_00000015", "step_00000010", "step_00000005"]
    # no warning if another process has removed the folder
    assert ("cannot be removed" in caplog.text) == (number != errno.ENOENT)
    checkpoint.retain(root, CheckpointConfig(keep=1)).join()
    assert names(root) == ["step_00000015"]


def test_retain_warns_if_the_folder_cannot_be_listed(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="megalite"):
        patch.setattr(disk, "published", refuse)
        checkpoint.retain(root, CheckpointConfig(keep=1)).join()
    assert "Input/output error" in caplog.text
    assert len(names(root)) == 3


def test_start_without_the_lease_removes_and_renames_nothing(grid: Grid, root: Path) -> None:
    old, _new = Lease(root), Lease(root)
    (root / ".staging_00000020_ab").mkdir()
    before = sorted(path.name for path in root.iterdir())
    checkpoint.retain(root, CheckpointConfig(keep=1), old).join()
    with pytest.raises(Superseded):
        checkpoint.clear_leftovers(root, old)
    with pytest.raises(Superseded):
        checkpoint.set_aside_damaged([root / "step_00000015"], grid, old)
    assert sorted(path.name for path in root.iterdir()) == before


def test_set_aside_damaged_skips_folders_that_do_not_exist(grid: Grid, root: Path) -> None:
    checkpoint.set_aside_damaged([root / "step_00000099", root / "step_00000015"], grid)
    assert names(root) == ["step_00000010", "step_00000005"]
    assert (root / "bad_00000015").is_dir()


def test_best_checkpoint_may_be_scored_after_its_save(root: Path) -> None:
    disk.record_valid_loss(root / "step_00000005", 2.0)
    assert disk.best(disk.published(root)) == root / "step_00000005"
    disk.record_valid_loss(root / "step_00000015", 1.5)
    assert disk.best(disk.published(root)) == root / "step_00000015"
    manifest = disk.read_manifest(root / "step_00000015")  # checks the checksum
    assert (manifest.valid_loss, manifest.step) == (1.5, 15)
    assert disk.find_damage(root / "step_00000015", manifest) == []


def test_set_aside_newer_renames_another_folder_of_the_same_step(tmp_path: Path) -> None:
    for name in ("step_00000040", "step_00000044", "step_00000048", "left_00000044"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    names = set_aside_newer(tmp_path, 44, tmp_path / "left_00000044")
    assert sorted(names) == ["left_00000044.1", "left_00000048"]
    assert set_aside_newer(tmp_path, 40, tmp_path / "step_00000040") == []
    assert (tmp_path / "step_00000040").is_dir()

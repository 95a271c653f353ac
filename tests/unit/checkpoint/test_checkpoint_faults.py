# covers: megalite/checkpoint/write.py megalite/checkpoint/lease.py
"""Failed saves lose no checkpoint, and only the newest start publishes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite import checkpoint, files
from megalite.checkpoint import Lease, Progress
from megalite.errors import CheckpointError, Superseded
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import make_engine, train_steps


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (disk, "write_tensors"),
        (files, "sync_file"),
        (files, "sha256_file"),
        (files, "publish"),
        (disk, "write_manifest"),
        (shutil, "copytree"),
    ],
)
def test_failed_save_publishes_and_loses_nothing(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    trained = make_engine()
    save_checkpoint(trained, grid, root)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(FULL))
        with pytest.raises(CheckpointError, match=r"not saved: rank 0.*No space left") as caught:
            save_checkpoint(trained, grid, root, progress=Progress(4))
    assert caught.value.exit_code == 1
    assert [path.name for path in root.iterdir()] == ["step_00000003"]
    assert save_checkpoint(trained, grid, root, progress=Progress(4)).name == "step_00000004"


@pytest.mark.parametrize("name", ["publish", "sync_file"])
def test_failed_second_save_of_a_step_keeps_the_first(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A run that went back saves a step again. The old checkpoint stays until that succeeds."""
    trained = make_engine()
    folder = save_checkpoint(trained, grid, root)
    with monkeypatch.context() as patch:
        patch.setattr(files, name, failing(FULL))
        with pytest.raises(CheckpointError):
            save_checkpoint(trained, grid, root)
    assert disk.published(root) == [folder]
    assert disk.find_damage(folder, disk.read_manifest(folder)) == []


def test_crash_between_two_renames_loses_nothing(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start clears leftovers, but restores a checkpoint that was renamed."""
    trained = make_engine()
    folder = save_checkpoint(trained, grid, root)
    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(trained, grid, root)
    checkpoint.clear_leftovers(root)
    assert disk.published(root) == [folder]
    assert disk.find_damage(folder, disk.read_manifest(folder)) == []


def test_save_replaces_an_older_checkpoint_of_its_step(grid: Grid, root: Path) -> None:
    trained = make_engine()
    save_checkpoint(trained, grid, root)
    train_steps(trained, range(1, 2))
    folder = save_checkpoint(trained, grid, root)
    manifest = disk.read_manifest(folder)
    assert manifest.progress == {"updates": 1}
    assert disk.find_damage(folder, manifest) == []
    assert [path.name for path in root.iterdir()] == ["step_00000003"]


def test_save_ignores_the_files_of_an_interrupted_one(grid: Grid, root: Path) -> None:
    left = root / ".staging_00000003"
    left.mkdir(parents=True)
    (left / "model-00000-00000.safetensors").write_bytes(b"half")
    (left / "stranger").write_bytes(b"x")
    folder = save_checkpoint(make_engine(), grid, root)
    assert not (folder / "stranger").exists()
    assert disk.find_damage(folder, disk.read_manifest(folder)) == []


def test_clear_leftovers_removes_files_too(grid: Grid, root: Path) -> None:
    folder = save_checkpoint(make_engine(), grid, root)
    for name in (".staging_00000009_ab", ".deleted_step_00000001"):
        (root / name).write_text("odd")
    checkpoint.clear_leftovers(root)
    assert list(root.iterdir()) == [folder]


# --- the right to publish ---


def test_save_whose_folder_a_newer_start_removed_is_superseded(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir(parents=True)
    lease = Lease(root)

    def lose(*_: Any) -> Any:
        Lease(root)
        checkpoint.clear_leftovers(root)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(disk, "write_tensors", lose)
    with pytest.raises(Superseded, match="newer start of this run"):
        save_checkpoint(make_engine(), grid, root, lease=lease)


def test_lease_belongs_to_the_newest_start(root: Path) -> None:
    root.mkdir(parents=True)
    first = Lease(root)
    first.check()
    second = Lease(root)
    second.check()
    for _ in range(2):
        with pytest.raises(Superseded, match=r"newer start of this run .*publishes nothing"):
            first.check()
    second.check()


def test_lease_names_its_job(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir(parents=True)
    first = Lease(root)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    Lease(root)
    with pytest.raises(Superseded, match="job 4711, restart 2") as caught:
        first.check()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "3", "\0"])
def test_lease_file_that_is_unreadable_is_ignored(root: Path, content: str | None) -> None:
    root.mkdir(parents=True)
    lease = Lease(root)
    if content is None:
        (root / ".lease.json").unlink()
    else:
        (root / ".lease.json").write_text(content)
    lease.check()
    assert disk.published(root) == []


def test_lease_that_was_lost_never_returns(root: Path) -> None:
    root.mkdir(parents=True)
    old = Lease(root)
    Lease(root)
    old._last_check = float("-inf")
    assert old.is_lost()
    (root / ".lease.json").unlink()
    with pytest.raises(Superseded, match="newer start"):
        old.check()
    assert old.is_lost()


def test_superseded_start_publishes_nothing(grid: Grid, root: Path) -> None:
    root.mkdir(parents=True)
    old = Lease(root)
    trained = make_engine()
    save_checkpoint(trained, grid, root, progress=Progress(2), lease=old)
    new = Lease(root)
    with pytest.raises(Superseded, match="newer start"):
        save_checkpoint(trained, grid, root, lease=old)
    assert [path.name for path in disk.published(root)] == ["step_00000002"]
    save_checkpoint(trained, grid, root, lease=new)
    assert len(disk.published(root)) == 2


def test_superseded_start_does_not_touch_the_newer_starts_files(grid: Grid, root: Path) -> None:
    root.mkdir(parents=True)
    old = Lease(root)
    Lease(root)
    partial = root / ".staging_00000003" / "model-00000-00000.safetensors"
    partial.parent.mkdir()
    partial.write_bytes(b"being written")
    with pytest.raises(Superseded):
        save_checkpoint(make_engine(), grid, root, lease=old)
    assert partial.read_bytes() == b"being written"

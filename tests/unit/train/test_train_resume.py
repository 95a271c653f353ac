# covers: megalite/train/resume.py megalite/train/restore.py megalite/train/announce.py
"""The choice of the checkpoint that a start resumes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalite.checkpoint import set_aside_damaged
from megalite.errors import CheckpointError, CommandError
from megalite.formats import checkpoint as disk
from megalite.parallel import Grid
from megalite.train.restore import samples_at
from megalite.train.resume import check_resume, find_resume_point
from tests.helpers.checkpoints import TOKENIZER, damage_weights, find, fingerprint, publish, reseal
from tests.helpers.models import run_config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine" / "checkpoints"


# --- choice of the checkpoint ---


def test_resume_without_checkpoints_is_a_fresh_start(grid: Grid, root: Path) -> None:
    for resume in ("auto", "never"):
        check_resume(root, resume)
        assert find(grid, root, run_config(), resume=resume) is None
    root.mkdir(parents=True)
    (root / ".staging_00000005").mkdir()
    assert find(grid, root, run_config()) is None


def test_resume_auto_takes_the_newest_valid_checkpoint(grid: Grid, root: Path) -> None:
    for step in (5, 15, 10):
        publish(root, step, run_config())
    damage_weights(root / "step_00000015")
    point = find(grid, root, run_config())
    assert point is not None
    assert point.folder == root / "step_00000010"
    assert (point.progress.step, point.progress.samples, point.progress.tokens) == (10, 40, 320)
    assert point.changes == {}
    assert point.damaged == (root / "step_00000015",)  # not moved: the start may yet be refused
    assert point.damaged[0].is_dir()


def test_resume_never_is_refused_if_checkpoints_exist(root: Path) -> None:
    publish(root, 5, run_config())
    with pytest.raises(CommandError, match=r"--resume never, but .* holds step_00000005") as caught:
        check_resume(root, "never")
    assert caught.value.exit_code == 2
    check_resume(root, "auto")


def test_resume_from_a_missing_folder_is_refused(root: Path, tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), ""):
        with pytest.raises(CommandError, match=rf"--resume '{path}': no such folder"):
            check_resume(root, path)


def test_resume_from_a_folder_without_a_checkpoint_is_refused(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match="holds no checkpoint"):
        find(grid, root, run_config(), resume=str(tmp_path))


def test_resume_with_only_damaged_checkpoints_is_an_error(grid: Grid, root: Path) -> None:
    """The same holds if the scheduler starts the same command again."""
    for step in (5, 10):
        damage_weights(publish(root, step, run_config()))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="damaged"):
            find(grid, root, run_config())
    assert sorted(path.name for path in root.iterdir()) == ["bad_00000005", "bad_00000010"]


def test_resume_from_another_run_works_if_all_checkpoints_are_damaged(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    """This is the advice of the error about damaged checkpoints."""
    damage_weights(publish(root, 5, run_config()))
    other = publish(tmp_path / "other", 3, run_config())
    point = find(grid, root, run_config(), resume=str(other))
    assert point is not None
    assert point.folder == other


def test_damaged_checkpoint_gets_a_number_if_its_new_name_exists(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    for _ in range(3):
        damage_weights(publish(root, 10, run_config()))
        point = find(grid, root, run_config())
        assert point is not None
        set_aside_damaged(point.damaged, grid)
    bad = sorted(path.name for path in root.glob("bad_*"))
    assert bad == ["bad_00000010", "bad_00000010.1", "bad_00000010.2"]


@pytest.mark.parametrize("kind", ["step", "run", "checkpoints"])
def test_resume_from_another_run_takes_its_newest_checkpoint(
    grid: Grid, root: Path, tmp_path: Path, kind: str
) -> None:
    other = tmp_path / "runs" / "other"
    publish(other / "checkpoints", 3, run_config(name="other"))
    newest = publish(other / "checkpoints", 7, run_config(name="other"))
    path = {"step": newest, "run": other, "checkpoints": newest.parent}[kind]
    point = find(grid, root, run_config(name="mine"), resume=str(path))
    assert point is not None
    assert (point.folder, point.progress.samples, point.changes) == (newest, 28, {})


def test_resume_from_a_damaged_checkpoint_of_another_run_is_refused(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    other = publish(tmp_path / "other", 3, run_config())
    damage_weights(other)
    with pytest.raises(CommandError, match=r"--resume .*weights: its bytes are not those"):
        find(grid, root, run_config(), resume=str(other))
    publish(tmp_path / "other", 2, run_config())
    with pytest.raises(CommandError, match=r"--init-from .*\n.*step_00000002 is intact: name it"):
        find(grid, root, run_config(), init_from=str(other.parent))
    assert other.is_dir()


@pytest.mark.parametrize("kind", ["run", "checkpoints"])
def test_resume_from_the_folder_of_this_run_is_auto(grid: Grid, root: Path, kind: str) -> None:
    publish(root, 5, run_config())
    damage_weights(publish(root, 10, run_config()))
    path = root if kind == "checkpoints" else root.parent
    point = find(grid, root, run_config(), resume=str(path))
    assert point is not None
    assert point.folder.name == "step_00000005"


def test_resume_from_an_earlier_step_of_this_run_goes_back(grid: Grid, root: Path) -> None:
    for step in (5, 10):
        publish(root, step, run_config())
    point = find(grid, root, run_config(), resume=str(root / "step_00000005"))
    assert point is not None
    assert point.folder.name == "step_00000005"


def test_resume_from_another_run_continues_own_checkpoints_if_there_are_any(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    """A requeued job repeats `--resume OTHER`, but its own checkpoints are newer."""
    other = publish(tmp_path / "other", 3, run_config())
    publish(root, 8, run_config())
    point = find(grid, root, run_config(), resume=str(other))
    assert point is not None
    assert point.folder == root / "step_00000008"


def test_resume_of_a_requeued_job_goes_back_only_once(
    grid: Grid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person who repeats the command, or another job, goes back again."""
    for step in (5, 10):
        publish(root, step, run_config())
    path = root / "step_00000005"
    event = {"kind": "event", "name": "resume", "path": str(path), "job": "77"}
    lines = ["not a row", json.dumps({"kind": "train", "step": 6}), json.dumps(event)]
    (root.parent / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for job, restarts, expected in (
        ("", "", "step_00000005"),
        ("77", "0", "step_00000005"),
        ("78", "1", "step_00000005"),
        ("77", "1", "step_00000010"),
    ):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        point = find(grid, root, run_config(), resume=str(path))
        assert point is not None
        assert (job, restarts, point.folder.name) == (job, restarts, expected)


def test_checkpoint_with_a_name_of_another_step_is_refused(
    grid: Grid, root: Path, tmp_path: Path
) -> None:
    publish(root, 5, run_config())
    publish(root, 10, run_config()).rename(root / "step_00000020")
    with pytest.raises(CommandError, match=r"step_00000020 contains step 10: .*step_00000010"):
        find(grid, tmp_path / "mine", run_config(), resume=str(root / "step_00000020"))
    point = find(grid, root, run_config())
    assert point is not None
    assert point.folder.name == "step_00000005"
    assert point.damaged == (root / "step_00000020",)


def test_resume_ignores_a_file_with_the_name_of_a_checkpoint(grid: Grid, root: Path) -> None:
    publish(root, 5, run_config())
    (root / "step_00000010").write_text("notes")
    point = find(grid, root, run_config())
    assert point is not None
    assert point.folder.name == "step_00000005"
    assert (root / "step_00000010").read_text() == "notes"


@pytest.mark.parametrize("option", ["resume", "init_from"])
def test_resume_warns_if_it_ignores_a_checkpoint_of_the_command_line(
    grid: Grid,
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    option: str,
) -> None:
    publish(root, 5, run_config())
    other = publish(tmp_path / "other", 3, run_config())
    with caplog.at_level("WARNING", logger="megalite"):
        point = find_resume_point(
            run_config(),
            grid=grid,
            root=root,
            resume=str(other) if option == "resume" else "auto",
            init_from=str(other) if option == "init_from" else None,
            allow=(),
            data_fingerprint=fingerprint(run_config()),
            tokenizer_sha256=TOKENIZER,
        )
    assert point is not None
    assert point.folder.name == "step_00000005"
    assert "step_00000005" in caplog.text
    assert f"--{option.replace('_', '-')}" in caplog.text


@pytest.mark.parametrize("where", ["format", "manifest", "run file"])
def test_checkpoint_of_another_version_is_refused_and_not_set_aside(
    grid: Grid, root: Path, where: str
) -> None:
    """The checkpoint is not damaged, so an older checkpoint must not replace it."""
    publish(root, 5, run_config())
    folder = publish(root, 10, run_config())
    if where == "run file":
        raw = json.loads((folder / "config.json").read_text())
        raw["model"]["rotary_dial"] = 1
        (folder / "config.json").write_text(json.dumps(raw))
    reseal(folder, **{"format": {"format": "megalite-checkpoint-9"}}.get(where, {}))
    if where == "manifest":
        reseal(folder, colour="green")
    for resume in ("auto", str(folder)):
        with pytest.raises(CommandError, match=r"MegaLite 0.1.0|another version, MegaLite"):
            find(grid, root, run_config(), resume=resume)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000005", "step_00000010"]


# --- data position after a rollback ---


def test_rollback_before_the_resumed_step_takes_the_position_of_its_checkpoint(
    grid: Grid, root: Path
) -> None:
    """The checkpoint that the start resumed from is damaged meanwhile. A step has 4 samples."""
    for step in (5, 10):
        publish(root, step, run_config())
    earlier, later = root / "step_00000005", root / "step_00000010"
    point = find(grid, root, run_config())
    assert point is not None
    manifest = disk.read_manifest(earlier)
    assert samples_at(point, earlier, manifest, run_config()) == 20
    assert samples_at(point, later, disk.read_manifest(later), run_config()) == 40
    assert samples_at(None, earlier, manifest, run_config()) == 20


def test_rollback_to_another_data_order_takes_the_position_of_the_start(
    grid: Grid, root: Path
) -> None:
    for step in (5, 10):
        publish(root, step, run_config())
    point = find(grid, root, run_config(), shards="others", allow=("data",))
    assert point is not None
    earlier = root / "step_00000005"
    assert samples_at(point, earlier, disk.read_manifest(earlier), run_config()) == 0

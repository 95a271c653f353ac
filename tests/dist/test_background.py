"""Background saves write the same checkpoints, and a failed save is an error of all ranks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import CheckpointError
from megalite.formats import checkpoint as disk
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero

SAVE = {"every": 5, "keep": 5}


def hashes(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the hashes of all states of all tensors, by step."""
    root = Path(raw["logging"]["directory"]) / "run" / "checkpoints"
    by_step = {}
    for folder in disk.published(root):
        manifest = disk.read_manifest(folder)
        assert disk.find_damage(folder, manifest) == []
        by_step[manifest.step] = {
            name: {state: entry.sha256 for state, entry in tensor.states.items()}
            for name, tensor in manifest.tensors.items()
        }
    return by_step


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_background_save_contains_the_state_of_its_step(
    shards: dict[str, str], tmp_path: Path, stage: int, ranks: int
) -> None:
    """Training changes every tensor while the checkpoint is written."""
    runs = {}
    for background in (False, True):
        checkpoint = SAVE | {"background": background}
        raw = run_file(
            shards, tmp_path / str(background), checkpoint=checkpoint, deepspeed=zero(stage)
        )
        run_ranks(train, ranks, raw)
        runs[background] = (curve(raw), hashes(raw))
        saved = [row["step"] for row in rows(raw, "event") if row["name"] == "checkpoint"]
        assert saved == [5, 10, 15, 20]
    assert runs[True] == runs[False]


def _train_failing(launch: Any, raw: dict[str, Any], number: int, step: int) -> str:
    """Train while the disk of rank 1 refuses the save of one step."""
    write = disk.write_tensors

    def refusing(path: Path, tensors: Any) -> Any:
        if launch.rank == 1 and f"{step:08d}" in str(path):
            raise OSError(number, os.strerror(number))
        return write(path, tensors)

    disk.write_tensors = refusing
    try:
        train(launch, raw)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_save_that_fails_on_one_rank_is_an_error_of_all_ranks(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, checkpoint=SAVE | {"background": True}, deepspeed=zero(1))
    reasons = run_ranks(_train_failing, 2, raw, errno.EIO, 10)
    assert reasons[0] == reasons[1]
    assert "rank 1 could not write" in reasons[0]
    assert "Input/output error" in reasons[0]
    assert list(hashes(raw)) == [5]
    assert not list((tmp_path / "run" / "checkpoints").glob(".staging*"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("failed", "step_00000005")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("background", [False, True])
def test_save_that_exceeds_a_quota_is_skipped(
    shards: dict[str, str], tmp_path: Path, number: int, background: bool
) -> None:
    """Quotas do not reduce the reported free space, so the check before a save passes."""
    checkpoint = SAVE | {"background": background}
    raw = run_file(shards, tmp_path, checkpoint=checkpoint, deepspeed=zero(1))
    assert run_ranks(_train_failing, 2, raw, number, 10) == ["", ""]
    assert list(hashes(raw)) == [20, 15, 5]
    assert not list((tmp_path / "run" / "checkpoints").glob(".staging*"))
    events = rows(raw, "event")
    (unsaved,) = [row for row in events if row["name"] == "unsaved"]
    assert unsaved["step"] == 10
    assert os.strerror(number) in unsaved["reason"]
    assert [row["step"] for row in events if row["name"] == "checkpoint"] == [5, 15, 20]
    assert len(curve(raw)) == 20
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("done", "step_00000020")


def test_last_save_that_exceeds_a_quota_fails_the_run(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """Otherwise the last steps would be lost."""
    raw = run_file(shards, tmp_path, checkpoint=SAVE | {"background": True}, deepspeed=zero(1))
    reasons = run_ranks(_train_failing, 2, raw, errno.EDQUOT, 20)
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("NoSpace: the checkpoint was not saved: rank 1")
    assert "make room, or lower checkpoint.keep" in reasons[0]
    assert list(hashes(raw)) == [15, 10, 5]

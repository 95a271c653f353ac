"""Saves in the background: the same checkpoints, and a failed one is an error of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import CheckpointError
from megalite.formats import checkpoint as disk
from tests.ranks import run_ranks
from tests.runs import curve, rows, run_file, train, zero

SAVE = {"every": 5, "keep": 5}


def hashes(raw: dict[str, Any]) -> dict[str, Any]:
    """By step: the hash of every state of every tensor."""
    root = Path(raw["logging"]["directory"]) / "run" / "checkpoints"
    found = {}
    for folder in disk.published(root):
        manifest = disk.read_manifest(folder)
        assert disk.damage(folder, manifest) == []
        found[manifest.step] = {
            name: {state: entry.sha256 for state, entry in tensor.states.items()}
            for name, tensor in manifest.tensors.items()
        }
    return found


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_a_snapshot_is_of_its_step(
    shards: dict[str, str], tmp_path: Path, stage: int, ranks: int
) -> None:
    """Training changes every tensor while it is written; the folder does not show it."""
    made = {}
    for background in (False, True):
        checkpoint = SAVE | {"background": background}
        raw = run_file(
            shards, tmp_path / str(background), checkpoint=checkpoint, deepspeed=zero(stage)
        )
        run_ranks(train, ranks, raw)
        made[background] = (curve(raw), hashes(raw))
        saved = [row["step"] for row in rows(raw, "event") if row["name"] == "checkpoint"]
        assert saved == [5, 10, 15, 20]
    assert made[True] == made[False]


def _train_failing(launch: Any, raw: dict[str, Any]) -> str:
    """Rank 1's disk refuses the save of step 10."""
    write = disk.write_tensors

    def refusing(path: Path, tensors: Any) -> Any:
        if launch.rank == 1 and "00000010" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    disk.write_tensors = refusing
    with pytest.raises(CheckpointError) as caught:
        train(launch, raw)
    return str(caught.value)


def test_a_write_that_fails_is_an_error_of_all_ranks(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, checkpoint=SAVE | {"background": True}, deepspeed=zero(1))
    told = run_ranks(_train_failing, 2, raw)
    assert told[0] == told[1]
    assert "rank 1 could not write" in told[0]
    assert "No space left on device" in told[0]
    assert list(hashes(raw)) == [5]
    assert not list((tmp_path / "run" / "checkpoints").glob(".staging*"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("failed", "step_00000005")

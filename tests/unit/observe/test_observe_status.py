# covers: megalite/observe/status.py
"""The status and first events of a run, as later attempts read them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megalite.observe import (
    Recorder,
    last_layout,
    overwrite_status,
    previous_attempts,
    started_from,
)
from megalite.train.announce import _layout_changes


def record(folder: Path, attempt: int = 0) -> Recorder:
    return Recorder(folder, rank=0, attempt=attempt, total_steps=9, tensorboard=False)


def status(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return content


@pytest.mark.parametrize("state", ["running", "saving", "stopped", "done", "failed"])
def test_status_contains_rank_0s_process_while_it_runs(tmp_path: Path, state: Any) -> None:
    recorder = record(tmp_path)
    recorder.status(state, step=3)
    recorder.close()
    content = status(tmp_path)
    process = (content.get("host"), content.get("pid"))
    runs = state in ("running", "saving")
    assert process == ((socket.gethostname(), os.getpid()) if runs else (None, None))


def test_overwrite_status_keeps_the_status_of_a_later_attempt(tmp_path: Path) -> None:
    recorder = record(tmp_path, attempt=2)
    recorder.status("running", step=5, last_checkpoint="step_00000004")
    overwrite_status(tmp_path, "failed", reason="an older start that hangs", attempt=1)
    assert status(tmp_path)["state"] == "running"
    overwrite_status(tmp_path, "failed", reason="a newer one", attempt=previous_attempts(tmp_path))
    content = status(tmp_path)
    assert (content["state"], content["attempt"], content["step"]) == ("failed", 3, 5)
    assert content["last_checkpoint"] == "step_00000004"
    recorder.status("running", step=6)  # refused: from the previous attempt
    recorder.close()
    assert status(tmp_path) == content


def test_overwrite_status_of_a_run_without_a_valid_status(tmp_path: Path) -> None:
    overwrite_status(tmp_path, "failed", reason="x", attempt=0)
    assert status(tmp_path)["state"] == "failed"
    (tmp_path / "status.json").write_text("[]")
    overwrite_status(tmp_path, "failed", reason="y", attempt=0)
    assert status(tmp_path)["reason"] == "y"


def test_events_record_the_origin_and_layout_of_a_run(tmp_path: Path) -> None:
    other = tmp_path / "other" / "checkpoints" / "step_00000005"
    other.mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    assert not started_from(run, "start")
    recorder = record(run)
    recorder.event(0, "start", init_from=str(other), layout={"tensor": 1, "ranks": 2})
    assert started_from(run, "start")
    assert not started_from(run, "resume", other)
    recorder.event(5, "resume", path=str(other), layout={"tensor": 2, "ranks": 2})
    recorder.close()
    assert started_from(run, "resume", other.resolve())
    assert started_from(run, "resume", (tmp_path / "other").resolve())
    assert not started_from(run, "resume", run.resolve())
    assert last_layout(run) == {"tensor": 2, "ranks": 2}
    assert _layout_changes({"tensor": 1, "ranks": 2}, last_layout(run)) == {
        "tensor": {"before": 1, "after": 2}
    }
    assert last_layout(tmp_path) == {}


@pytest.mark.parametrize("layout", ["torn", [1, 2], 3, None])
def test_layout_that_is_not_an_object_is_ignored(tmp_path: Path, layout: object) -> None:
    row = {"kind": "event", "name": "start", "layout": layout}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert last_layout(tmp_path) == {}

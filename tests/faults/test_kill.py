"""After kill -9 at random moments, no published checkpoint is lost, and the curve is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megalite.env import Launch, publish_launch
from megalite.formats import checkpoint as disk
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.runs import curve, run_file, train, zero

EVERY = 4


def _rank(launch: Launch, raw: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    publish_launch(launch)
    code = 1
    with suppress(BaseException):
        train(launch, raw)
        code = 0
    os._exit(code)


def _end(processes: list[Any], victim: int) -> None:
    """Kill one rank, and then the others as a launcher does."""
    os.kill(processes[victim].pid, signal.SIGKILL)
    processes[victim].join()
    deadline = time.monotonic() + 2.0
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _published(root: Path) -> dict[str, disk.CheckpointManifest]:
    """Return the manifests of all published checkpoints, after a check of their files."""
    manifests = {}
    for folder in disk.published(root):
        manifest = disk.read_manifest(folder)
        assert disk.find_damage(folder, manifest) == []
        manifests[folder.name] = manifest
    return manifests


def _soak(
    shards: dict[str, str], tmp_path: Path, kills: int, seed: int, stage: int, background: bool
) -> int:
    """Kill and resume a run. Return how often."""
    draw = random.Random(seed)
    sections: dict[str, Any] = {
        "training": {"steps": 10**6, "eval_every": 0},
        "schedule": {"name": "constant"},
        "deepspeed": zero(stage),
        "checkpoint": {"every": EVERY, "keep": 10**6, "background": background},
    }
    raw = run_file(shards, tmp_path / "killed", **sections)
    root = tmp_path / "killed" / "run" / "checkpoints"
    before: dict[str, disk.CheckpointManifest] = {}
    for number in range(kills):
        processes = start_ranks(_rank, 2, raw)
        newest = max(before, default="")
        deadline = time.monotonic() + 60
        while not newest or max((p.name for p in root.glob("step_*")), default="") <= newest:
            assert time.monotonic() < deadline, "no checkpoint in 60 s"
            assert all(process.is_alive() for process in processes)
            newest = newest or "step_"
            time.sleep(0.005)
        if draw.random() < 0.5:  # kill during a save
            until = time.monotonic() + 1.0
            while time.monotonic() < until and not list(root.glob(".staging_*")):
                pass
            time.sleep(draw.random() * 0.03)
        else:
            time.sleep(draw.random() * 0.5)
        _end(processes, draw.randrange(2))
        now = _published(root)
        assert {name: now.get(name) for name in before} == before, f"kill {number}"
        before = now
    last = max(manifest.step for manifest in before.values())
    raw["training"] = raw["training"] | {"steps": last + 3}
    run_ranks(train, 2, raw)
    starts = [
        json.loads(line)
        for line in (tmp_path / "killed" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    resumes = [row for row in starts if row.get("name") == "resume"]
    assert [row["attempt"] for row in resumes] == list(range(1, kills + 1))
    reached = 0  # last step in the rows of earlier attempts
    for row in starts:
        if row.get("name") == "resume":
            # a background save may be published one interval later
            assert row["step"] >= reached - EVERY * (1 + background)
        if row["kind"] == "train":
            reached = max(reached, row["step"])
    alone = run_file(shards, tmp_path / "alone", **sections)
    alone["training"] = raw["training"]
    alone["checkpoint"] = {"every": 0}
    run_ranks(train, 2, alone)
    whole = curve(alone)
    assert curve(raw)[: len(whole)] == whole
    return len(resumes)


@pytest.mark.parametrize(("stage", "background"), [(1, False), (3, True)])
def test_run_survives_ten_kills(
    shards: dict[str, str], tmp_path: Path, stage: int, background: bool
) -> None:
    assert _soak(shards, tmp_path, 5, stage, stage, background) == 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "background"), [(0, False), (1, True), (2, False), (3, True)])
def test_run_survives_a_hundred_kills(
    shards: dict[str, str], tmp_path: Path, stage: int, background: bool
) -> None:
    assert _soak(shards, tmp_path, 25, stage + 100, stage, background) == 25


def test_other_ranks_report_that_a_rank_has_ended(shards: dict[str, str], tmp_path: Path) -> None:
    training = {"steps": 10**6, "eval_every": 0}
    raw = run_file(shards, tmp_path, training=training, checkpoint={"every": EVERY})
    run = tmp_path / "run"
    processes = start_ranks(_rank, 2, raw)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[0].join(30)
    assert processes[0].exitcode == 1
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "another rank no longer answers" in status["reason"]

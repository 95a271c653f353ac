"""Epochs of fine-tuning are counted in samples, and evaluated before a run is done."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.checkpoint import open_checkpoint
from megalite.env import Launch
from megalite.errors import CommandError, MegaLiteError
from megalite.formats import checkpoint as disk
from tests.dist.test_finetune import numbers, tune, tuning_file, write_rows
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows

EPOCHS = 3


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    write_rows(folder / "train.jsonl", 61, 1)
    write_rows(folder / "test.jsonl", 23, 2)
    return folder


def _stopped_at(launch: Launch, raw: dict[str, Any], step: int) -> str:
    """Fine-tune. A stop signal arrives during `step`."""

    def inspect(now: int, *_: Any) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        tune(launch, raw, inspect=inspect)
    except MegaLiteError as error:
        return type(error).__name__
    return ""


def _tune(launch: Launch, raw: dict[str, Any]) -> str:
    try:
        tune(launch, raw)
    except CommandError as error:
        return str(error)
    return ""


def _run(raw: dict[str, Any]) -> Path:
    return Path(raw["logging"]["directory"]) / raw["name"]


def _windows(raw: dict[str, Any]) -> int:
    (start,) = [row for row in rows(raw, "event") if row["name"] == "start"]
    windows: int = start["data"]["windows"]
    return windows


@pytest.mark.parametrize(("first", "stop", "then"), [(8, 9, [16]), (8, 15, [4]), (4, 12, [16, 8])])
def test_resume_with_another_batch_size_trains_the_same_epochs(
    reviews: Path, first: int, stop: int, then: list[int]
) -> None:
    raw = tuning_file(reviews, "run", schedule={"name": "cosine"})
    raw["training"] |= {"global_batch_size": first}
    assert run_ranks(_stopped_at, 1, raw, stop) == ["Stopped"]
    trained = rows(raw)[-1]["samples"]
    for size in then:
        raw["training"] |= {"global_batch_size": size}
        again = stop + 2 if size != then[-1] else 0
        assert run_ranks(_stopped_at, 1, raw, again) == ["Stopped" if again else ""]
    total = EPOCHS * _windows(raw)
    train_rows = rows(raw)
    assert total <= train_rows[-1]["samples"] < total + max(first, *then)
    # each step takes the batch size of its start
    sizes = np.diff([0, *(row["samples"] for row in train_rows)])
    assert set(sizes) == {first, *then}
    assert trained == first * sum(row["attempt"] == 0 for row in train_rows)
    measured = numbers(raw)[:-1]
    assert [row["epoch"] for row in measured] == [1, 2, 3]
    ends = [row["samples"] for row in train_rows if row["step"] in [m["step"] for m in measured]]
    for epoch, samples in enumerate(ends, 1):
        assert 0 <= samples - epoch * _windows(raw) < max(first, *then)
    # the schedule ends with the run, and the change is recorded
    config = json.loads((_run(raw) / "config.json").read_text())
    assert config["training"]["steps"] == train_rows[-1]["step"]
    resumed = next(row for row in rows(raw, "event") if row["name"] == "resume")
    assert resumed["changes"]["training.global_batch_size"] == {"before": first, "after": then[0]}
    assert resumed["changes"]["training.steps"]["after"] != math.ceil(total / then[0])
    assert resumed["lr"]["before"] != resumed["lr"]["after"]


def test_resume_with_fewer_epochs_than_trained_is_refused(reviews: Path) -> None:
    raw = tuning_file(reviews, "run")
    assert run_ranks(_tune, 1, raw) == [""]
    raw["finetune"] |= {"epochs": 1}
    (error,) = run_ranks(_tune, 1, raw)
    assert error.startswith("finetune.epochs 1, but ")
    assert "has trained 3.10 epochs" in error
    raw["finetune"] |= {"epochs": 4}
    assert run_ranks(_tune, 1, raw) == [""]
    assert numbers(raw)[-2]["epoch"] == 4


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("epoch", [2, 3])
def test_epoch_that_ends_with_a_stop_is_evaluated_later(
    reviews: Path, epoch: int, background: bool
) -> None:
    """The run and all commands that open it agree on the best checkpoint."""
    raw = tuning_file(reviews, "run", checkpoint={"keep": 9, "background": background})
    raw["finetune"] |= {"metric": "loss"}
    windows = 49
    end = math.ceil(epoch * windows / 8)
    outcome = run_ranks(_stopped_at, 1, raw, end)
    assert _windows(raw) == windows
    root = _run(raw) / "checkpoints"
    if outcome == [""]:  # evaluated before the stop
        assert epoch == EPOCHS
    else:
        assert outcome == ["Stopped"]
        assert json.loads((_run(raw) / "status.json").read_text())["state"] == "stopped"
        assert run_ranks(_tune, 1, raw) == [""]
    assert json.loads((_run(raw) / "status.json").read_text())["state"] == "done"
    *measured, last = numbers(raw)
    assert [row["epoch"] for row in measured] == [1, 2, 3]
    best = min(measured, key=lambda row: row["loss"])
    assert last["best_step"] == best["step"]
    assert open_checkpoint(_run(raw), weights_only=True)[1].step == best["step"]
    for row in measured:
        manifest = disk.read_manifest(root / f"step_{row['step']:08d}")
        assert manifest.valid_loss == pytest.approx(row["loss"])

# covers: megalite/observe/tensorboard.py
"""Event folders, read back with TensorBoard's reader."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalite.observe import Recorder
from megalite.observe.tensorboard import train_scalars


def run(folder: Path, attempt: int, first: int, last: int, loss: float) -> None:
    recorder = Recorder(folder, rank=0, attempt=attempt, total_steps=9, tensorboard=True)
    if attempt == 0:
        recorder.valid({"step": 0, "loss": 9.0, "perplexity": 8103.0}, tokens=0)
        recorder.samples(0, [("def f(", "x):\n\n    pass"), ("*", "")])
    for step in range(first, last + 1):
        row = {"step": step, "loss": loss, "lr": 0.1, "grad_norm": float("nan"), "mfu": None}
        row |= {"tokens": 100 * step, "tokens_per_second": 5.0, "peak_memory_bytes": 2**30}
        recorder.train(row)
    recorder.valid({"step": last + 1, "loss": loss, "perplexity": 2.0}, tokens=100 * (last + 1))
    recorder.close()


def read(folder: Path) -> Any:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def points(events: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalars_are_written_by_step_and_by_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{\n  "name": "tiny"\n}\n')
    run(tmp_path, 0, 1, 3, loss=4.0)
    by_step, by_tokens = read(tmp_path / "tensorboard"), read(tmp_path / "tensorboard/by_tokens")
    assert points(by_step, "train/loss") == [(1, 4.0), (2, 4.0), (3, 4.0)]
    assert points(by_step, "valid/perplexity") == [(0, 8103.0), (4, 2.0)]
    assert points(by_step, "train/peak_memory_gib") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert set(by_step.Tags()["scalars"]) == {
        *("train/loss", "train/lr", "train/tokens_per_second", "train/peak_memory_gib"),
        *("valid/loss", "valid/perplexity"),
    }
    assert points(by_tokens, "train/loss_by_tokens") == [(100, 4.0), (200, 4.0), (300, 4.0)]
    assert points(by_tokens, "valid/loss_by_tokens") == [(0, 9.0), (400, 4.0)]
    (text,) = by_step.Tensors("config/text_summary")
    assert b'      "name": "tiny"' in text.tensor_proto.string_val[0]
    (text,) = by_step.Tensors("samples/text_summary")
    said = text.tensor_proto.string_val[0]
    assert said.startswith(
        b"**prompt**\n\n    def f(\n\n**text**\n\n    x):\n\n        pass\n\n---"
    )


def test_train_loss_is_the_mean_since_the_previous_row() -> None:
    assert train_scalars({"loss": 4.0, "mean_loss": 3.0})["train/loss"] == 3.0
    assert train_scalars({"loss": 4.0})["train/loss"] == 4.0


def test_resumed_attempt_removes_points_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    run(tmp_path, 0, 1, 5, loss=4.0)
    later = time.time() + 1  # event files of one second would be ordered by name
    monkeypatch.setattr("time.time", lambda: later)
    run(tmp_path, 1, 4, 6, loss=3.0)  # resumed from step 3
    by_step, by_tokens = read(tmp_path / "tensorboard"), read(tmp_path / "tensorboard/by_tokens")
    expected = [(1, 4.0), (2, 4.0), (3, 4.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert points(by_step, "train/loss") == expected
    assert points(by_tokens, "train/loss_by_tokens") == [
        (100 * step, loss) for step, loss in expected
    ]

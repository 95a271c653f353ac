# covers: megalite/observe/wandb.py
"""W&B: the data sent, one run for all attempts, and failures that do not end training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalite.config import WandbConfig
from megalite.observe import Recorder, wandb

CONFIG = WandbConfig(project="here", mode="offline", tags=("tiny",))


class Fake:
    """Stand-in for the package that records calls, and fails or waits on request."""

    def __init__(self, failing: str = "", seconds: float = 0.0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.disabled, self.url, self.dir = False, "https://there", "."
        self._failing, self._seconds = failing, seconds
        self.Settings, self.Image = SimpleNamespace, lambda image: ("image", image.shape)
        self.Table = lambda columns, data: data

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args[0] if args else kwargs))
            if name == self._failing:
                raise RuntimeError(f"{name} failed\nand more")
            if name == "finish":
                time.sleep(self._seconds)
            return self

        return call

    def arguments(self, name: str) -> list[Any]:
        return [argument for called, argument in self.calls if called == name]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake, end: str = "end") -> Fake:
    monkeypatch.setattr(wandb.importlib, "import_module", lambda _: fake)
    attempt(folder, end)
    return fake


def attempt(folder: Path, end: str = "end") -> None:
    (folder / "config.json").write_text('{"name": "tiny"}')
    recorder = Recorder(folder, rank=0, attempt=0, total_steps=9, tensorboard=False, wandb=CONFIG)
    row = {"step": 1, "loss": 2.5, "lr": 0.1, "grad_norm": float("nan"), "tokens": 64}
    recorder.train(row)
    recorder.valid({"step": 1, "loss": 3.5, "split": "test"}, tokens=64)
    recorder.samples(1, [("once", "upon a time")])
    recorder.picture("confusion", np.zeros((2, 3, 3), np.uint8), 1)
    recorder.event(1, end)
    recorder.close()


def test_wandb_gets_rows_samples_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, monkeypatch, Fake())
    (started,) = first.arguments("init")
    assert started["config"] == {"name": "tiny"}
    assert (started["project"], started["mode"], started["tags"]) == ("here", "offline", ["tiny"])
    assert first.arguments("log") == [
        {"step": 1, "train/loss": 2.5, "train/lr": 0.1, "train/tokens": 64},
        {"step": 1, "valid/loss": 3.5, "train/tokens": 64},
        {"step": 1, "samples": [[1, "once", "upon a time"]]},
        {"step": 1, "confusion": ("image", (2, 3, 3))},
    ]
    assert first.arguments("finish") == [{"exit_code": 0}]
    second = run(tmp_path, monkeypatch, Fake(), end="failed")
    assert second.arguments("init")[0]["id"] == started["id"]
    assert second.arguments("finish") == [{"exit_code": 1}]


@pytest.mark.parametrize("failing", ["setup", "init", "log", "finish"])
def test_wandb_failure_warns_once_and_ends_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
) -> None:
    fake = run(tmp_path, monkeypatch, Fake(failing))
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"W&B: {failing} failed; no more data is sent to W&B, and the run goes on"]
    assert fake.calls[-1][0] == failing
    assert '"kind": "sample"' in (tmp_path / "metrics.jsonl").read_text()


def test_slow_upload_does_not_delay_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "_FINISH", 0.1)
    began = time.monotonic()
    run(tmp_path, monkeypatch, Fake(seconds=5.0))
    assert time.monotonic() - began < 3
    assert (
        f"not all data was sent in 0 s; send the rest with `wandb sync` from {tmp_path}/wandb"
        in caplog.text
    )


def test_disabled_wandb_starts_nothing(tmp_path: Path) -> None:
    off = CONFIG.model_copy(update={"mode": "disabled"})
    recorder = Recorder(tmp_path, rank=0, attempt=0, total_steps=9, tensorboard=False, wandb=off)
    recorder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_two_offline_attempts_share_one_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason='wandb is missing: pip install -e ".[wandb]"')
    monkeypatch.setattr(wandb, "_FINISH", 300.0)  # other tests run at the same time
    for _ in range(2):
        attempt(tmp_path)
    id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    tables = list((tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.json"))
    pictures = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/confusion_*.png"))
    assert (
        1 <= len(runs) == len(tables) == len(pictures) <= 2
    )  # one folder if both start in one second
    for path in runs:
        content = path.read_bytes()
        assert b"train/loss" in content
        assert b"valid/loss" in content
    assert json.loads(tables[0].read_text())["data"] == [[1, "once", "upon a time"]]

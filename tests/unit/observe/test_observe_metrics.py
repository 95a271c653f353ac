# covers: megalite/observe/metrics.py
"""Records of a run: rows, states, attempts, and recovery after a crash."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megalite.observe import Recorder, previous_attempts
from megalite.observe import status as status_module
from megalite.observe.tensorboard import TensorBoard
from megalite.observe.wandb import Wandb


def recorder(folder: Path, *, rank: int = 0, attempt: int = 0) -> Recorder:
    return Recorder(folder, rank=rank, attempt=attempt, total_steps=20, tensorboard=False)


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "loss": 5.0 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 32 * step,
        "samples": 4 * step,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "step_seconds": 0.032,
        "peak_memory_bytes": 2**30,
    }
    return {**row, **changes}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_contain_kind_time_and_attempt(tmp_path: Path) -> None:
    before = time.time()
    record = recorder(tmp_path, attempt=2)
    record.event(0, "start", world_size=2)
    record.valid({"step": 0, "loss": 9.0, "perplexity": 8103.1})
    record.train(train_row(1))
    assert len(rows(tmp_path)) == 3  # written at once, not on close
    record.close()
    event, valid, train = rows(tmp_path)
    assert (event["kind"], event["step"], event["name"], event["world_size"]) == (
        "event", 0, "start", 2,
    )  # fmt: skip
    assert valid["kind"] == "valid"
    assert valid["perplexity"] == 8103.1
    assert train.items() >= train_row(1).items()
    assert train.keys() - train_row(1).keys() == {"kind", "time", "attempt"}
    assert train["attempt"] == 2
    assert before <= event["time"] <= valid["time"] <= train["time"] <= time.time()


def test_non_finite_numbers_are_null(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    record.train(train_row(1, loss=float("nan"), grad_norm=float("inf")))
    record.event(1, "skip", norms=[1.0, float("-inf")], ranks={"0": float("nan")})
    record.close()
    train, event = rows(tmp_path)
    assert train["loss"] is None
    assert train["grad_norm"] is None
    assert event["norms"] == [1.0, None]
    assert event["ranks"] == {"0": None}


def test_secrets_in_samples_are_redacted_in_every_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard, W&B and the console show the texts of metrics.jsonl."""
    record, shown = recorder(tmp_path), list[Any]()
    for view in (TensorBoard, Wandb):
        monkeypatch.setattr(view, "__init__", lambda _: None)
        monkeypatch.setattr(view, "samples", lambda _, step, texts: shown.append((step, *texts)))
        monkeypatch.setattr(view, "close", lambda _: None)
        record._views.append(view())  # type: ignore[call-arg]
    token = "hf_" + "aB3" * 12
    record.samples(1, [(f"401 for {token}: denied", f"see {token}")])
    record.close()
    safe = ("401 for [redacted]: denied", "see [redacted]")
    assert shown == [(1, safe)] * 2
    assert [(row["prompt"], row["text"]) for row in rows(tmp_path)] == [safe]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record = recorder(tmp_path, rank=1)
    record.event(0, "start")
    record.train(train_row(1))
    record.valid({"step": 1, "loss": 1.0, "perplexity": 2.7})
    record.status("running", step=1)
    record.close()
    assert list(tmp_path.iterdir()) == []


def test_status_is_replaced_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    record = recorder(tmp_path, attempt=1)
    record.status("running", step=3, last_checkpoint="step_00000003")
    record.status("stopped", step=5, reason="SIGTERM")
    record.close()
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "state": "stopped",
        "step": 5,
        "attempt": 1,
        "last_checkpoint": "step_00000003",
        "reason": "SIGTERM",
    }


def test_close_ends_writing_and_may_be_repeated(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    record.train(train_row(1))
    record.close()
    record.close()
    record.train(train_row(2))
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("rest", "complete"),
    [
        ('{"kind": "train", "step": 2, "lo', 1),
        ('{"kind": "train", "step": 2, "attempt": 0}', 2),
        ("", 1),
    ],
)
def test_line_cut_short_by_a_crash_harms_no_row(tmp_path: Path, rest: str, complete: int) -> None:
    first = recorder(tmp_path)
    first.train(train_row(1))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(rest)
    second = recorder(tmp_path, attempt=1)
    second.train(train_row(2))
    second.close()
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [*[1, 2, 2][:complete], 2]
    assert written[-1]["attempt"] == 1


def test_attempts_are_counted_from_either_record(tmp_path: Path) -> None:
    assert previous_attempts(tmp_path) == 0
    assert previous_attempts(tmp_path / "absent") == 0
    record = recorder(tmp_path, attempt=0)
    record.event(0, "start")
    record.close()
    assert previous_attempts(tmp_path) == 1  # only metrics.jsonl
    record = recorder(tmp_path, attempt=4)
    record.status("running", step=0)
    record.close()
    assert previous_attempts(tmp_path) == 5
    (tmp_path / "status.json").write_text('{"state": "runn')
    assert previous_attempts(tmp_path) == 1
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[]\n{"kind": "event", "attempt": 7}\n{"kind": "tr')
    assert previous_attempts(tmp_path) == 8


def test_attempts_are_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    line = json.dumps({"kind": "train", "attempt": 3, "padding": "x" * 500}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 300)
    assert previous_attempts(tmp_path) == 4


def test_full_disk_costs_records_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, rank=0, attempt=0, total_steps=9, tensorboard=False)
    recorder.status("running", step=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with caplog.at_level("WARNING", logger="megalite"):
        monkeypatch.setattr(status_module, "replace_small", full)
        recorder.status("running", step=2)
        recorder.status("saving", step=2)
        recorder.event(2, "checkpoint")
        monkeypatch.undo()
    assert caplog.text.count("No space left on device; the run goes on") == 1
    recorder.status("failed", step=2, reason="full")
    recorder.close()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert "checkpoint" in (tmp_path / "metrics.jsonl").read_text()


def test_older_attempt_does_not_overwrite_the_status_of_a_newer_one(tmp_path: Path) -> None:
    for attempt, state in ((1, "done"), (0, "superseded")):
        recorder = Recorder(
            tmp_path,
            rank=0,
            attempt=attempt,
            total_steps=9,
            tensorboard=False,
        )
        recorder.status(state, step=attempt)  # type: ignore[arg-type]
        recorder.close()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("done", 1)

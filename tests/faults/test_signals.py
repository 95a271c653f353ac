"""A stop signal on one rank stops all ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.faults.test_hang import _ranks, _start, _wait_for_step
from tests.helpers.runs import curve, rows, run_file


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGUSR1, 1)]
)
def test_stop_signal_on_one_rank_stops_all_at_the_same_step(
    shards: dict[str, str], tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    """The run is saved, and the same command resumes it."""
    raw = run_file(
        shards,
        tmp_path,
        schedule={"name": "constant"},
        training={"steps": 10**6, "eval_every": 0},
    )
    process = _start(raw, tmp_path)
    try:
        _wait_for_step(process, tmp_path / "run", 20)
        os.kill(_ranks(process.pid)[rank], number)
        _, words = process.communicate(timeout=90)
    finally:
        process.kill()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped", words
    assert status["last_checkpoint"] == f"step_{status['step']:08d}"
    assert words.count("exitcode  : 75") == 2
    (event,) = [row for row in rows(raw, "event") if row["name"] == "signal"]
    assert event["signal"] in (number.name, "a hook, or a signal on another rank")
    raw["training"]["steps"] = status["step"] + 2
    process = _start(raw, tmp_path)
    _, words = process.communicate(timeout=90)
    assert process.returncode == 0, words
    assert len(curve(raw)) == status["step"] + 2

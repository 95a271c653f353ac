# covers: megalite/observe/goodput.py
"""Reports of doctor.py on runs that were killed, stopped and finished."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite.commands.doctor import _print_goodput
from megalite.errors import CommandError
from megalite.observe.goodput import goodput
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import run_file, train

ROOT = Path(__file__).resolve().parents[2]


def _row(kind: str, time: float, attempt: int, step: int, **fields: Any) -> str:
    return json.dumps({"kind": kind, "time": time, "attempt": attempt, "step": step, **fields})


def test_goodput_reports_the_time_of_a_run_by_phase(tmp_path: Path) -> None:
    """Setup takes 10 s, a step 1 s, a save 2 s. The run is killed after step 25."""
    before = {"setup": 10.0, "step": 20.0, "save": 4.0}
    lines = [
        _row("event", 110, 0, 0, name="start"),
        _row("event", 134, 0, 20, name="checkpoint", seconds=before),
        _row("train", 139, 0, 25),
        _row("event", 210, 1, 20, name="resume"),
        _row("train", 220, 1, 30),
        _row(
            "event",
            222,
            1,
            30,
            name="stopped",
            reason="Stopped: by SIGTERM",
            seconds={"setup": 10.0, "step": 10.0, "save": 2.0},
        ),
        '{"kind": "tra',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "status.json").write_text('{"state": "stopped"}')
    report = goodput(tmp_path)
    assert report["wall_seconds"] == 122
    assert report["seconds"] == pytest.approx(
        {"setup": 20, "step": 30, "save": 6, "lost": 5, "down": 61}
    )
    assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"])
    assert report["goodput"] == pytest.approx(30 / 122)
    assert (report["restarts"], report["lost_steps"]) == (1, 5)
    assert [one["cause"] for one in report["attempts"]] == [
        "killed, or its host failed: it recorded no end",
        "Stopped: by SIGTERM",
    ]


def test_goodput_counts_steps_undone_by_a_rollback_as_lost(tmp_path: Path) -> None:
    """The records also have a straggler event, whose seconds do not count."""
    lines = [
        _row("event", 100, 0, 0, name="start"),
        _row("event", 117, 0, 17, name="rollback", to=10),
        _row("event", 118, 0, 18, name="straggler", rank=1, host="a", seconds=0.3, median=0.1),
        _row("event", 131, 0, 30, name="end", seconds={"setup": 5, "step": 36.0}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    report = goodput(tmp_path)
    assert report["lost_steps"] == 6
    assert report["seconds"]["lost"] == pytest.approx(6.0)
    assert report["seconds"]["step"] == pytest.approx(30.0)


@pytest.mark.parametrize("seconds", [[1], {"step": "x"}])
def test_goodput_ignores_invalid_rows(tmp_path: Path, seconds: Any) -> None:
    lines = [
        _row("event", 100, 0, 0, name="start"),
        _row("event", 117, 0, 17, name="end", seconds=seconds),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(CommandError, match=r"metrics\.jsonl is damaged"):
        goodput(tmp_path)


def test_goodput_of_a_real_run_adds_up_to_its_wall_time(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, checkpoint={"every": 10})
    run_ranks(train, 2, raw)
    raw["training"] = raw["training"] | {"steps": 30}
    run_ranks(train, 1, raw)
    command = [sys.executable, str(ROOT / "launcher/doctor.py"), "--run", str(tmp_path / "run")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1 restarts, 0 steps lost" in text
    assert "attempt 1: steps 21 to 30: done" in text
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    # the start time of a process has a resolution of one second
    assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"], abs=2)
    assert {"setup", "step", "eval", "save"} <= {*report["seconds"]}
    missing = subprocess.run(
        [*command[:-1], str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert "cannot read metrics.jsonl" in missing.stderr


def test_clock_that_is_set_back_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = 115 * 86400.0
    lines = [
        _row("event", 1000.0 + back, 0, 0, name="start"),
        _row("train", 1010.0 + back, 0, 10),
        _row("event", 1020.0, 1, 10, name="resume"),
        _row("train", 1050.0, 1, 20),
        _row("event", 1051.0, 1, 20, name="end", seconds={"setup": 2.0, "step": 29.0}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    report = goodput(tmp_path)
    assert report["clock_set_back_seconds"] == back - 10
    assert report["wall_seconds"] == 41
    assert 0 < report["goodput"] <= 1
    _print_goodput(report)
    assert "the clock was set back by 114 d 23:59:50 during the run" in capsys.readouterr().out

# covers: megalite/observe/watch.py
"""A rank that hangs ends the job, with the stacks of running ranks and the name of the culprit."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite.observe.watch import describe_culprit
from megalite.spawn import free_port
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 6.0


def _start(raw: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    config = folder / "run.json"
    config.write_text(json.dumps(raw))
    port = ["--master-port", str(free_port())]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *port]
    return subprocess.Popen(
        [sys.executable, *command, str(ROOT / "launcher/pretrain.py"), "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def _wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"it ended before step {step}:\n{process.communicate()[1]}")
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                if row["kind"] == "train" and row["step"] >= step:
                    return
        time.sleep(0.1)
    raise AssertionError("no step in 300 s")


def _ranks(launcher: int) -> dict[int, int]:
    """Return the process ids of a launcher's ranks."""
    by_rank = {}
    for child in subprocess.run(
        ["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False
    ).stdout.split():
        for item in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if item.startswith(b"RANK="):
                by_rank[int(item[5:])] = int(child)
    return by_rank


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("stopped", [0, 1])
def test_rank_that_is_stopped_ends_the_job(
    shards: dict[str, str], tmp_path: Path, stopped: int
) -> None:
    raw = run_file(
        shards,
        tmp_path,
        training={"steps": 10**6, "eval_every": 0},
        guards={"hang_seconds": BUDGET, "hang_setup_seconds": 120},
    )
    run = tmp_path / "run"
    process = _start(raw, tmp_path)
    try:
        _wait_for_step(process, run, 40)
        ranks = _ranks(process.pid)
        os.kill(ranks[stopped], signal.SIGSTOP)
        began = time.monotonic()
        while _runs(ranks[1 - stopped]):
            assert time.monotonic() - began < BUDGET + 10
            time.sleep(0.1)
        os.kill(ranks[stopped], signal.SIGKILL)  # as the launcher does after its 30 s
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    (stacks,) = run.glob("stacks/attempt_0/*")
    assert stacks.name == f"rank_{1 - stopped:05d}.txt"
    text = stacks.read_text()
    assert "loop.py" in text  # the running rank waits in its step
    assert text.count("hread 0x") >= 3  # main, loader, watchdog
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert f"rank {stopped} on " in status["reason"]
    assert "no longer runs" in status["reason"]
    assert status["reason"] in words
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["name"] for row in events if row["kind"] == "event"][-1] == "hang"


def test_run_that_is_suspended_continues(shards: dict[str, str], tmp_path: Path) -> None:
    """A suspension by Ctrl-Z for longer than the limit is no hang."""
    raw = run_file(
        shards,
        tmp_path,
        training={"steps": 10**6, "eval_every": 0},
        guards={"hang_seconds": 2.0, "hang_setup_seconds": 120},
    )
    config = tmp_path / "run.json"
    config.write_text(json.dumps(raw))
    command = [sys.executable, str(ROOT / "launcher/pretrain.py"), "--config", str(config)]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        _wait_for_step(process, tmp_path / "run", 20)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, words
    assert not (tmp_path / "run" / "stacks").exists()


def _report(**fields: Any) -> dict[str, Any]:
    return {"section": "step", "seconds": 31.0, "count": 7, "waits": True, **fields}


def test_culprit_of_a_hang_is_the_silent_or_latest_rank() -> None:
    hosts = ["a", "a", "b"]
    silent = {0: _report(), 1: _report()}
    said = "phase step did not end within 31 s: rank 2 on b no longer runs"
    assert describe_culprit(silent, hosts) == said
    behind = {0: _report(), 1: _report(count=6), 2: _report()}
    assert describe_culprit(behind, hosts).endswith("rank 1 on a is behind the others")
    alone = {0: _report(), 1: _report(), 2: _report(waits=False)}
    assert describe_culprit(alone, hosts).endswith(
        "rank 2 on b does not wait in a collective, unlike the others"
    )
    equal = {rank: _report() for rank in range(3)}
    assert describe_culprit(equal, hosts).endswith("all ranks are at the same point")


def _train_slowly(launch: Any, raw: dict[str, Any]) -> None:
    """Train. Rank 1 takes 0.2 s more for each forward."""
    running: Any = importlib.import_module("megalite.train.session")
    make = running._make_engine

    def slow(*parts: Any) -> Any:
        engine: Any = make(*parts)
        if launch.rank == 1:
            layer = next(engine.model.blocks)
            layer.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        return engine

    running._make_engine = slow
    train(launch, raw)


def test_slow_rank_is_reported_once(shards: dict[str, str], tmp_path: Path) -> None:
    """The report follows three rows of one step each."""
    raw = run_file(shards, tmp_path, training={"steps": 6, "eval_every": 0})
    run_ranks(_train_slowly, 2, raw)
    (event,) = [row for row in rows(raw, "event") if row["name"] == "straggler"]
    assert (event["step"], event["rank"]) == (3, 1)
    assert event["seconds"] > 0.2


def test_ranks_of_equal_speed_are_not_reported(shards: dict[str, str], tmp_path: Path) -> None:
    raw = run_file(shards, tmp_path, training={"eval_every": 0, "log_every": 5})
    run_ranks(train, 2, raw)
    assert [r for r in rows(raw, "event") if r["name"] == "straggler"] == []

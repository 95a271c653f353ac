"""Ranks of a launcher that is killed by SIGKILL, which it cannot forward."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import os, signal, sys, time
from pathlib import Path
from megalite.cli import run_main
def main():
    place = Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: (place.joinpath("asked").touch(), os._exit(75)))
    place.joinpath("pid").write_text(str(os.getpid()))
    time.sleep(60)
run_main(main, ranks=True)
"""
AGENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""


def wait_for(path: Path, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return path.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.parametrize("run_id", ["7", ""])
def test_rank_stops_when_torchruns_agent_is_killed(tmp_path: Path, run_id: str) -> None:
    """A rank whose parent is not torchrun's agent continues."""
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", AGENT, RANK, str(tmp_path)]
    agent = subprocess.Popen(command, env=environ | {"TORCHELASTIC_RUN_ID": run_id})
    assert wait_for(tmp_path / "pid")
    time.sleep(0.2)  # until the process id is written
    rank = int((tmp_path / "pid").read_text())
    try:
        agent.kill()
        agent.wait()
        assert wait_for(tmp_path / "asked", 30.0 if run_id else 1.0) == bool(run_id)
    finally:
        if not run_id:
            os.kill(rank, signal.SIGKILL)

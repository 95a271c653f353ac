"""What launchers refuse before they open a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[3] / "launcher"


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("eval.py", ["--limit", "3"], "--limit and --task-path are of --tasks"),
        ("eval.py", ["--task-path", "mine"], "--limit and --task-path are of --tasks"),
        ("explain.py", ["--text", "a", "--output", "gone/a.html"], "there is no folder gone"),
        ("explain.py", ["--text", "a", "--output", "."], "name a file"),
    ],
)
def test_what_would_be_ignored_or_lost(
    tmp_path: Path, name: str, more: list[str], told: str
) -> None:
    line = [sys.executable, str(LAUNCHERS / name), "--checkpoint", "runs/mine", *more]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())

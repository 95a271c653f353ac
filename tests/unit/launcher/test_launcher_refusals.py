"""Options that launchers refuse before they load a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[3] / "launcher"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eval.py", ["--limit", "3"], "--limit and --task-path only apply to --tasks"),
        ("eval.py", ["--task-path", "mine"], "--limit and --task-path only apply to --tasks"),
        ("explain.py", ["--text", "a", "--output", "gone/a.html"], "there is no folder gone"),
        ("explain.py", ["--text", "a", "--output", "."], "it exists and is not a file"),
    ],
)
def test_option_without_effect_or_output_is_refused(
    tmp_path: Path, name: str, options: list[str], message: str
) -> None:
    command = [sys.executable, str(LAUNCHERS / name), "--checkpoint", "runs/mine", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

# covers: megalite/commands/training.py megalite/spawn.py
"""`megalite pretrain` as a user starts it: ranks of its own, a stop, a resume, torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.spawn import free_port
from tests.helpers.runs import rows, run_file

ROOT = Path(__file__).resolve().parents[2]
MEGALITE = [sys.executable, "-m", "megalite"]


def write_yaml(shards: dict[str, str], folder: Path, **sections: Any) -> tuple[dict[str, Any], str]:
    """Write a run file in YAML; return its content and its path."""
    raw = run_file(shards, folder, **sections)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return raw, str(path)


def start(*command: str, **options: Any) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environ, text=True, stderr=subprocess.PIPE, **options)


def test_run_stops_with_75_and_resumes_on_other_ranks(
    shards: dict[str, str], tmp_path: Path
) -> None:
    training = {"steps": 60, "log_every": 1}
    raw, path = write_yaml(shards, tmp_path, training=training)
    folder = Path(raw["logging"]["directory"]) / raw["name"]
    first = start(*MEGALITE, "pretrain", path, "--ranks", "2", "--set", "training.steps=100000")
    while first.poll() is None and not (
        (folder / "metrics.jsonl").exists()
        and '"kind": "train"' in (folder / "metrics.jsonl").read_text()
    ):
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, text = first.communicate(timeout=120)
    assert first.returncode == 75, text
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    steps = str(status["step"] + 2)
    second = start(*MEGALITE, "pretrain", path, "--set", f"training.steps={steps}")
    _, text = second.communicate(timeout=120)
    assert second.returncode == 0, text
    assert "ranks: 2 -> 1" in text
    assert [row["step"] for row in rows(raw, "train")] == list(range(1, int(steps) + 1))


def test_user_error_of_ranks_is_printed_once_and_ends_in_2(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw, path = write_yaml(shards, tmp_path)
    done = start(*MEGALITE, "pretrain", path, "--ranks", "2", "--set", "training.stepz=1")
    _, text = done.communicate(timeout=60)
    assert done.returncode == 2
    assert text.count("training.stepz: unknown key") == 1
    assert not (Path(raw["logging"]["directory"]) / raw["name"]).exists()


@pytest.mark.parametrize(
    "launcher",
    [
        ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "--no-python"],
        ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--no_python"],
    ],
    ids=lambda launcher: launcher[0],
)
def test_under_a_launcher_the_command_is_one_rank(
    shards: dict[str, str], tmp_path: Path, launcher: list[str]
) -> None:
    raw, path = write_yaml(shards, tmp_path, training={"steps": 2})
    script = tmp_path / "megalite"  # what `pip install` puts on the PATH
    script.write_text(f"#!{sys.executable}\nfrom megalite.commands import main\nmain()\n")
    script.chmod(0o755)
    program = str(Path(sys.executable).parent / launcher[0])
    port = str(free_port())
    options = [port if word == "PORT" else word for word in launcher[1:]]
    command = [program, *options, str(script), "pretrain", path]
    done = start(*command, stdout=subprocess.PIPE)
    out, text = done.communicate(timeout=180)
    assert done.returncode == 0, out + text
    start_row = next(row for row in rows(raw, "event") if row["name"] == "start")
    assert start_row["world_size"] == 2

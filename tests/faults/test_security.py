"""Secrets that must not be written down, and files that must not be everyone's."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.log import redact
from tests.runs import run_file

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"401 for {TOKEN}: denied", "401 for [redacted]: denied"),
        ("git clone https://me:pa55@host/x", "git clone https://[redacted]@host/x"),
        ("a/b@c:d, 12:30, model_key", "a/b@c:d, 12:30, model_key"),
        ("hf_model and sk-learn", "hf_model and sk-learn"),
    ],
)
def test_what_opens_accounts_is_taken_out(text: str, safe: str) -> None:
    assert redact(text) == safe
    assert redact({"a": [text, 3], "api_key": "x"}) == {"a": [safe, 3], "api_key": "[redacted]"}


def test_values_of_secret_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_PASSWORD", "correct horse")
    assert redact("login with correct horse") == "login with [redacted]"
    assert redact({"wandb": {"team": "correct horse"}})["wandb"]["team"] == "[redacted]"


def test_a_run_under_an_open_umask(shards: dict[str, str], tmp_path: Path) -> None:
    """No file of it is world-writable, and none holds the token that the run file carries."""
    raw = run_file(
        shards,
        tmp_path,
        training={"steps": 4},
        logging={"tensorboard": True},
        checkpoint={"every": 2},
    )
    raw["deepspeed"] = {"wandb": {"enabled": False, "team": TOKEN}}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(raw))
    command = f"umask 000; {sys.executable} {ROOT}/launcher/pretrain.py --config {config}"
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        ["bash", "-c", command], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(written) > 20
    assert [str(path) for path in written if path.stat().st_mode & stat.S_IWOTH] == []
    holders = [p for p in written if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert holders == []
    assert TOKEN not in done.stdout + done.stderr

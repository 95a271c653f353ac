"""Secrets are not written to files, and files are not world-writable."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite.config import load_stored, parse_config
from megalite.errors import ConfigError
from megalite.log import redact
from tests.helpers.runs import run_file

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "a1B2" * 8
TOKENS = (
    TOKEN,
    "ghp_" + "Zz09" * 9,
    "github_pat_" + "11AAbb22" * 4,
    "glpat-" + "x7_Y" * 5,
    "npm_" + "aB3d" * 9,
    "sk-" + "q9W2" * 12,
    "sk-proj-" + "q9W2" * 12,
    "sk-ant-api03-" + "q9W2" * 12,
    "xoxb-" + "1234567890-abcdef",
    "AKIA" + "ABCD1234" * 2,
    "AIza" + "Sy-a_B3" * 5,
    "ya29." + "a0Af_x" * 6,
    "eyJ" + "hbGciOi.eyJ" + "zdWIiOiIx.SflKxwRJ" + "SMeKKF2QT4",
)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        (f"401 for {TOKEN}: denied", "401 for [redacted]: denied"),
        ("git clone https://me:pa55@host/x", "git clone https://[redacted]@host/x"),
        ("a/b@c:d, 12:30, model_key", "a/b@c:d, 12:30, model_key"),
        ("hf_model and sk-learn", "hf_model and sk-learn"),
        *((f"({token})", "([redacted])") for token in TOKENS),
        *(
            (path, path)
            for path in (
                "data/sk-wikipedia-2024",
                "data/sk-wikipedia-2024-06-articles",
                "hf_datasets_cache_2024/train",
                "npm_packages_of_2024",
                "ghp_corpus_small",
                "runs/risk-averse-model-1",
            )
        ),
    ],
)
def test_tokens_are_redacted_and_paths_are_not(text: str, safe: str) -> None:
    assert redact(text) == safe
    assert redact({"a": [text, 3], "api_key": "x"}) == {"a": [safe, 3], "api_key": "[redacted]"}


def test_values_of_secret_variables_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_PASSWORD", "correct horse")
    monkeypatch.setenv("GROUP_KEY", "layernorm")
    assert redact("login with correct horse") == "login with [redacted]"
    assert redact({"wandb": {"team": "correct horse"}})["wandb"]["team"] == "[redacted]"
    assert redact("model.norm layernorm") == "model.norm layernorm"


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("deepspeed.wandb.team", {"deepspeed": {"wandb": {"team": "?"}}}),
        ("logging.wandb.project", {"logging": {"wandb": {"project": "of ?"}}}),
        ("logging.wandb.tags[0]", {"logging": {"wandb": {"project": "p", "tags": ["?"]}}}),
        ("logging.samples.prompts[1]", {"logging": {"samples": {"prompts": ["a", "use ? to"]}}}),
    ],
)
def test_run_file_with_a_secret_is_refused(token: str, key: str, section: dict[str, Any]) -> None:
    shards = {"train": "train", "valid": "valid"}
    raw = run_file(shards, "runs", **json.loads(json.dumps(section).replace("?", token)))
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert any(f"{key}: contains a secret" in fault for fault in caught.value.faults)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["token", "hf_token", "access_token", "private_key", "credentials", "api_key"]
)
def test_keys_that_name_a_secret_are_refused(key: str) -> None:
    raw = run_file({"train": "train", "valid": "valid"}, "runs")
    raw["deepspeed"] = {"wandb": {key: "plain"}}
    with pytest.raises(ConfigError, match=f"deepspeed.wandb.{key}: contains a secret"):
        parse_config(raw)


def start(config: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = f"umask 000; {sys.executable} {ROOT}/launcher/pretrain.py --config {config}"
    variables = dict(os.environ) | environ
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        variables.pop(name, None)
    return subprocess.run(
        ["bash", "-c", command], env=variables, capture_output=True, text=True, check=False
    )


def test_run_under_an_open_umask_has_no_world_writable_files(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """Values that look like secrets are stored unchanged."""
    (tmp_path / "sk-wikipedia-2024").symlink_to(shards["train"])
    raw = run_file(
        {"train": str(tmp_path / "sk-wikipedia-2024"), "valid": shards["valid"]},
        tmp_path,
        name="sk-wikipedia-base",
        model={"norm": "layernorm"},
        training={"steps": 4},
        logging={"tensorboard": True},
        checkpoint={"every": 2},
    )
    config = tmp_path / "run.json"
    config.write_text(json.dumps(raw))
    folder = tmp_path / "sk-wikipedia-base"
    done = start(config, GROUP_KEY="layernorm", RUN_SECRET="sk-wikipedia-base")
    assert done.returncode == 0, done.stderr
    written = [folder, *folder.rglob("*")]
    assert len(written) > 20
    assert [str(path) for path in written if path.stat().st_mode & stat.S_IWOTH] == []
    for stored in (folder, folder / "checkpoints" / "step_00000004"):
        assert load_stored(stored / "config.json") == parse_config(raw)
    raw["training"]["steps"] = 5
    config.write_text(json.dumps(raw))
    assert start(config).returncode == 0


def test_run_file_with_a_token_writes_nothing(shards: dict[str, str], tmp_path: Path) -> None:
    raw = run_file(shards, tmp_path)
    raw["deepspeed"] = {"wandb": {"enabled": False, "team": TOKEN}}
    config = tmp_path / "run.json"
    config.write_text(json.dumps(raw))
    done = start(config)
    assert done.returncode == 2
    assert "deepspeed.wandb.team: contains a secret" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


# --- links ---


@pytest.fixture
def linked(shards: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Return foreign shards whose tokenizer folder contains links and other files."""
    (tmp_path / "secret").write_text("the secret")
    shutil.copytree(shards["train"], tmp_path / "shards")
    folder = tmp_path / "shards" / "tokenizer"
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to("..")
    (folder / "other.txt").write_text("no tokenizer's")
    return {**shards, "train": str(tmp_path / "shards")}


def test_links_next_to_the_tokenizer_are_not_followed(
    linked: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(linked, tmp_path, training={"steps": 2}, checkpoint={"every": 2})
    config = tmp_path / "run.json"
    config.write_text(json.dumps(raw))
    done = start(config)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    for place in (folder, folder / "checkpoints" / "step_00000002"):
        assert [path.name for path in (place / "tokenizer").iterdir()] == ["bytes.json"]
    assert not any(b"the secret" in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_link_in_place_of_the_tokenizer_is_refused(linked: dict[str, str], tmp_path: Path) -> None:
    (Path(linked["train"]) / "tokenizer" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    config = tmp_path / "run.json"
    config.write_text(json.dumps(run_file(linked, tmp_path, training={"steps": 2})))
    done = start(config)
    assert done.returncode == 2
    assert "chat_template.jinja is a link, which is not followed" in done.stderr
    assert not (tmp_path / "run").exists()

# covers: megalite/config/fields.py megalite/config/load.py
"""Special texts in a run file: `~` for the home folder, and half a surrogate pair."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megalite.cli import command_parser
from megalite.config import find_run, load_config, parse_config
from megalite.errors import CommandError, ConfigError
from tests.helpers.runs import BASE


@pytest.mark.parametrize("half", ["\ud83d", "a\udc00"])
@pytest.mark.parametrize(
    "change",
    [
        lambda raw, half: raw.update({half: 1}),
        lambda raw, half: raw["model"].update({half: 1}),
        lambda raw, half: raw["data"].update(train=[{"path": "a", half: 1}]),
        lambda raw, half: raw.update(deepspeed={"wandb": {half: 1}}),
        lambda raw, half: raw.update(deepspeed={"wandb": {"team": half}}),
        lambda raw, half: raw.update(name=half),
    ],
)
def test_half_a_surrogate_pair_is_a_fault(tmp_path: Path, change: Any, half: str) -> None:
    raw = copy.deepcopy(BASE)
    change(raw, half)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"\\ud83d|\\udc00"):
        load_config(tmp_path / "run.json")


def at(raw: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        raw = raw[int(part)] if isinstance(raw, list | tuple) else raw[part]
    return raw


PATHS = (
    *("logging.directory", "data.train.0.path", "data.valid.0.path", "finetune.data.path"),
    *("finetune.data.cache", "finetune.data.tokenizer", "finetune.data.chat_template"),
)


def with_path(key: str, path: str) -> dict[str, Any]:
    raw = copy.deepcopy(BASE)
    if key.startswith("finetune"):
        name = key.rpartition(".")[2]
        raw["finetune"] = {
            "task": "sft",
            "data": {"path": "rows.jsonl", "max_length": 16, name: path},
        }
        raw["data"], raw["training"] = {}, {**raw["training"], "steps": 0}
    elif key.startswith("logging"):
        raw["logging"] = {"directory": path}
    else:
        raw["data"][key.split(".")[1]] = [{"path": path}]
    return raw


@pytest.mark.parametrize("key", PATHS)
def test_home_folder_is_expanded_in_every_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    expanded = parse_config(with_path(key, "~/place")).model_dump(mode="json")
    assert at(expanded, key) == "/home/me/place"
    assert parse_config(expanded) == parse_config(with_path(key, "~/place"))
    with pytest.raises(ConfigError, match="~name is a user with a home folder here, got"):
        parse_config(with_path(key, "~nobody-here/place"))
    assert at(parse_config(with_path(key, "./~")).model_dump(), key) == "./~"


def test_home_folder_is_expanded_in_the_path_of_a_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    child = {"extends": "~/base.json", "logging": {"directory": "~/runs"}}
    (tmp_path / "run.json").write_text(json.dumps(child))
    assert load_config("~/run.json").logging.directory == str(tmp_path / "runs")
    assert find_run("~/run.json") == tmp_path / "runs" / BASE["name"]


def test_home_folder_is_expanded_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = command_parser("a command", "")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--resume", metavar="auto|never|PATH")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT")
    arguments = parser.parse_args(
        ["~/a", "b", "--resume=~/run", "--output=~/page.html", "--prompt", "~/x"]
    )
    assert arguments.runs == [Path("/home/me/a"), Path("b")]
    assert (arguments.resume, arguments.output) == ("/home/me/run", Path("/home/me/page.html"))
    assert arguments.prompt == ["~/x"]
    with pytest.raises(CommandError, match="~nobody-here is not a user with a home folder here"):
        parser.parse_args(["a", "--output=~nobody-here/x"])

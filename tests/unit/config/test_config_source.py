# covers: megalite/config/load.py megalite/config/strict.py
"""Run files passed as a mapping or a RunConfig are checked in the same way as files."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from megalite.config import find_run, lacks_model, load_config, stated_model
from megalite.errors import ConfigError
from tests.helpers.runs import BASE, merge_sections


def test_file_mapping_and_run_config_load_identically(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(BASE))
    sets = ["training.steps=7", "model.norm=layernorm"]
    expected = load_config(path, sets)
    assert load_config(BASE, sets) == expected
    assert load_config(MappingProxyType(BASE), sets) == expected
    assert load_config(load_config(BASE), sets) == expected
    assert expected.training.steps == 7


def test_mapping_is_not_changed_by_loading() -> None:
    raw = merge_sections(BASE, {})
    load_config(raw, ["training.steps=7"])
    assert raw == BASE


def test_mapping_may_contain_paths_and_tuples() -> None:
    data = {"train": ({"path": Path("shards/a")},), "sequence_length": 64}
    config = load_config(merge_sections(BASE, {"data": data}))
    assert [source.path for source in config.data.train] == ["shards/a"]


def test_extends_of_a_mapping_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    monkeypatch.chdir(tmp_path)
    assert load_config({"extends": "base.json", "name": "mine"}).name == "mine"


def test_mapping_is_searched_for_run_folder_and_model() -> None:
    assert find_run(BASE, ["name=other"]) == Path("runs/other")
    assert stated_model(BASE)["hidden_size"] == 32
    assert not lacks_model(BASE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (merge_sections(BASE, {"nme": 1}), 'the configuration: nme: unknown key; did you mean "na'),
        (merge_sections(BASE, {"optimizer": {"lr": float("nan")}}), "NaN is not a JSON number"),
        (merge_sections(BASE, {"model": {1, 2}}), "not JSON: a value of type set; use only text"),
        ({("a", "b"): 1}, "not JSON: keys must be str"),
        ([1], r"expected a path, a mapping or a RunConfig, got \[1\]"),
    ],
)
def test_mapping_has_the_faults_of_a_file(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(source)


def test_mapping_that_contains_itself_is_refused() -> None:
    raw: dict[str, Any] = {}
    raw["model"] = raw
    with pytest.raises(ConfigError, match="the configuration: not JSON: Circular reference"):
        load_config(raw)

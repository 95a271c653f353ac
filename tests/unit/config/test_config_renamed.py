# covers: megalite/config/renamed.py
"""Renamed keys: old names are read, new names are written, both together are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import RunConfig, load_config, load_stored, parse_config
from megalite.config.renamed import rename_keys
from megalite.errors import ConfigError
from tests.helpers.models import run_config

OLD = {"training": {"drift_every": 7}, "checkpoint": {"grace_seconds": 3.5}}
NEW = {"training": {"replica_check_every": 7}, "checkpoint": {"stop_grace_seconds": 3.5}}


def written(folder: Path, *changes: dict[str, dict[str, Any]], name: str = "run.json") -> Path:
    """Write a run file with `changes`, without the new names unless `changes` has them."""
    raw = run_config().model_dump(mode="json")
    del raw["training"]["replica_check_every"], raw["checkpoint"]["stop_grace_seconds"]
    for change in changes:
        for section, values in change.items():
            raw[section] |= values
    path = folder / name
    path.write_text(json.dumps(raw))
    return path


def values(config: RunConfig) -> tuple[int, float]:
    return config.training.replica_check_every, config.checkpoint.stop_grace_seconds


def test_old_names_in_a_run_file_are_read_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, OLD)
    config = load_config(path)
    assert values(config) == (7, 3.5)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{path}: training.drift_every is now training.replica_check_every, "
        f"{path}: checkpoint.grace_seconds is now checkpoint.stop_grace_seconds; rename it in the "
        "file"
    )
    new = config.model_dump(mode="json")
    assert {key: new[section][key] for section in NEW for key in NEW[section]} == {
        "replica_check_every": 7,
        "stop_grace_seconds": 3.5,
    }
    assert "drift_every" not in new["training"]
    assert "grace_seconds" not in new["checkpoint"]


def test_old_names_in_a_stored_run_file_are_read_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, OLD, name="config.json")
    assert values(load_stored(path)) == (7, 3.5)
    assert values(parse_config(json.loads(path.read_text()))) == (7, 3.5)
    assert caplog.records == []


def test_old_and_new_name_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, OLD, NEW))
    assert [fault.partition(": ")[2].partition(":")[0] for fault in caught.value.faults] == [
        "training.drift_every",
        "checkpoint.grace_seconds",
    ]
    assert "which is also set; remove training.drift_every" in str(caught.value)


def test_old_name_of_a_file_replaces_the_new_one_of_the_file_it_extends(tmp_path: Path) -> None:
    written(tmp_path, NEW)
    child = tmp_path / "child.json"
    child.write_text(json.dumps({"extends": "run.json", "training": {"drift_every": 2}}))
    assert values(load_config(child)) == (2, 3.5)
    assert values(load_config(child, ["training.drift_every=5"])) == (5, 3.5)
    assert values(load_config(child, ["checkpoint.stop_grace_seconds=1"])) == (2, 1.0)


def test_rename_keys_ignores_values_that_are_not_sections() -> None:
    raw: dict[str, Any] = {"training": None, "checkpoint": [1]}
    assert rename_keys(raw) == {}
    assert raw == {"training": None, "checkpoint": [1]}

# covers: megalite/observe/sinks.py
"""A run on two ranks with a norm, an optimizer and a sink of an installed package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite import registry
from megalite.errors import ConfigError
from tests.helpers.plugins import install_package
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero


def train_with(launch: Any, site: str, raw: dict[str, Any], **request: Any) -> None:
    """Train in a rank's process that has the package on its module path."""
    sys.path.insert(0, site)
    registry._points.cache_clear()
    train(launch, raw, **request)


def test_run_with_a_package_trains_resumes_and_records_it(
    shards: dict[str, str], tmp_path: Path
) -> None:
    site = str(tmp_path / "site")
    install_package(tmp_path / "site")
    raw = run_file(
        shards,
        tmp_path,
        name="whole",
        model={"norm": "scaled"},
        optimizer={"name": "lion", "lr": 1e-4},
        training={"steps": 6, "eval_every": 3},
        checkpoint={"every": 3},
        logging={"sinks": ["lines"]},
    )
    run_ranks(train_with, 1, site, raw | {"deepspeed": zero(0)})
    whole = curve(raw)
    assert whole[-1][0] < whole[0][0]

    halves = raw | {"name": "halves", "parallel": {"tensor": 2}, "deepspeed": zero(1)}
    run_ranks(train_with, 2, site, halves | {"training": raw["training"] | {"steps": 3}})
    run_ranks(train_with, 1, site, halves | {"parallel": {"tensor": 1}, "deepspeed": zero(2)})
    for pair, expected in zip(curve(halves), whole, strict=True):
        assert pair == pytest.approx(expected, rel=2e-5)

    folder = tmp_path / "halves"
    recorded = {"norm.scaled": "toy-parts 1.2", "optimizer.lion": "toy-parts 1.2"}
    for path in (folder, *sorted((folder / "checkpoints").glob("step_*"))):
        plugins = json.loads((path / "config.json").read_text())["plugins"]
        assert plugins == recorded | {"sink.lines": "toy-parts 1.2"}
    lines = [json.loads(line) for line in (folder / "lines.txt").read_text().splitlines()]
    shown = [row["loss"] for kind, row in lines if kind == "train"]
    assert shown == [row["loss"] for row in rows(halves)]
    assert lines[-1] == ["close", {}]

    from megalite.config import load_stored

    with pytest.raises(ConfigError, match=r"norm\.scaled of the package toy-parts 1\.2, which is"):
        load_stored(folder / "config.json")

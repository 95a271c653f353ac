# covers: megalite/train/hooks/forecast.py
"""A run records predicted and measured memory and time in plan.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalite.plan.calibrate import read_run
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train, zero


def test_plan_json_has_predicted_and_measured_numbers(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, deepspeed=zero(2))
    raw["training"] |= {"steps": 8, "eval_every": 0}
    run_ranks(train, 2, raw)
    record = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (record["device"], record["hosts"], record["per_host"]) == ("cpu", 1, 2)
    assert record["baseline_bytes"] > 2**26
    seconds = sorted(row["step_seconds"] for row in rows(raw)[2:])
    assert record["measured"]["step_seconds"] == pytest.approx((seconds[2] + seconds[3]) / 2)
    for number in (*record["predicted"].values(), *record["measured"].values()):
        assert number > 0
    run = read_run(tmp_path / "run")
    assert run.seconds == record["measured"]["step_seconds"]
    predicted = run.predicted(run.cluster.device)
    assert predicted == pytest.approx(record["predicted"]["step_seconds"])

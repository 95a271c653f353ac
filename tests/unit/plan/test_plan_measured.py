"""Predicted memory of a rank on a CPU against what benchmarks/plan.py has measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import parse_config
from megalite.plan import make_plan, resolve_labels
from megalite.plan.process import process_bytes

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "plan_cpu.json").read_text())["rows"]


def plan_runs() -> Any:
    spec = importlib.util.spec_from_file_location("plan_runs", BENCHMARKS / "plan_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: row.get("kind") or f"{row['shape']} {row['layout']}"
)
def test_predicted_memory_is_within_12_percent_or_100_mb(row: dict[str, Any]) -> None:
    runs, work = plan_runs(), Path("work")
    if "kind" in row:
        _, ranks, sections = runs.KINDS[row["kind"]]
        raw = runs._kind_file(work, "run", ranks, sections)
    else:
        layout = runs.LAYOUTS[row["layout"]]
        ranks, shape = layout[0], runs.SHAPES[row["shape"]]
        raw = runs._shape_file(work / "runs" / "run", shape, layout)
    run = resolve_labels(parse_config(raw))
    predicted = process_bytes(run, make_plan(run, world_size=ranks, device="cpu"))
    measured = row["measured_bytes"]
    assert abs(predicted - measured) <= max(0.12 * measured, 100e6)

# covers: megalite/observe/trace.py
"""Profiler traces: the recorded steps, and the files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megalite.observe import Trace


def steps(trace: Trace, first: int, last: int) -> None:
    """Run steps with a label each, so that a trace shows which ones it recorded."""
    for step in range(first, last + 1):
        trace.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(step).sum()
        if trace.is_full(step):
            trace.close()


def recorded_steps(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted({e["name"] for e in events if e["name"].startswith("step ")})


@pytest.mark.parametrize(("begin", "expected"), [(1, [3, 4]), (4, [4])])
def test_trace_records_the_requested_steps(tmp_path: Path, begin: int, expected: list[int]) -> None:
    """A run that resumes between them records the rest."""
    trace = Trace(tmp_path / "profile", 2, (3, 4))
    steps(trace, begin, 6)
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "rank_00002.json.gz",
        "rank_00002.txt",
    ]
    path = tmp_path / "profile" / "rank_00002.json.gz"
    assert recorded_steps(path) == [f"step {step}" for step in expected]
    assert "aten::sum" in (tmp_path / "profile" / "rank_00002.txt").read_text()


def test_trace_without_steps_writes_nothing(tmp_path: Path) -> None:
    steps(Trace(tmp_path / "profile", 0, None), 1, 3)
    assert not (tmp_path / "profile").exists()


def test_trace_of_a_stopped_run_has_the_steps_so_far(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "profile", 0, (2, 9))
    steps(trace, 1, 3)
    trace.close()
    trace.close()
    assert recorded_steps(tmp_path / "profile" / "rank_00000.json.gz") == ["step 2", "step 3"]


def test_trace_that_cannot_be_written_only_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("in the way")
    steps(Trace(tmp_path / "profile", 0, (1, 1)), 1, 2)
    assert "the trace cannot be written" in caplog.text

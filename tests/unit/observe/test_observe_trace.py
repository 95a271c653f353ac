# covers: megalite/observe/trace.py
"""A trace of some steps: which ones, and what is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megalite.observe import Trace


def steps(trace: Trace, first: int, last: int) -> None:
    """Of another size each, so that a trace shows which ones it saw."""
    for step in range(first, last + 1):
        trace.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(step).sum()
        if trace.is_full(step):
            trace.close()


def seen(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted({e["name"] for e in events if e["name"].startswith("step ")})


@pytest.mark.parametrize(("begin", "expected"), [(1, [3, 4]), (4, [4])])
def test_the_steps_asked_for(tmp_path: Path, begin: int, expected: list[int]) -> None:
    """Of a run that is resumed in their midst, the rest of them."""
    trace = Trace(tmp_path / "profile", 2, (3, 4))
    steps(trace, begin, 6)
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "rank_00002.json.gz",
        "rank_00002.txt",
    ]
    path = tmp_path / "profile" / "rank_00002.json.gz"
    assert seen(path) == [f"step {step}" for step in expected]
    assert "aten::sum" in (tmp_path / "profile" / "rank_00002.txt").read_text()


def test_none_asked_for(tmp_path: Path) -> None:
    steps(Trace(tmp_path / "profile", 0, None), 1, 3)
    assert not (tmp_path / "profile").exists()


def test_a_run_that_stops_in_their_midst(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "profile", 0, (2, 9))
    steps(trace, 1, 3)
    trace.close()
    trace.close()
    assert seen(tmp_path / "profile" / "rank_00000.json.gz") == ["step 2", "step 3"]


def test_a_trace_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("in the way")
    steps(Trace(tmp_path / "profile", 0, (1, 1)), 1, 2)
    assert "the trace cannot be written" in caplog.text

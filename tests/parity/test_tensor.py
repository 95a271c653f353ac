"""Tensor parallelism against one plain process: sizes that do not divide evenly included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_layouts import OTHER, misses, reference  # noqa: F401
from tests.runs import run_file, zero


@pytest.mark.parametrize(
    ("tensor", "ranks", "stage"),
    [(2, 2, 0), (2, 2, 1), (2, 2, 3), (2, 4, 0), (2, 4, 1), (2, 4, 2), (2, 4, 3)],
)
@pytest.mark.parametrize("oracle", ["plain", "other"])
def test_tensor_parallel_agrees_with_one_plain_process(
    shards: dict[str, str],
    tmp_path: Path,
    reference: dict[str, Any],  # noqa: F811
    oracle: str,
    tensor: int,
    ranks: int,
    stage: int,
) -> None:
    sections = OTHER if oracle == "other" else {}
    raw = run_file(shards, tmp_path, **sections, parallel={"tensor": tensor}, deepspeed=zero(stage))
    assert misses(raw, ranks, reference[oracle]) == []

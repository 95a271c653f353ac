"""Sequence parallelism compared with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import run_file, zero
from tests.parity.test_layouts import OTHER, misses, reference  # noqa: F401


@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (2, 3), (4, 1), (4, 2)])
@pytest.mark.parametrize("oracle", ["plain", "other"])
def test_sequence_parallelism_agrees_with_the_reference(
    shards: dict[str, str],
    tmp_path: Path,
    reference: dict[str, Any],  # noqa: F811
    oracle: str,
    ranks: int,
    stage: int,
) -> None:
    sections = OTHER if oracle == "other" else {}
    parallel = {"tensor": 2, "sequence": True}
    raw = run_file(shards, tmp_path, **sections, parallel=parallel, deepspeed=zero(stage))
    assert misses(raw, ranks, reference[oracle]) == []


@pytest.mark.parametrize(("recompute", "stage"), [("selective", 3), ("full", 1)])
def test_recompute_under_sequence_parallelism_agrees_with_the_reference(
    shards: dict[str, str],
    tmp_path: Path,
    reference: dict[str, Any],  # noqa: F811
    recompute: str,
    stage: int,
) -> None:
    raw = run_file(
        shards,
        tmp_path,
        **OTHER,
        parallel={"tensor": 2, "sequence": True},
        deepspeed=zero(stage),
    )
    raw["training"] = raw["training"] | {"activation_checkpointing": recompute}
    assert misses(raw, 2, reference["other"]) == []

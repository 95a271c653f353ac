# covers: megalite/parity/trial.py
"""The case that parity makes of a run file has a learning rate at which rounding does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.parity.trial import make_case
from tests.helpers.models import run_config


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ({"name": "adamw", "lr": 6e-3}, 1e-3),
        ({"name": "adamw", "lr": 1e-4}, 1e-4),
        ({"name": "muon", "lr": 6e-3}, 1e-3),
        ({"name": "sgd", "lr": 6e-3}, 6e-3),
    ],
)
def test_case_bounds_the_rate_of_adaptive_optimizers(
    tmp_path: Path, optimizer: dict[str, Any], rate: float
) -> None:
    """AdamW moves a weight whose gradient is rounding error as far as any other weight."""
    config = run_config(optimizer=optimizer, model={"max_position_embeddings": 64})
    case = make_case(config, tmp_path, ranks=2)
    assert case.raw["optimizer"]["lr"] == rate
    assert case.raw["schedule"]["warmup_steps"] == case.raw["training"]["steps"]

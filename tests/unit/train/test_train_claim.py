# covers: megalite/train/claim.py
"""A start that is refused after its claim records the failure in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint import Lease
from megalite.errors import MegaLiteError, UserError
from megalite.parallel import Grid
from megalite.train import claim as claims
from megalite.train.claim import claim
from megalite.train.options import RunOptions, Settings
from tests.helpers.checkpoints import TOKENIZER, fingerprint, publish
from tests.helpers.models import run_config


class _Data:
    """The attributes of `Samples` that a claim uses."""

    tokenizer_folder = None
    tokenizer_sha256 = TOKENIZER

    def __init__(self, content_fingerprint: str) -> None:
        self.content_fingerprint = content_fingerprint


def test_refusal_after_the_claim_is_recorded_as_a_failure(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older start publishes a last checkpoint, which is past training.steps."""
    config = run_config(logging={"directory": str(tmp_path)}, training={"steps": 7})
    options = RunOptions(config)
    publish(options.root, 5, config)
    take_over = claims.take_over

    def take_over_late(folder: Path, grid: Grid) -> Lease | None:
        publish(options.root, 10, config)
        return take_over(folder, grid)

    monkeypatch.setattr(claims, "take_over", take_over_late)
    data: Any = _Data(fingerprint(config))
    with pytest.raises(MegaLiteError, match="already past it") as caught:
        claim(options, grid, data, Settings({}, {}))
    assert not isinstance(caught.value, UserError)
    status = json.loads((options.folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert "already past it" in status["reason"]

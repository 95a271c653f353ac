# covers: megalite/train/precision.py megalite/train/options.py
"""The precision that the ranks agree on is checked against the hardware, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalite.env import Launch
from megalite.errors import UserError
from megalite.parallel import Grid
from megalite.train import checks, precision
from megalite.train.options import RunOptions
from megalite.train.precision import settle_precision
from tests.helpers.checkpoints import publish
from tests.helpers.models import run_config

LAUNCH = Launch(0, 1, 0, 1, "127.0.0.1", 1, "python")


def _auto(folder: Path) -> RunOptions:
    raw = run_config(logging={"directory": str(folder)}).model_dump(mode="json")
    raw["training"]["precision"] = "auto"
    return RunOptions(type(run_config()).model_validate(raw))


@pytest.mark.parametrize("native", [None, "AMX"])
def test_a_precision_kept_from_a_gpu_is_refused_on_a_cpu(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: str | None
) -> None:
    monkeypatch.setattr(precision, "bf16_units", lambda: native)
    options = _auto(tmp_path)
    publish(options.root, 5, run_config(training={"precision": "fp16"}))
    with pytest.raises(UserError, match=r"training\.precision fp16: no GPU found"):
        settle_precision(options, LAUNCH, grid)


def test_the_memory_of_the_settled_precision_is_checked(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks lack bf16: this rank has planned bf16, and trains in fp32."""
    options = _auto(tmp_path)
    monkeypatch.setattr("megalite.plan.precision.bf16_units", lambda: "AMX")
    monkeypatch.setattr(precision, "bf16_units", lambda: None)
    settled, plan = settle_precision(options, LAUNCH, grid)
    assert (settled.config.training.precision, plan.precision) == ("fp32", "fp32")
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="memory: run needs about"):
        settle_precision(options, LAUNCH, grid)

# covers: megalite/train/precision.py megalite/train/options.py
"""The precision that the ranks agree on is checked against the hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalite.env import Launch
from megalite.errors import UserError
from megalite.parallel import Grid
from megalite.train import checks, precision
from megalite.train.options import RunOptions
from megalite.train.precision import agree_on_precision
from tests.helpers.checkpoints import publish
from tests.helpers.models import run_config

LAUNCH = Launch(0, 1, 0, 1, "127.0.0.1", 1, "python")


def _auto(folder: Path) -> RunOptions:
    raw = run_config(logging={"directory": str(folder)}).model_dump(mode="json")
    raw["training"]["precision"] = "auto"
    return RunOptions(type(run_config()).model_validate(raw))


@pytest.mark.parametrize("native", [None, "AMX"])
def test_precision_of_a_gpu_checkpoint_is_refused_on_a_cpu(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: str | None
) -> None:
    monkeypatch.setattr(precision, "bf16_units", lambda: native)
    options = _auto(tmp_path)
    publish(options.root, 5, run_config(training={"precision": "fp16"}))
    with pytest.raises(UserError, match=r"training\.precision fp16: no GPU found"):
        agree_on_precision(options, LAUNCH, grid)


def test_precision_of_all_ranks_is_checked_for_memory(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank supports bf16, but others do not, so the run trains in fp32."""
    options = _auto(tmp_path)
    monkeypatch.setattr("megalite.plan.precision.bf16_units", lambda: "AMX")
    monkeypatch.setattr(precision, "bf16_units", lambda: None)
    resolved, plan = agree_on_precision(options, LAUNCH, grid)
    assert (resolved.config.training.precision, plan.precision) == ("fp32", "fp32")
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="memory: run needs about"):
        agree_on_precision(options, LAUNCH, grid)

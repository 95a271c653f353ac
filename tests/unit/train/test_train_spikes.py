# covers: megalite/train/spikes.py
"""The definition of a loss spike."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from megalite.config import load_config
from megalite.parallel import Grid
from megalite.train.interventions import InterventionLog
from megalite.train.spikes import SpikeDetector

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.json"


@pytest.mark.parametrize(
    ("usual", "loss", "jumps"),
    [
        (3.0, 3.2, False),
        (3.0, 4.0, True),
        (0.0005, 0.03, False),  # memorised examples: sixty times the median is still small
        (0.0005, 2.0, True),
        (0.014, 0.3339, False),  # one example of a batch is wrong
        (0.02, 0.9, False),
        (0.02, 1.5, True),
        (0.8, 1.2, False),
        (0.8, 2.0, True),
        (2.5, 2.9, True),  # language model: only the minimum deviation applies
    ],
)
def test_spike_detector_reports_losses_far_above_the_recent_median(
    tmp_path: Path, usual: float, loss: float, jumps: bool
) -> None:
    no_grid = cast("Grid", None)  # the log communicates nothing here
    log = InterventionLog(tmp_path, no_grid, window=64)
    detector = SpikeDetector(load_config(SMOKE), log, scaled=False)
    for step in range(64):
        assert detector(step, step, usual * (1 + 0.001 * (step % 3)), 1.0).action == "use"
    assert detector(64, 64, loss, 1.0).action == ("note" if jumps else "use")

# covers: megalite/train/spikes.py
"""What counts as a spike of the loss."""

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
        (0.0005, 0.03, False),  # known by heart: sixty times the median, and nothing
        (0.0005, 2.0, True),
        (0.014, 0.3339, False),  # one example of a batch is wrong
        (0.02, 0.9, False),
        (0.02, 1.5, True),
        (0.8, 1.2, False),
        (0.8, 2.0, True),
        (2.5, 2.9, True),  # a language model: the floor is a share of the loss alone
    ],
)
def test_spike_of_the_loss(tmp_path: Path, usual: float, loss: float, jumps: bool) -> None:
    nobody = cast("Grid", None)  # what is noted is told to no other rank
    log = InterventionLog(tmp_path, nobody, window=64)
    detector = SpikeDetector(load_config(SMOKE), log, scaled=False)
    for step in range(64):
        assert detector(step, step, usual * (1 + 0.001 * (step % 3)), 1.0).action == "use"
    assert detector(64, 64, loss, 1.0).action == ("note" if jumps else "use")

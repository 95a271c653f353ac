"""Detection of steps with a non-finite loss or gradient, and of spikes.

If any rank sees a non-finite loss or gradient, all ranks skip the update. Spikes are detected by a
robust z-score, so that one bad step does not hide the next. It is the distance from the median of
recent steps, divided by 1.4826 times their median absolute deviation. For normally distributed
numbers this divisor equals the standard deviation (Hampel 1974). The score of gradient norms uses
their logarithms. `guards.spike` selects the reaction. "rollback" is that of PaLM: return to the
checkpoint before the spike, and omit the data around it (Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from megalite.config import RunConfig
from megalite.errors import MegaLiteError
from megalite.train.interventions import InterventionLog

# Minimum deviation of a loss, as a share of the median: a change by 1 % is no spike.
_MIN_SHARE = 0.01
# Minimum deviation of a loss in nats: a loss near zero (memorised examples) varies by many times
# its median.
_MIN_DEVIATION = 0.02
# Minimum size of a spike in nats if the loss is near zero. One wrong example can then raise a
# batch's mean to many times the median. The minimum falls linearly to 0 at `_USUAL_LOSS`.
_MIN_SPIKE = 1.0
_USUAL_LOSS = 2.0
_MIN_LOG_DEVIATION = 0.05  # minimum deviation of a gradient norm's logarithm
# 1 / 0.6745 (third quartile of the normal distribution): converts a median absolute deviation to a
# standard deviation (Hampel 1974)
_TO_DEVIATION = 1.4826


class StepDecision(NamedTuple):
    """Decision about a step's update, with its reason. "note" uses the update and reports it."""

    action: Literal["use", "note", "skip", "rollback"]
    reason: str = ""


class LossSpike(Exception):
    """Signal to the loop to roll back because of a spike; raised on every rank."""

    def __init__(self, step: int, reason: str) -> None:
        self.step = step
        self.reason = reason


class SpikeDetector:
    """Detector of spikes, by the loss and gradient norm of recent steps; identical on every rank.

    Args:
        scaled: whether the loss is scaled (fp16), so that an overflow lowers the scale.
    """

    def __init__(self, config: RunConfig, interventions: InterventionLog, *, scaled: bool) -> None:
        self.interventions = interventions
        self._guards = config.guards
        self._scaled = scaled

    def __call__(self, step: int, samples: int, loss: float, norm: float) -> StepDecision:
        """Return the decision about a step.

        Args:
            samples: position of the step in the data order.
            loss: mean loss of the global batch, in nats.
            norm: norm of the whole gradient, before clipping.
        Raises:
            MegaLiteError: a limit of the run file is reached.
        """
        before = self.interventions.skipped(step, samples)
        if before is not None:
            return StepDecision("skip", f"as in an earlier start: {before.get('reason')}")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if self._scaled and math.isfinite(loss):
                return StepDecision("skip", "fp16 overflow: the loss scale is lowered")
            return self._skip(step, samples, f"loss {loss}, gradient norm {norm}")
        spike = None if self._guards.spike == "off" else self._find_spike(loss, norm)
        if spike is None or self._guards.spike == "log":
            self.interventions.recent.append((loss, norm))
            return StepDecision("use") if spike is None else StepDecision("note", spike)
        if self._guards.spike == "rollback":
            return self._roll_back(step, spike)
        return self._skip(step, samples, spike)

    def skip(self, step: int, samples: int, reason: str) -> None:
        """Record that a step's update is skipped."""
        self.interventions.add({"kind": "skip", "step": step, "samples": samples, "reason": reason})

    def _roll_back(self, step: int, spike: str) -> StepDecision:
        done = self.interventions.rollbacks
        if done < self._guards.max_rollbacks:
            return StepDecision("rollback", spike)
        raise MegaLiteError(
            f"step {step}: {spike}, after {done} rollbacks (guards.max_rollbacks); "
            "lower optimizer.lr or check the data, and resume"
        )

    def _skip(self, step: int, samples: int, reason: str) -> StepDecision:
        in_a_row = 1
        while in_a_row <= self._guards.max_skips and self.interventions.skipped(step - in_a_row):
            in_a_row += 1
        self.skip(step, samples, reason)
        if in_a_row > self._guards.max_skips:
            raise MegaLiteError(
                f"step {step}: {reason}; the {in_a_row - 1} updates before were skipped, too "
                "(guards.max_skips). Lower optimizer.lr, check the data, or resume from an "
                "earlier checkpoint, if there is one, with --resume STEP_FOLDER"
            )
        return StepDecision("skip", reason)

    def _find_spike(self, loss: float, norm: float) -> str | None:
        recent = self.interventions.recent
        if len(recent) < max(16, self._guards.spike_window // 2):
            return None
        losses, norms = zip(*recent, strict=True)
        threshold = self._guards.spike_threshold
        median = float(np.median(losses))
        z = _z_score(loss, losses, max(_MIN_SHARE * abs(median), _MIN_DEVIATION))
        min_spike = _MIN_SPIKE * max(0.0, 1 - abs(median) / _USUAL_LOSS)
        if z > threshold and loss - median > min_spike:
            return f"the loss jumped to {loss:.4f}, {z:.0f} deviations above the recent median"
        logs = [math.log(max(value, 1e-30)) for value in norms]
        z = _z_score(math.log(max(norm, 1e-30)), logs, _MIN_LOG_DEVIATION)
        if z > threshold:
            return (
                f"the gradient norm jumped to {norm:.4g}, {z:.0f} deviations above the recent "
                "median"
            )
        return None


def _z_score(value: float, recent: Sequence[float], min_deviation: float) -> float:
    """Return how many robust standard deviations a value is above the median of recent values."""
    median = float(np.median(recent))
    deviation = _TO_DEVIATION * float(np.median(np.abs(np.asarray(recent) - median)))
    return (value - median) / max(deviation, min_deviation, 1e-12)

"""Detection of steps whose loss or gradient is unusable or out of line.

If any rank sees a non-finite loss or gradient, all ranks skip the update. A spike is detected by a
robust z-score, because one bad step must not hide the next: the distance from the median of the
last steps, divided by 1.4826 times their median absolute deviation. For normal numbers this divisor
equals the standard deviation (Hampel 1974). Gradient norms are compared by their logarithm. The
run file chooses what follows a spike (`guards.spike`). Going back to the checkpoint before it and
omitting the data around it is what PaLM did (Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from megalite.config import RunConfig
from megalite.errors import MegaLiteError
from megalite.train.interventions import InterventionLog

# Least deviation of a loss: as a share of the median, because a hundredth is no spike; and in nats,
# because a loss near zero (examples known by heart) varies by many times its median.
_FLAT = 0.01
_LEAST = 0.02
# Least spike, in nats, of a loss near zero: one wrong example makes its batch's mean many times the
# median. This floor falls to nothing at a loss of `_USUAL`.
_LEAST_SPIKE = 1.0
_USUAL = 2.0
_FLAT_LOG = 0.05  # least deviation of a gradient norm's logarithm
# 1 / 0.6745, the third quartile of the normal distribution: makes the median absolute deviation an
# estimate of the standard deviation (Hampel 1974)
_TO_DEVIATION = 1.4826


class StepDecision(NamedTuple):
    """Decision about a step's update, with its reason: "note" uses the update and reports it."""

    action: Literal["use", "note", "skip", "rollback"]
    reason: str = ""


class LossSpike(Exception):
    """Step whose loss or gradient jumped and that the run goes back from; raised on every rank."""

    def __init__(self, step: int, reason: str) -> None:
        self.step = step
        self.reason = reason


class SpikeDetector:
    """Decisions about steps by the numbers of the steps before them; identical on every rank.

    Args:
        scaled: if true, the loss is scaled (fp16), and an overflow lowers the scale.
    """

    def __init__(self, config: RunConfig, interventions: InterventionLog, *, scaled: bool) -> None:
        self.interventions = interventions
        self._guards = config.guards
        self._scaled = scaled

    def __call__(self, step: int, samples: int, loss: float, norm: float) -> StepDecision:
        """Return the decision on a step that starts at `samples` of the data order.

        Args:
            loss: mean loss of the global batch, in nats.
            norm: norm of the whole gradient, before clipping.
        Raises:
            MegaLiteError: a limit of the run file is reached.
        """
        before = self.interventions.skipped(step, samples)
        if before is not None:
            return StepDecision("skip", f"as before: {before.get('reason')}")
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
        """Record that a step's update is omitted."""
        self.interventions.add({"kind": "skip", "step": step, "samples": samples, "reason": reason})

    def _roll_back(self, step: int, spike: str) -> StepDecision:
        done = self.interventions.rollbacks
        if done < self._guards.max_rollbacks:
            return StepDecision("rollback", spike)
        raise MegaLiteError(
            f"step {step}: {spike}, after {done} rollbacks (guards.max_rollbacks); "
            "lower optimizer.lr or look at the data, and resume"
        )

    def _skip(self, step: int, samples: int, reason: str) -> StepDecision:
        row = 1
        while row <= self._guards.max_skips and self.interventions.skipped(step - row):
            row += 1
        self.skip(step, samples, reason)
        if row > self._guards.max_skips:
            raise MegaLiteError(
                f"step {step}: {reason}; the {row - 1} updates before were omitted already "
                "(guards.max_skips). Lower optimizer.lr, look at the data, or go back to an "
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
        z = _z_score(loss, losses, max(_FLAT * abs(median), _LEAST))
        least = _LEAST_SPIKE * max(0.0, 1 - abs(median) / _USUAL)
        if z > threshold and loss - median > least:
            return f"the loss jumped to {loss:.4f}, {z:.0f} deviations above the last steps'"
        logs = [math.log(max(value, 1e-30)) for value in norms]
        z = _z_score(math.log(max(norm, 1e-30)), logs, _FLAT_LOG)
        if z > threshold:
            return f"the gradient norm jumped to {norm:.4g}, {z:.0f} deviations above"
        return None


def _z_score(value: float, past: Sequence[float], least: float) -> float:
    """Return how many robust deviations a value lies above the median of earlier ones."""
    median = float(np.median(past))
    deviation = _TO_DEVIATION * float(np.median(np.abs(np.asarray(past) - median)))
    return (value - median) / max(deviation, least, 1e-12)

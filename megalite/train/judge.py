"""Whether a step's numbers are good enough to be used.

A loss or gradient that is not finite, on any rank, makes the whole step's update one: it is left
out. A jump is told by a robust z-score, since one bad step must not hide the next: the distance
from the median of the last steps, over 1.4826 times their median absolute deviation, which is the
standard deviation where they are normal (Hampel 1974). Gradient norms are compared by their
logarithm. What follows a jump is the user's choice (`guards.spike`); leaving out the data around it
after a return to the checkpoint before is what PaLM did (Chowdhery et al. 2022, 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from megalite.config import RunConfig
from megalite.errors import MegaLiteError
from megalite.train.ledger import Ledger

# The least deviation of a loss: of the median, where a hundredth is no jump; and in nats, where
# examples are known by heart, and any that is not is many times the median.
_FLAT, _LEAST = 0.01, 0.02
# The least jump in nats of a loss near zero: there one wrong example makes the mean of its batch
# many times the median. It falls to nothing at a loss of `_USUAL`.
_LEAST_JUMP, _USUAL = 1.0, 2.0
_FLAT_LOG = 0.05  # the same of a norm's logarithm


class Verdict(NamedTuple):
    """What to do about a step, and why; "note" uses it and says so."""

    action: Literal["use", "note", "skip", "rollback"]
    reason: str = ""


class Jump(Exception):
    """A step whose loss or gradient jumped, and that the run goes back from; on every rank."""

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason


class Judge:
    """Judges steps by the numbers of those before; the same on every rank that asks the same.

    Args:
        scaled: whether the loss is scaled (fp16), where the scale handles an overflow.
    """

    def __init__(self, config: RunConfig, ledger: Ledger, *, scaled: bool) -> None:
        self._guards, self.ledger, self._scaled = config.guards, ledger, scaled

    def __call__(self, step: int, samples: int, loss: float, norm: float) -> Verdict:
        """The verdict on the step that starts at `samples` of the data order.

        Raises:
            MegaLiteError: the limits of the run file are reached.
        """
        ledger, guards = self.ledger, self._guards
        if (before := ledger.skipped(step, samples)) is not None:
            return Verdict("skip", f"as before: {before.get('reason')}")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if self._scaled and math.isfinite(loss):
                return Verdict("skip", "fp16 overflow: the loss scale is lowered")
            return self._skip(step, samples, f"loss {loss}, gradient norm {norm}")
        jump = None if guards.spike == "off" else self._jump(loss, norm)
        if jump is None or guards.spike == "log":
            ledger.recent.append((loss, norm))
            return Verdict("use") if jump is None else Verdict("note", jump)
        if guards.spike == "rollback":
            if ledger.rollbacks < guards.max_rollbacks:
                return Verdict("rollback", jump)
            raise MegaLiteError(
                f"step {step}: {jump}, after {ledger.rollbacks} rollbacks (guards.max_rollbacks); "
                "lower optimizer.lr or look at the data, and resume"
            )
        return self._skip(step, samples, jump)

    def skip(self, step: int, samples: int, reason: str) -> None:
        """Enter an update that is left out."""
        self.ledger.add({"kind": "skip", "step": step, "samples": samples, "reason": reason})

    def _skip(self, step: int, samples: int, reason: str) -> Verdict:
        row = 1
        while row <= self._guards.max_skips and self.ledger.skipped(step - row):
            row += 1
        self.skip(step, samples, reason)
        if row > self._guards.max_skips:
            raise MegaLiteError(
                f"step {step}: {reason}; the {row - 1} updates before were left out already "
                "(guards.max_skips). Lower optimizer.lr, look at the data, or go back to an "
                "earlier checkpoint, where there is one, with --resume STEP_FOLDER"
            )
        return Verdict("skip", reason)

    def _jump(self, loss: float, norm: float) -> str | None:
        recent = self.ledger.recent
        if len(recent) < max(16, self._guards.spike_window // 2):
            return None
        losses, norms = zip(*recent, strict=True)
        median = float(np.median(losses))
        z = _z(loss, losses, max(_FLAT * abs(median), _LEAST))
        least = _LEAST_JUMP * max(0.0, 1 - abs(median) / _USUAL)
        if z > self._guards.spike_threshold and loss - median > least:
            return f"the loss jumped to {loss:.4f}, {z:.0f} deviations above the last steps'"
        logs = [math.log(max(value, 1e-30)) for value in norms]
        z = _z(math.log(max(norm, 1e-30)), logs, _FLAT_LOG)
        if z > self._guards.spike_threshold:
            return f"the gradient norm jumped to {norm:.4g}, {z:.0f} deviations above"
        return None


def _z(value: float, past: Sequence[float], least: float) -> float:
    """How many robust deviations a value lies above the median of those before."""
    median = float(np.median(past))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(past) - median)))
    return (value - median) / max(deviation, least, 1e-12)

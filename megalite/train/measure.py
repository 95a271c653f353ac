"""The evaluator that the loop asks, if it is not the loss on held-out shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from megalite.checkpoint import Place


class Measured(NamedTuple):
    """The result of a measurement: the best checkpoint has the lowest score.

    complete: false if the run was asked to stop meanwhile. score: None if nothing is held out.
    """

    complete: bool
    score: float | None = None


class Measure(Protocol):
    """Evaluator used instead of the validation loss (fine-tuning)."""

    def due(self, before: Place, now: Place) -> bool:
        """Return whether a measurement and a checkpoint follow the step between two places."""

    def owed(self, now: Place) -> bool:
        """Return whether a stop kept the measurement due at this place from being made."""

    def finished(self, step: int) -> bool:
        """Return whether the run is to end here."""

    def __call__(self, now: Place, stopping: Callable[[], bool]) -> Measured:
        """Measure and record; a collective."""

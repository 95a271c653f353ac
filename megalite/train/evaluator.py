"""Interface of what a run is evaluated by: the validation loss, or a fine-tuned task's measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from megalite.checkpoint import Progress


class Evaluation(NamedTuple):
    """Result of an evaluation.

    Attributes:
        complete: false if the run was asked to stop during the evaluation.
        score: lower is better; the best checkpoint has the lowest. None: nothing is held out, or
            the score is not finite.
    """

    complete: bool
    score: float | None = None


class Evaluator(Protocol):
    """Evaluator of a run, asked by the validation hook; equal answers on every rank.

    Attributes:
        evaluates_first: whether the untrained model is evaluated, too.
    """

    evaluates_first: bool

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Return whether an evaluation follows the step between `before` and `now`."""

    def is_owed(self, now: Progress) -> bool:
        """Return whether an evaluation was due at `now` and a stop prevented it."""

    def is_finished(self, now: Progress) -> bool:
        """Return whether the run is to end at `now`, before its last step."""

    def __call__(self, now: Progress, should_stop: Callable[[], bool]) -> Evaluation:
        """Evaluate and record; a collective."""

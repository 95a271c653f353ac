"""Interface of evaluators: of the validation loss, or of a fine-tuning task's metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from megalite.checkpoint import Progress


class Evaluation(NamedTuple):
    """Result of an evaluation.

    Attributes:
        complete: false if a stop was requested during the evaluation.
        score: lower is better; the best checkpoint has the lowest. None means that there is no
            held-out data, or that the score is not finite.
    """

    complete: bool
    score: float | None = None


class Evaluator(Protocol):
    """Evaluator of a run, called by the validation hook. Results are identical on every rank.

    Attributes:
        evaluates_first: whether to evaluate the untrained model, too.
    """

    evaluates_first: bool

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Return whether an evaluation follows the step between `before` and `now`."""

    def is_overdue(self, now: Progress) -> bool:
        """Return whether an evaluation was due at `now`, but a stop prevented it."""

    def is_finished(self, now: Progress) -> bool:
        """Return whether the run should end at `now`, before its last step."""

    def __call__(self, now: Progress, should_stop: Callable[[], bool]) -> Evaluation:
        """Evaluate and record; a collective."""

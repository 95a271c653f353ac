"""Interface of hooks: the loop's reports, and the requests that hooks return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megalite.checkpoint import Progress
from megalite.train.spikes import LossSpike


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Numbers of a step, identical on every rank.

    Attributes:
        before: progress before the step: the totals `step`, `samples` and `tokens`.
        progress: progress after the step.
        loss: mean loss of the global batch, in nats.
        grad_norm: norm of the gradient before clipping.
        lr: learning rate of the step.
        last: whether this is the last step of the run (`training.steps`).
        extra: means of the objective's further terms, by name.
    """

    before: Progress
    progress: Progress
    loss: float
    grad_norm: float
    lr: float
    last: bool
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of the step, counted from 1."""
        return self.progress.step


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """A published checkpoint.

    Attributes:
        folder: folder of the checkpoint.
        saved: progress at which the save began.
        progress: progress of the run now, which is later if training continued meanwhile.
        ends: whether the run ends after this save.
    """

    folder: Path
    saved: Progress
    progress: Progress
    ends: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Requests of a hook to the loop, identical on every rank.

    Attributes:
        evaluated: if true, `score` is the score of the current progress.
        score: lower is better. None means that there is no finite score.
        save: if true, the loop begins a save.
        stop: if true, the loop saves and stops at this step.
    """

    evaluated: bool = False
    score: float | None = None
    save: bool = False
    stop: bool = False


CONTINUE = Outcome()


class Hook:
    """One concern of a run around its steps and saves. By default a hook does nothing.

    The loop calls all hooks in order on every rank. A hook receives reports and returns requests;
    it has no access to the loop.
    """

    def begin(self, progress: Progress) -> Outcome:
        """Prepare for the steps after `progress`. Called at the loop's start, and after a spike."""
        return CONTINUE

    def after_step(self, report: StepReport) -> Outcome:
        """Act on a step, whether its update was used or skipped."""
        return CONTINUE

    def before_save(self, progress: Progress) -> None:
        """Act before a save begins."""

    def after_save(self, report: SaveReport) -> None:
        """Act on a checkpoint that was published."""

    def on_spike(self, spike: LossSpike, progress: Progress) -> Progress | None:
        """Restore the engine to an earlier step, and return its progress. None means impossible.

        Args:
            progress: progress before the step with the spike.
        """
        return None

    def on_rollback(self) -> None:
        """Discard the state of the steps that a rollback undid."""

    def is_finished(self, progress: Progress) -> bool:
        """Return whether the run should end here, before its last step."""
        return False

    def finish(self, progress: Progress) -> Outcome:
        """Act after the last step, before the last save."""
        return CONTINUE

    def close(self) -> None:
        """Act at the end of a run that completed all steps."""


def is_due(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`. If `every` is 0, return false."""
    return every > 0 and step % every == 0

"""Interface of hooks: what the loop reports to them, and what they ask of it."""

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
        extra: means of the objective's further terms, by name.
        last: whether it is the last step of the run (`training.steps`).
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
        folder: its folder.
        saved: progress that the checkpoint holds.
        progress: progress of the run now; later than `saved` if training went on meanwhile.
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
        evaluated: if true, `score` is the score of the present progress.
        score: lower is better; None if there is no finite one.
        save: if true, a save begins.
        stop: if true, the run was asked to stop meanwhile, and leaves at this very step.
    """

    evaluated: bool = False
    score: float | None = None
    save: bool = False
    stop: bool = False


CONTINUE = Outcome()


class Hook:
    """One concern of a run around its steps and saves. By default a hook does nothing.

    The loop calls its hooks in their order, on every rank. A hook gets reports and returns what it
    requires; it never reaches into the loop.
    """

    def begin(self, progress: Progress) -> Outcome:
        """Prepare for steps from `progress` on: at the start of the loop and after each spike."""
        return CONTINUE

    def after_step(self, report: StepReport) -> Outcome:
        """Act on a step that was taken or omitted."""
        return CONTINUE

    def before_save(self, progress: Progress) -> None:
        """Act before a save begins."""

    def after_save(self, report: SaveReport) -> None:
        """Act on a checkpoint that was published."""

    def on_spike(self, spike: LossSpike, progress: Progress) -> Progress | None:
        """Bring the engine back to an earlier step, and return its progress. None: not possible.

        Args:
            progress: progress before the step that jumped.
        """
        return None

    def on_rollback(self) -> None:
        """Forget the steps since the checkpoint that the run has gone back to."""

    def is_finished(self, progress: Progress) -> bool:
        """Return whether the run is to end here, before its last step."""
        return False

    def finish(self, progress: Progress) -> Outcome:
        """Act after the last step, before the last save."""
        return CONTINUE

    def close(self) -> None:
        """Act at the end of a run that took all its steps."""


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens `every` so many steps follows this one. 0: never."""
    return every > 0 and step % every == 0

"""Checkpoints of a run: their schedule, their records, and the deletion of older ones."""

from __future__ import annotations

import threading
from collections.abc import Callable

from megalite.checkpoint import Progress
from megalite.config import CheckpointConfig
from megalite.observe import PhaseTimer, Recorder
from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, SaveReport, StepReport, is_due


class Checkpoints(Hook):
    """Schedule and records of a run's checkpoints.

    Args:
        follows: returns whether to save after the step between two progresses, in addition to
            `checkpoint.every`.
        retain: returns the thread that deletes older checkpoints. None means that this rank deletes
            nothing.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        follows: Callable[[Progress, Progress], bool] | None,
        retain: Callable[[], threading.Thread | None],
        recorder: Recorder,
        phases: PhaseTimer,
    ) -> None:
        self._config = config
        self._follows = follows
        self._retain = retain
        self._recorder = recorder
        self._phases = phases

    def after_step(self, report: StepReport) -> Outcome:
        due = is_due(report.step, self._config.every)
        if self._follows is not None:
            due = due or self._follows(report.before, report.progress)
        return Outcome(save=True) if due else CONTINUE

    def before_save(self, progress: Progress) -> None:
        self._recorder.status("saving", step=progress.step)

    def after_save(self, report: SaveReport) -> None:
        deletion = self._retain()
        # the process must not end before the deletion; a foreground save includes the deletion
        if deletion and (report.ends or not self._config.background):
            deletion.join()
        name = report.folder.name
        seconds = self._phases.totals()
        self._recorder.event(report.saved.step, "checkpoint", path=name, seconds=seconds)
        self._recorder.status("running", step=report.progress.step, last_checkpoint=name)

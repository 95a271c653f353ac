"""Samples of text that the model writes during training."""

from __future__ import annotations

from collections.abc import Callable

from megalite.checkpoint import Progress
from megalite.evaluate import Writer
from megalite.observe import PhaseTimer, Recorder
from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, StepReport, is_due


class TextSamples(Hook):
    """Continuations of the run's prompts, every `every` steps, at the start and at the end.

    Args:
        writer: returns each prompt with its continuation.
        every: steps between samples. 0 means after each evaluation.
        follows: returns whether an evaluation follows the step between two progresses.
        should_stop: returns whether any rank received a stop signal; a collective.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        every: int,
        follows: Callable[[Progress, Progress], bool],
        recorder: Recorder,
        phases: PhaseTimer,
        should_stop: Callable[[], bool],
    ) -> None:
        self._writer = writer
        self._every = every
        self._follows = follows
        self._recorder = recorder
        self._phases = phases
        self._should_stop = should_stop

    def begin(self, progress: Progress) -> Outcome:
        if progress.step == 0:
            self._write(progress)
        return CONTINUE

    def after_step(self, report: StepReport) -> Outcome:
        if self._every:
            due = is_due(report.step, self._every)
        else:
            due = self._follows(report.before, report.progress)
        if due or report.last:
            self._write(report.progress)
        return CONTINUE

    def _write(self, progress: Progress) -> None:
        with self._phases.phase("samples"):
            texts = self._writer(self._should_stop)
        self._recorder.samples(progress.step, texts)

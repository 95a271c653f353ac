"""Evaluation during training: after certain steps, and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable

from megalite.checkpoint import Progress
from megalite.config import TrainingConfig
from megalite.data import Dataset
from megalite.engine import Engine
from megalite.evaluate import mean_loss, perplexity
from megalite.observe import PhaseTimer, Recorder
from megalite.parallel import Grid
from megalite.train.evaluator import Evaluation, Evaluator
from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, StepReport, is_due


class Validation(Hook):
    """Evaluations of a run, by its evaluator.

    If a stop is requested during an evaluation, the run stops at this step. The next start repeats
    the evaluation, so that the checkpoint of this step gets its score.
    """

    def __init__(
        self, evaluator: Evaluator, phases: PhaseTimer, should_stop: Callable[[], bool]
    ) -> None:
        self._evaluator = evaluator
        self._phases = phases
        self._should_stop = should_stop
        self._evaluated = -1  # step

    def begin(self, progress: Progress) -> Outcome:
        if progress.step == 0:
            # ignore a stop here: the run will stop before its first step
            first = self._evaluate(progress) if self._evaluator.evaluates_first else CONTINUE
            return first if first.evaluated else CONTINUE
        return self._evaluate(progress) if self._evaluator.is_overdue(progress) else CONTINUE

    def after_step(self, report: StepReport) -> Outcome:
        due = self._evaluator.is_due(report.before, report.progress)
        return self._evaluate(report.progress) if due else CONTINUE

    def on_rollback(self) -> None:
        self._evaluated = -1

    def is_finished(self, progress: Progress) -> bool:
        return self._evaluator.is_finished(progress)

    def finish(self, progress: Progress) -> Outcome:
        return CONTINUE if self._evaluated == progress.step else self._evaluate(progress)

    def _evaluate(self, progress: Progress) -> Outcome:
        with self._phases.phase("eval"):
            evaluation = self._evaluator(progress, self._should_stop)
        if not evaluation.complete:
            return Outcome(stop=True)
        self._evaluated = progress.step
        return Outcome(evaluated=True, score=evaluation.score)


def is_evaluation_due(config: TrainingConfig, step: int) -> bool:
    """Return whether pretraining evaluates after a step."""
    return step == config.steps or is_due(step, config.eval_every)


class HeldOutLoss:
    """Evaluator of pretraining: the loss on held-out shards.

    Args:
        dataset: held-out samples.
    """

    evaluates_first = True

    def __init__(
        self,
        config: TrainingConfig,
        *,
        engine: Engine,
        grid: Grid,
        dataset: Dataset,
        recorder: Recorder,
    ) -> None:
        self._config = config
        self._engine = engine
        self._grid = grid
        self._dataset = dataset
        self._recorder = recorder

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Return whether `now` is a multiple of `training.eval_every`, or the last step."""
        return is_evaluation_due(self._config, now.step)

    def is_overdue(self, now: Progress) -> bool:
        """Return whether an evaluation was due at `now`, but there is no score."""
        return is_due(now.step, self._config.eval_every) and now.valid_loss is None

    def is_finished(self, now: Progress) -> bool:
        """Return false: pretraining takes all its steps."""
        return False

    def __call__(self, now: Progress, should_stop: Callable[[], bool]) -> Evaluation:
        """Evaluate and record; a collective."""
        loss = mean_loss(
            self._engine,
            self._dataset,
            grid=self._grid,
            samples=self._config.eval_batches * self._config.global_batch_size,
            micro_batch_size=self._config.micro_batch_size,
            stopping=should_stop,
        )
        if loss is None:
            return Evaluation(complete=False)
        row = {"step": now.step, "loss": loss, "perplexity": perplexity(loss)}
        self._recorder.valid(row, tokens=now.tokens)
        # a non-finite loss must not become the best score
        return Evaluation(complete=True, score=loss if math.isfinite(loss) else None)

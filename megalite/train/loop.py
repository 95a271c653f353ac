"""The training loop: steps, saves and stops. Everything else is a hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint import Progress, Saver
from megalite.config import RunConfig
from megalite.data import advance
from megalite.engine import Engine
from megalite.errors import NoSpace, Stopped
from megalite.log import logger
from megalite.observe import PhaseTimer, Recorder, Trace
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.train.hooks import Hook, Outcome, SaveReport, StepReport
from megalite.train.spikes import LossSpike, SpikeDetector, StepDecision
from megalite.train.steps import ShutdownSignal, StepInputs, StepIterator, StopPoll

Inspect = Callable[[int, Engine, Grid], None]


@dataclass(kw_only=True)
class Trainer:
    """The loop of a run, from its current progress to its end.

    Attributes:
        progress: steps, samples and tokens so far; advanced by every step.
        make_steps: returns the iterator over the steps after a progress.
        shutdown: stop signal of this rank.
        stop_poll: called by hooks during long work; closed with the iterator over steps.
        detector: decides from each step's loss and gradient norm whether to update.
        phases: measures the time of each phase.
        trace: records some steps, if the run file requires it.
        hooks: called in this order around steps and saves.
        inspect: called with (step, engine, grid) between each backward and its update.
    """

    config: RunConfig
    grid: Grid
    engine: Engine
    recorder: Recorder
    progress: Progress
    make_steps: Callable[[Progress], StepIterator]
    shutdown: ShutdownSignal
    stop_poll: StopPoll
    saver: Saver
    detector: SpikeDetector
    phases: PhaseTimer
    trace: Trace
    hooks: Sequence[Hook]
    inspect: Inspect | None = None

    def __post_init__(self) -> None:
        self._steps = self.make_steps(self.progress)
        self._saved = self.progress.step
        self._published = self.progress
        self._stopping = False
        self._extra: dict[str, float] = {}
        self._last_action = "use"  # of the last step's decision

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Stopped: on every rank, after a signal. The run can be resumed.
            Superseded: a newer start of the run owns its folder.
        """
        try:
            self._run()
        finally:
            self._steps.abandon()

    def _run(self) -> None:
        while True:
            try:
                self._train()
                break
            except LossSpike as spike:
                self._recover(spike)
        self._close_steps()
        for hook in self.hooks:
            hook.close()

    def _train(self) -> None:
        for hook in self.hooks:
            self._apply_outcome(hook.begin(self.progress))
        while not self._is_finished():
            self._step()
        self.phases.begin("end")
        for hook in self.hooks:
            self._apply_outcome(hook.finish(self.progress))
        if self._saved != self.progress.step:
            self._save()
        self._finish_save()

    def _is_finished(self) -> bool:
        early = any(hook.is_finished(self.progress) for hook in self.hooks)
        return early or self.progress.step >= self.config.training.steps

    def _apply_outcome(self, outcome: Outcome) -> None:
        """Act on a hook's requests."""
        if outcome.evaluated:
            self._set_score(outcome.score)
        if outcome.stop:
            self._save_and_stop()
        if outcome.save:
            self._save()

    # --- steps ---

    def _step(self) -> None:
        self.phases.begin("step")
        inputs = self._steps.next()
        self._before_step(inputs)
        step = self.progress.step + 1
        lr = learning_rate(self.config, step)
        self.trace.before(step)
        result = self.engine.train_step(
            inputs.batches.micro_batches,
            divisor=inputs.targets,
            lr=lr,
            step=step,
            inspect=self.inspect and partial(self.inspect, step, self.engine, self.grid),
            accept=self._accept,
        )
        if self.trace.is_full(step):
            with self.phases.phase("trace"):  # closing waits for the device
                self.trace.close()
        self._tokens = inputs.tokens
        self._extra = self._sum_extra(result.extra)
        self._apply_decision(self._decision)
        self._end_step(lr)

    def _before_step(self, inputs: StepInputs) -> None:
        """Finish a save that all ranks have written, and stop if any rank received a signal."""
        if inputs.superseded:
            self._finish_save()
            self.saver.check_lease()
        if self.saver.under_way and inputs.written == self.saver.begun * self.grid.world_size:
            self._finish_save()
        if inputs.stop:
            self._save_and_stop()

    def _accept(self, loss: Tensor, norm: Tensor) -> bool:
        """Return whether to use the update. It waits for the device, as DeepSpeed does then."""
        # summed over all ranks, so that each makes the same decision
        total = self.grid.sum_once(loss.detach().clone())
        numbers = torch.stack((total, norm.to(total)))
        self._loss, self._norm = numbers.tolist()
        self._decision = self.detector(
            self.progress.step + 1, self.progress.samples, self._loss, self._norm
        )
        return self._decision.action in ("use", "note")

    def _sum_extra(self, extra: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means of an objective's further terms over the global batch."""
        if not extra:
            return {}
        total = self.grid.sum_once(torch.stack(list(extra.values())))
        return dict(zip(extra, total.tolist(), strict=True))

    def _apply_decision(self, decision: StepDecision) -> None:
        """Report a step whose update was skipped, or that is a spike.

        Raises:
            LossSpike: the decision is to roll back.
        """
        step = self.progress.step + 1
        if decision.action == "rollback":
            raise LossSpike(step, decision.reason)
        # if the loss stays at a new level, only the first step is reported
        repeats = decision.action == "note" and self._last_action == "note"
        if decision.action != "use" and not repeats:
            name = "spike" if decision.action == "note" else "skip"
            end = "" if decision.action == "note" else ": update skipped"
            logger.warning("step %d: %s%s", step, decision.reason, end)
            self.recorder.event(
                step, name, reason=decision.reason, loss=self._loss, grad_norm=self._norm
            )
        self._last_action = decision.action

    def _end_step(self, lr: float) -> None:
        """Advance the progress by a step, with or without an update, and call the hooks."""
        before = self.progress
        size = self.config.training.global_batch_size
        self.progress = Progress(
            before.step + 1,
            advance(before.samples, size, self.detector.interventions.gaps),
            before.tokens + self._tokens,
        )
        report = StepReport(
            before=before,
            progress=self.progress,
            loss=self._loss,
            grad_norm=self._norm,
            lr=lr,
            extra=self._extra,
            last=self.progress.step == self.config.training.steps,
        )
        for hook in self.hooks:
            self._apply_outcome(hook.after_step(report))

    def _recover(self, spike: LossSpike) -> None:
        """Let a hook roll back to an earlier step. If none can, skip the update."""
        self._finish_save()
        for hook in self.hooks:
            restored = hook.on_spike(spike, self.progress)
            if restored is not None:
                self._go_back(restored)
                return
        self.detector.skip(spike.step, self.progress.samples, spike.reason)
        self._apply_decision(StepDecision("skip", spike.reason))
        self._end_step(learning_rate(self.config, spike.step))

    def _go_back(self, progress: Progress) -> None:
        self._close_steps()
        self.progress = progress
        self._published = progress
        self._saved = progress.step
        self._steps = self.make_steps(progress)
        for hook in self.hooks:
            hook.on_rollback()

    def _close_steps(self) -> None:
        self.stop_poll.close()
        self._steps.close()

    # --- saves ---

    def _set_score(self, score: float | None) -> None:
        """Set the score of this progress, and of its checkpoint if that is saved already."""
        self.progress = replace(self.progress, valid_loss=score)
        if score is None or self._saved != self.progress.step or self.progress.step == 0:
            return
        self._finish_save()
        if self._published.step == self.progress.step and self._published.valid_loss is None:
            self.saver.record_score(self.progress)
            self._published = self.progress

    def _save(self) -> None:
        """Begin a save. If saves run in the background, training continues meanwhile."""
        self._finish_save()
        for hook in self.hooks:
            hook.before_save(self.progress)
        background = self.config.checkpoint.background
        try:
            with self.phases.phase("save"):
                self.saver.begin(self.progress, snapshot=background)
        except NoSpace as error:
            if self._stopping or self._is_finished():
                raise  # there will be no later save
            self._report_unsaved(self.progress.step, error)
            return
        self._saved = self.progress.step
        if not background:
            self._finish_save()

    def _report_unsaved(self, step: int, error: NoSpace) -> None:
        """Report a save that failed because the disk is full."""
        logger.warning("step %d: %s; training goes on", step, error)
        self.recorder.event(step, "unsaved", reason=str(error))
        self.recorder.status("running", step=self.progress.step)

    def _finish_save(self) -> None:
        """Wait for the save under way, if any, publish the checkpoint, and call the hooks.

        Raises:
            NoSpace: the disk is full, and no later save will contain the current step.
        """
        saved = self.saver.under_way
        if saved is None:
            return
        ends = self._is_finished() or self._stopping
        with self.phases.phase("save"):
            try:
                folder = self.saver.finish()
            except NoSpace as error:
                self._saved = self._published.step
                if ends and saved.step == self.progress.step:
                    raise
                self._report_unsaved(saved.step, error)
                return
            self._published = saved
            report = SaveReport(folder=folder, saved=saved, progress=self.progress, ends=ends)
            for hook in self.hooks:
                hook.after_save(report)

    # --- stop ---

    def _save_and_stop(self) -> None:
        """Save and raise Stopped. All ranks call this at the same step."""
        name = self.shutdown.name or "a hook, or a signal on another rank"
        self.recorder.event(self.progress.step, "signal", signal=name)
        self._stopping = True
        self._finish_save()
        result = "and saved; the same command resumes it"
        if self.progress.step == 0:
            result = "with nothing to save"
        elif self._saved != self.progress.step:
            seconds = self._save_seconds()
            grace = self.config.checkpoint.stop_grace_seconds
            if seconds > grace:
                result = (
                    f"and not saved: the last save took {seconds:.0f} s, more than "
                    f"checkpoint.stop_grace_seconds {grace:g}; the same command resumes it from "
                    f"step {self._saved}"
                )
            else:
                self._save()
                self._finish_save()
        self.trace.close()
        self._close_steps()
        raise Stopped(f"stopped by {name} after step {self.progress.step} {result}")

    def _save_seconds(self) -> float:
        """Return the seconds that the slowest rank's last save took; a collective."""
        slowest = torch.tensor([self.saver.seconds], dtype=torch.float64)
        self.grid.all_reduce_cpu(slowest, dist.ReduceOp.MAX)
        return float(slowest)

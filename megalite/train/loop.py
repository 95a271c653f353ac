"""The training loop."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint import Place, Saver
from megalite.config import RunConfig
from megalite.data import Dataset, advance
from megalite.engine import Engine
from megalite.errors import NoSpace, Stopped
from megalite.evaluate import Writer, mean_loss, perplexity
from megalite.log import logger
from megalite.observe import (
    Recorder,
    Sections,
    Stragglers,
    Trace,
    model_flops_utilization,
    peak_memory_bytes,
)
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.plan import Plan
from megalite.train.drift import DriftGuard
from megalite.train.feed import Feed, StopRequest
from megalite.train.judge import Judge, Jump, Verdict
from megalite.train.measure import Measure

Inspect = Callable[[int, Engine, Grid], None]


@dataclass
class Trainer:
    """One run from its present place to its end.

    Attributes:
        place: where the run stands; advanced by every step.
        retain: called after each publication; what it returns deletes what nothing keeps.
        trace: records some steps, where asked.
        judge: says of each step's numbers whether they are used.
        sections: measure what the time goes into.
        stragglers: looks for ranks that are slower than the others.
        guard: compares replicas.
        inspect: called with (step, engine, grid) between each backward and its update.
        measure: takes the place of validation.
        writer: writes samples of text.
    """

    config: RunConfig
    plan: Plan
    grid: Grid
    engine: Engine
    feed: Feed
    valid: Dataset | None
    recorder: Recorder
    stop: StopRequest
    place: Place
    saver: Saver
    retain: Callable[[], threading.Thread | None]
    trace: Trace
    judge: Judge
    sections: Sections
    stragglers: Stragglers
    guard: DriftGuard | None = None
    inspect: Inspect | None = None
    measure: Measure | None = None
    writer: Writer | None = None

    def __post_init__(self) -> None:
        self._saved, self._evaluated, self._compared = self.place.step, -1, -1
        self._published, self._before = self.place, self.place
        self._leaving, self._noted = False, "use"
        self._losses: list[float] = []  # of the steps since the last train row

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Stopped: a signal asked for it; the run was saved and can be resumed.
            Superseded: a newer start of the run has taken its folder.
            Jump: the run has to go back; it may be called again from there.
        """
        if self.place.step == 0:
            if self.measure is None:
                self._evaluate()
            self._write()
        elif self._owed():
            self._evaluate_or_leave()
        self._lapped = self.place, self.sections.totals().get("step", 0.0)
        while not self._finished():
            self.sections.enter("step")
            batches, targets, stop, written, tokens, superseded = self.feed.next()
            if superseded:
                self._give_way()
            if self.saver.under_way and written == self.saver.begun * self.grid.world_size:
                self.settle()
            if stop:
                self._leave()
            step = self.place.step + 1
            lr = learning_rate(self.config, step)
            self.trace.before(step)
            self.engine.train_step(
                batches.micro_batches,
                divisor=targets,
                lr=lr,
                step=step,
                inspect=self.inspect and partial(self.inspect, step, self.engine, self.grid),
                accept=self._accept,
            )
            if self.trace.is_full(step):
                with self.sections.inside("trace"):  # which waits for the device, too
                    self.trace.close()
            self._tokens = tokens
            self._heed(self._verdict)
            self._advance()
            self._after_step(lr)
        self.sections.enter("end")
        self._finish()

    def _finished(self) -> bool:
        step = self.place.step
        stops = self.measure is not None and self.measure.finished(step)
        return stops or step >= self.config.training.steps

    def _owed(self) -> bool:
        """Return whether a stop kept the evaluation due at this place from being made."""
        if self.measure is not None:
            return self.measure.owed(self.place)
        due = _due(self.place.step, self.config.training.eval_every)
        return due and self.valid is not None and self.place.valid_loss is None

    def _give_way(self) -> None:
        """End the save under way and this start: a newer one owns the run folder."""
        self.settle()
        self.saver.check_lease()

    def _advance(self) -> None:
        self._before = self.place
        size, gaps = self.plan.global_batch_size, self.judge.ledger.gaps
        self.place = Place(
            self.place.step + 1,
            advance(self.place.samples, size, gaps),
            self.place.tokens + self._tokens,
        )

    def _accept(self, loss: Tensor, norm: Tensor) -> bool:
        """Judge the step's numbers; one wait for the device, where DeepSpeed has its own."""
        # over all ranks, so that each has the same number and comes to the same verdict
        whole = self.grid.sum_once(loss.detach().clone())
        both = torch.stack((whole, norm.to(whole)))
        self._loss, self._norm = both.tolist()
        self._losses.append(self._loss)
        self._verdict = self.judge(self.place.step + 1, self.place.samples, self._loss, self._norm)
        return self._verdict.action in ("use", "note")

    def _heed(self, verdict: Verdict) -> None:
        """Say what was done about the step's numbers."""
        step = self.place.step + 1
        if verdict.action == "rollback":
            raise Jump(step, verdict.reason)
        lasts = verdict.action == self._noted == "note"  # a new level: said once
        if verdict.action != "use" and not lasts:
            name, end = {"skip": ("skip", ": left out"), "note": ("spike", "")}[verdict.action]
            logger.warning("step %d: %s%s", step, verdict.reason, end)
            numbers = {"loss": self._loss, "grad_norm": self._norm}
            self.recorder.event(step, name, reason=verdict.reason, **numbers)
        self._noted = verdict.action

    def go_back(self, place: Place, feed: Feed) -> None:
        """Go on from a checkpoint that the engine was set to."""
        self.place, self.feed, self._losses = place, feed, []
        self._saved, self._evaluated, self._compared = place.step, -1, -1
        self._published = self._before = place

    def leave_out(self, jump: Jump) -> None:
        """Go on after a step whose update was refused, without going back."""
        self.judge.skip(jump.step, self.place.samples, jump.reason)
        self._heed(Verdict("skip", jump.reason))
        self._advance()
        self._after_step(learning_rate(self.config, jump.step))

    def _after_step(self, lr: float) -> None:
        step, training = self.place.step, self.config.training
        if step % training.log_every == 0 or step == training.steps:
            self._log(lr)
        # before the save, which carries the loss: the best checkpoint is chosen by it
        last = step == training.steps
        if self.measure is None:
            measured, saves = _due(step, training.eval_every) or last, False
        else:
            measured = saves = self.measure.due(self._before, self.place)
        if measured:
            self._evaluate_or_leave()
        samples = self.config.logging.samples
        every = samples.every if samples else None
        if last or (_due(step, every) if every else measured):
            self._write()
        if _due(step, training.drift_every):
            self._compare()
        if saves or _due(step, self.config.checkpoint.every):
            self._save()

    def _finish(self) -> None:
        """Make the last validation and the last checkpoint, unless this step already had them."""
        if self._evaluated != self.place.step:
            self._evaluate_or_leave()
        if self._saved != self.place.step:
            self._save()
        self.settle()

    def _log(self, lr: float) -> None:
        peak = torch.tensor([peak_memory_bytes(self.grid.device)])
        self.grid.all_reduce_cpu(peak, dist.ReduceOp.MAX)
        seconds, steps, tokens = self._lap()
        rate = tokens / seconds
        self.recorder.train(
            {
                "step": self.place.step,
                "loss": self._loss,
                "mean_loss": self._take_mean_loss(),
                "lr": lr,
                "grad_norm": self._norm,
                "tokens": self.place.tokens,
                "samples": self.place.samples,
                "tokens_per_second": rate,
                "mfu": model_flops_utilization(
                    self.grid.device,
                    self.plan.precision,
                    self.plan.flops_per_token * rate / self.plan.world_size,
                ),
                "step_seconds": seconds / steps,
                "peak_memory_bytes": int(peak.item()),
            }
        )
        self.recorder.status("running", step=self.place.step)
        self.stragglers.report(self.recorder, self.place.step)

    def _lap(self) -> tuple[float, int, int]:
        """Seconds of training, steps and tokens since the last call.

        Saves and validations do not count.
        """
        (before, seconds), now = self._lapped, self.place
        self._lapped = now, self.sections.totals().get("step", 0.0)
        return self._lapped[1] - seconds, now.step - before.step, now.tokens - before.tokens

    def _take_mean_loss(self) -> float | None:
        """Return the mean of the finite losses since the last call; None if there are none."""
        known, self._losses = [loss for loss in self._losses if math.isfinite(loss)], []
        return sum(known) / len(known) if known else None

    def _evaluate_or_leave(self) -> None:
        """Validate; a run that is asked to stop meanwhile leaves here, and the next start does it.

        Not one step further: the checkpoint of this very place is to get the score.
        """
        self._evaluate()
        if (self.valid or self.measure) and self._evaluated != self.place.step:
            self._leave()

    def _evaluate(self) -> None:
        """Validate, unless the run is asked to stop meanwhile."""
        if self.measure is not None:
            with self.sections.inside("eval"):
                measured = self.measure(self.place, self.feed.asked)
            if measured.complete:
                self._score(measured.score)
            return
        if self.valid is None:
            return
        with self.sections.inside("eval"):
            training = self.config.training
            loss = mean_loss(
                self.engine,
                self.valid,
                grid=self.grid,
                samples=training.eval_batches * training.global_batch_size,
                micro_batch_size=training.micro_batch_size,
                stopping=self.feed.asked,
            )
        if loss is None:
            return
        row = {"step": self.place.step, "loss": loss, "perplexity": perplexity(loss)}
        self.recorder.valid(row, tokens=self.place.tokens)
        # a loss that is no number must not end up as the best
        self._score(loss if math.isfinite(loss) else None)

    def _score(self, score: float | None) -> None:
        """Note what this place is worth, also in its checkpoint if that was saved before."""
        self._evaluated = self.place.step
        self.place = replace(self.place, valid_loss=score)
        if score is None or self._saved != self.place.step or self.place.step == 0:
            return
        self.settle()
        if self._published.step == self.place.step and self._published.valid_loss is None:
            self.saver.record_score(self.place)
            self._published = self.place

    def _write(self) -> None:
        """Have the model write on from the run's prompts."""
        if self.writer is not None:
            with self.sections.inside("samples"):
                texts = self.writer(self.feed.asked)
            self.recorder.samples(self.place.step, texts)

    def _compare(self) -> None:
        """Hold replicas against each other, once a step."""
        if self.guard is not None and self._compared != self.place.step:
            self.guard.check(self.place.step)
            self._compared = self.place.step

    def _save(self) -> None:
        """Begin a save; in the background, training goes on while it is written."""
        self.settle()
        self._compare()
        background = self.config.checkpoint.background
        self.recorder.status("saving", step=self.place.step)
        try:
            with self.sections.inside("save"):
                self.saver.begin(self.place, snapshot=background)
        except NoSpace as error:
            if self._leaving or self._finished():
                raise  # what has not been saved by now is lost
            self._go_on_unsaved(self.place.step, error)
            return
        self._saved = self.place.step
        if not background:
            self.settle()

    def _go_on_unsaved(self, step: int, error: NoSpace) -> None:
        """Report a save that a full disk has cost."""
        logger.warning("step %d: %s; training goes on", step, error)
        self.recorder.event(step, "unsaved", reason=str(error))
        self.recorder.status("running", step=self.place.step)

    def settle(self) -> None:
        """End the save under way, if there is one: wait for it, publish, and say so.

        Raises:
            NoSpace: the disk is full, and this was the last chance to save the present step.
        """
        place = self.saver.under_way
        if place is None:
            return
        ends = self._finished() or self._leaving
        with self.sections.inside("save"):
            try:
                folder = self.saver.finish()
            except NoSpace as error:
                self._saved = self._published.step
                if ends and place.step == self.place.step:
                    raise
                self._go_on_unsaved(place.step, error)
                return
            self._published = place
            deletion = self.retain()
            # the process must not end before it, and a save in the foreground includes it
            if deletion and (ends or not self.config.checkpoint.background):
                deletion.join()
        seconds = self.sections.totals()
        self.recorder.event(place.step, "checkpoint", path=folder.name, seconds=seconds)
        self.recorder.status("running", step=self.place.step, last_checkpoint=folder.name)

    def _leave(self) -> None:
        """Every rank is here at the same step, whichever of them was asked to stop."""
        name = self.stop.name or "a signal on another rank"
        self.recorder.event(self.place.step, "signal", signal=name)
        self._leaving = True
        self.settle()
        kept = "and saved; the same command resumes it"
        if self.place.step == 0:
            kept = "with nothing to save"
        elif self._saved != self.place.step:
            slowest = torch.tensor([self.saver.seconds], dtype=torch.float64)
            self.grid.all_reduce_cpu(slowest, dist.ReduceOp.MAX)
            if (seconds := float(slowest)) > self.config.checkpoint.grace_seconds:
                kept = (
                    f"and not saved, which took {seconds:.0f} s the last time, over "
                    f"checkpoint.grace_seconds {self.config.checkpoint.grace_seconds:g}; the same "
                    f"command goes on from step {self._saved}"
                )
            else:
                self._save()
                self.settle()
        self.trace.close()
        raise Stopped(f"stopped by {name} after step {self.place.step} {kept}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

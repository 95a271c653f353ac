"""Train rows of metrics.jsonl: loss, rates and memory, every `training.log_every` steps."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megalite.checkpoint import Progress
from megalite.config import TrainingConfig
from megalite.observe import (
    PhaseTimer,
    Recorder,
    Stragglers,
    model_flops_utilization,
    peak_memory_bytes,
)
from megalite.parallel import Grid
from megalite.plan import Plan
from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, StepReport, is_due


class StepLogger(Hook):
    """Writer of train rows and of the running status.

    Args:
        phases: measures the seconds of training, without saves and evaluations.
        stragglers: reports ranks that are slower than the others.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        plan: Plan,
        grid: Grid,
        recorder: Recorder,
        phases: PhaseTimer,
        stragglers: Stragglers,
    ) -> None:
        self._config = config
        self._plan = plan
        self._grid = grid
        self._recorder = recorder
        self._phases = phases
        self._stragglers = stragglers
        self._losses: list[float] = []  # of the steps since the last row
        self._start = Progress()  # at the last row
        self._start_seconds = 0.0  # training time at the last row

    def begin(self, progress: Progress) -> Outcome:
        self._start_interval(progress)
        return CONTINUE

    def on_rollback(self) -> None:
        self._losses = []

    def after_step(self, report: StepReport) -> Outcome:
        self._losses.append(report.loss)
        if report.last or is_due(report.step, self._config.log_every):
            self._log(report)
        return CONTINUE

    def _log(self, report: StepReport) -> None:
        peak = torch.tensor([peak_memory_bytes(self._grid.device)])
        self._grid.all_reduce_cpu(peak, dist.ReduceOp.MAX)
        start = self._start
        started = self._start_seconds
        self._start_interval(report.progress)
        seconds = self._start_seconds - started
        rate = (report.progress.tokens - start.tokens) / seconds
        self._recorder.train(
            {
                "step": report.step,
                "loss": report.loss,
                "mean_loss": self._take_mean_loss(),
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "tokens": report.progress.tokens,
                "samples": report.progress.samples,
                "tokens_per_second": rate,
                "tokens_per_second_per_device": rate / self._plan.world_size,
                "mfu": model_flops_utilization(
                    self._grid.device,
                    self._plan.precision,
                    self._plan.flops_per_token * rate / self._plan.world_size,
                ),
                "step_seconds": seconds / (report.step - start.step),
                "peak_memory_bytes": int(peak.item()),
                **({"extra": dict(report.extra)} if report.extra else {}),
            }
        )
        self._recorder.status("running", step=report.step)
        self._stragglers.report(self._recorder, report.step)

    def _start_interval(self, progress: Progress) -> None:
        self._start = progress
        self._start_seconds = self._phases.totals().get("step", 0.0)

    def _take_mean_loss(self) -> float | None:
        """Return the mean of the finite losses since the last call, or None if there are none."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        self._losses = []
        return sum(finite) / len(finite) if finite else None

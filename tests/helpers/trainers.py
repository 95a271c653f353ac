"""A trainer whose engine, recorder and saver are mocks that record their calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalite.checkpoint import Progress
from megalite.config import RunConfig
from megalite.data import StepBatches
from megalite.engine import StepResult
from megalite.observe import PhaseTimer, Stragglers, Trace
from megalite.parallel import Grid
from megalite.plan import make_plan
from megalite.train.hooks import Hook, validation
from megalite.train.hooks.checkpoints import Checkpoints
from megalite.train.hooks.logging import StepLogger
from megalite.train.interventions import InterventionLog
from megalite.train.loop import Trainer
from megalite.train.spikes import SpikeDetector
from megalite.train.steps import ShutdownSignal, StepIterator, StopPoll
from tests.helpers.models import make_batch, run_config


class Notes:
    """A mock of engine, recorder and saver that records its calls.

    Attributes:
        calls: (call, step) of each call.
        rows: train rows.
        rates: learning rates of the steps.
        saved: progress of each save.
        writing: steps that writing a checkpoint takes.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.rows: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.saved: list[Progress] = []

    def train_step(
        self, batches: Any, *, divisor: float, lr: float, step: int, inspect: Any, accept: Any
    ) -> StepResult:
        assert inspect is None
        self.calls.append(("step", step))
        self.rates.append(lr)
        assert divisor == sum(batch.targets for batch in batches)
        result = StepResult(torch.tensor(float(step)), torch.tensor(0.5))
        if not accept(result.loss, result.grad_norm):
            self.calls.append(("refused", step))
        return result

    def train(self, row: dict[str, Any]) -> None:
        self.calls.append(("log", row["step"]))
        self.rows.append(row)

    def valid(self, row: dict[str, Any], *, tokens: int) -> None:
        self.calls.append(("valid", row["step"]))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))

    def event(self, step: int, name: str, **fields: Any) -> None:
        self.calls.append((name, step))

    def status(self, state: str, *, step: int, **fields: Any) -> None:
        pass

    # --- saver ---

    writing, begun, seconds = 0, 0, 3.0
    under_way: Progress | None = None

    def begin(self, progress: Progress, *, snapshot: bool) -> None:
        assert self.under_way is None
        self.calls.append(("save", progress.step))
        self.saved.append(progress)
        self.under_way, self.begun = progress, self.begun + 1

    @property
    def written(self) -> int:
        if self.under_way is None:
            return self.begun
        since = self.calls[self.calls.index(("save", self.under_way.step)) :]
        steps = sum(call[0] == "step" for call in since)
        return self.begun - (steps < self.writing)

    def record_score(self, progress: Progress) -> None:
        self.calls.append(("scored", progress.step))

    def finish(self) -> Path:
        assert self.under_way is not None
        progress, self.under_way = self.under_way, None
        self.calls.append(("published", progress.step))
        return Path(f"checkpoints/step_{progress.step:08d}")


class Steps:
    """A mock of `Loader` with one random batch per step."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.closed = step, False

    def __next__(self) -> StepBatches:
        batch = make_batch(run_config().model, seed=self.step)
        self.step += 1
        return StepBatches(self.step, [batch], batch.targets, 32)

    def close(self) -> None:
        self.closed = True


def make_trainer(
    config: RunConfig,
    grid: Grid,
    notes: Notes,
    shutdown: ShutdownSignal,
    *,
    valid: bool = True,
    progress: Progress | None = None,
    more: Sequence[Hook] = (),
) -> Trainer:
    """Return a trainer of mocks, with `more` hooks after the usual ones."""
    parts: Any = notes
    phases = PhaseTimer()
    poll = StopPoll(grid, shutdown)
    nowhere = Path("nowhere")

    def steps(progress: Progress) -> StepIterator:
        loader: Any = Steps(progress.step)
        return StepIterator(loader, grid, shutdown, written=lambda: notes.written)

    hooks: list[Hook] = [
        StepLogger(
            config.training,
            plan=make_plan(config, world_size=1, device="cpu"),
            grid=grid,
            recorder=parts,
            phases=phases,
            stragglers=Stragglers(torch.nn.Identity(), grid),
        )
    ]
    if valid:
        dataset: Any = SimpleNamespace()
        evaluator = validation.HeldOutLoss(
            config.training, engine=parts, grid=grid, dataset=dataset, recorder=parts
        )
        hooks.append(validation.Validation(evaluator, phases, poll))
    hooks.append(
        Checkpoints(
            config.checkpoint,
            follows=None,
            retain=lambda: None,
            recorder=parts,
            phases=phases,
        )
    )
    return Trainer(
        config=config,
        grid=grid,
        engine=parts,
        recorder=parts,
        progress=progress or Progress(),
        make_steps=steps,
        shutdown=shutdown,
        stop_poll=poll,
        saver=parts,
        detector=SpikeDetector(config, InterventionLog(nowhere, grid, 16), scaled=False),
        phases=phases,
        trace=Trace(nowhere, 0, None),
        hooks=(*hooks, *more),
    )


def of(notes: Notes, name: str) -> list[Any]:
    """Return the steps of the calls with a name."""
    return [step for call, step in notes.calls if call == name]

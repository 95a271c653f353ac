"""Rollback to the newest checkpoint after a spike, omitting the data around the spike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megalite import checkpoint
from megalite.checkpoint import Lease, Progress
from megalite.config import RunConfig
from megalite.engine import Engine
from megalite.log import logger
from megalite.observe import Recorder
from megalite.parallel import Grid
from megalite.train.hooks.hook import Hook
from megalite.train.interventions import InterventionLog
from megalite.train.restore import samples_at
from megalite.train.resume import ResumePoint
from megalite.train.spikes import LossSpike


class Rollback(Hook):
    """Rollbacks of a run (Chowdhery et al. 2022, section 5.1).

    Args:
        root: the run's `checkpoints` folder.
        lease: rank 0's right to rename damaged checkpoints.
        resume_point: checkpoint that this start resumed from.
        continue_log: continues the intervention log from a checkpoint.
        report_running: records that the run continues from a progress.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        grid: Grid,
        root: Path,
        lease: Lease | None,
        resume_point: ResumePoint | None,
        interventions: InterventionLog,
        recorder: Recorder,
        continue_log: Callable[[Path], None],
        report_running: Callable[[Progress], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._grid = grid
        self._root = root
        self._lease = lease
        self._resume_point = resume_point
        self._interventions = interventions
        self._recorder = recorder
        self._continue_log = continue_log
        self._report_running = report_running

    def on_spike(self, spike: LossSpike, progress: Progress) -> Progress | None:
        grid = self._grid
        newest, damaged = checkpoint.find_newest(self._root, grid)
        checkpoint.set_aside_damaged(damaged, grid, self._lease)
        if newest is None:
            logger.warning("step %d: %s; no checkpoint to go back to", spike.step, spike.reason)
            return None
        folder, manifest = newest
        samples = samples_at(self._resume_point, folder, manifest, self._config)
        fields = {
            "to": manifest.step,
            "gap": self._gap(samples, progress.samples),
            "reason": spike.reason,
        }
        self._interventions.add(
            {
                "kind": "rollback",
                "step": spike.step,
                "samples": progress.samples,
                "reason": fields["reason"],
                "to": fields["to"],
                "gap": fields["gap"],
            }
        )
        restored = checkpoint.restore(
            self._engine, self._config, grid=grid, folder=folder, manifest=manifest
        )
        self._continue_log(folder)
        restored = replace(restored, samples=samples)
        logger.warning("step %d: %s; back to %s", spike.step, spike.reason, folder.name)
        self._recorder.event(spike.step, "rollback", **fields)
        self._report_running(restored)
        return restored

    def _gap(self, checkpoint_samples: int, spike_samples: int) -> list[int]:
        """Return the samples to omit, [first, last): `guards.skip_window` steps at the spike."""
        size = self._config.training.global_batch_size
        around = self._config.guards.skip_window
        first = max(checkpoint_samples, spike_samples - around // 2 * size)
        return [first, spike_samples + (around - around // 2) * size]

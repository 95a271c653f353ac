"""Loading of the checkpoint that a start resumes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megalite import checkpoint
from megalite.checkpoint import Lease, Progress, set_aside_damaged
from megalite.config import RunConfig
from megalite.engine import Engine
from megalite.errors import CheckpointError, DamagedCheckpoint
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.parallel import Grid
from megalite.train.interventions import order_id
from megalite.train.resume import ResumePoint, stored_config


def restore(
    resume_point: ResumePoint,
    *,
    find_previous: Callable[[], ResumePoint | None],
    engine: Engine,
    config: RunConfig,
    grid: Grid,
    root: Path,
    lease: Lease | None = None,
) -> tuple[ResumePoint, Progress]:
    """Load a checkpoint into the engine; a collective.

    If a checkpoint of this run (below `root`) is damaged, it is set aside, and the previous one is
    loaded.

    Args:
        find_previous: returns the newest checkpoint that is left.
    Returns:
        the checkpoint that was loaded, and the progress that training continues from.
    Raises:
        CheckpointError: on every rank, if no checkpoint can be loaded.
    """
    while True:
        folder = resume_point.folder
        manifest = resume_point.manifest
        weights = resume_point.weights
        try:
            if weights is not None:
                checkpoint.import_weights(engine, config.model, grid=grid, source=weights)
                return resume_point, resume_point.progress
            assert manifest is not None
            if resume_point.weights_only:
                checkpoint.load_weights(
                    engine, config.model, grid=grid, folder=folder, manifest=manifest
                )
                return resume_point, resume_point.progress
            restored = checkpoint.restore(
                engine, config, grid=grid, folder=folder, manifest=manifest
            )
            return resume_point, replace(restored, samples=resume_point.progress.samples)
        except DamagedCheckpoint as error:
            if resume_point.weights_only or folder.parent != root:
                raise
            logger.warning("%s", error)
            set_aside_damaged([resume_point.folder], grid, lease)
            before = find_previous()
            if before is None:
                raise
            set_aside_damaged(before.damaged, grid, lease)
            if _states(before) != _states(resume_point):
                # states of the damaged checkpoint would stay in the engine
                raise CheckpointError(
                    f"{folder} is damaged, and the checkpoint before it, {before.folder}, is of "
                    "another optimizer: run the same command again to resume from that one"
                ) from error
            resume_point = before


def _states(resume_point: ResumePoint) -> dict[str, set[str]]:
    assert resume_point.manifest is not None
    return {name: {*entry.states} for name, entry in resume_point.manifest.tensors.items()}


def samples_at(
    resume_point: ResumePoint | None,
    folder: Path,
    manifest: disk.CheckpointManifest,
    config: RunConfig,
) -> int:
    """Return the position of a checkpoint of this run in the data order of this start.

    Args:
        resume_point: checkpoint that this start resumed from.
    """
    if resume_point is None or resume_point.weights_only:
        return manifest.samples  # saved by this start
    if manifest.step > resume_point.progress.step:
        return manifest.samples
    stored = stored_config(folder, manifest, config.model_dump(mode="json"))
    same_order = order_id(manifest.data_fingerprint, stored.data) == resume_point.orders[1]
    return manifest.samples if same_order else resume_point.progress.samples

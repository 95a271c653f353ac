"""Loads of checkpoints: the owner of a tensor reads it and sends it to the other ranks.

No byte is hashed twice. A resume first checks everything except the contents of tensors. It hashes
those after the load, as read back from the engine, which verifies the disk and the load at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite import arch, files
from megalite.checkpoint.compare import LoadTarget, compare_states
from megalite.checkpoint.owners import ParameterOwner, owned_parameters
from megalite.checkpoint.progress import Progress
from megalite.checkpoint.stored import StoredCheckpoint, TensorSource, read_part
from megalite.config import ModelConfig, RunConfig
from megalite.engine import WEIGHT, Engine
from megalite.errors import CheckpointError, CommandError, DamagedCheckpoint, OtherVersion
from megalite.formats import checkpoint as disk
from megalite.hub import foreign
from megalite.log import logger
from megalite.parallel import Grid
from megalite.plan.optimizer import state_names

_MAX_IN_FLIGHT = 4  # tensors that are being broadcast at a time


def _weights_of(model: ModelConfig) -> Callable[[arch.ParameterSpec], Sequence[str]]:
    """Return a function that selects the weights of `model`'s parameters, and no other states."""
    names = {row.name for row in arch.parameters(model)}
    return lambda row: (WEIGHT,) if row.name in names else ()


def find_newest(
    root: Path, grid: Grid
) -> tuple[tuple[Path, disk.CheckpointManifest] | None, tuple[Path, ...]]:
    """Return the newest valid checkpoint in `root`, and the damaged ones that are newer.

    The faults of damaged checkpoints are logged. The caller may rename them by
    `set_aside_damaged`. The contents of tensors are not checked, because `restore` hashes them.
    """
    damaged = list[Path]()
    # All ranks use rank 0's list.
    names: Any = grid.all_gather_objects([path.name for path in disk.published(root)])[0]
    for name in names:
        folder = root / name
        problems, manifest = _check(folder, grid, tensors=False)
        if manifest is not None and not problems:
            return (folder, manifest), tuple(damaged)
        for problem in problems:
            logger.warning("%s", problem)
        damaged.append(folder)
    return None, tuple(damaged)


def open_checkpoint(
    path: Path, grid: Grid | None = None, *, weights_only: bool = False
) -> tuple[Path, disk.CheckpointManifest]:
    """Check a checkpoint and return its folder and manifest.

    Args:
        path: a checkpoint or a run folder, of which the newest published checkpoint is used.
        weights_only: If true, accept checkpoints without optimizer state, and pick a fine-tuned
            run's best checkpoint instead of its newest.
    Raises:
        CommandError: on every rank, if a host has no checkpoint there. The message says what the
            folder contains instead, if that is known.
        CheckpointError: the checkpoint is damaged. The message names an intact older one of the
            run, if there is one.
    """
    located: tuple[Path, list[Path]] | None = None
    fault: CommandError | None = None
    try:
        located = _locate(path, weights_only=weights_only)
    except CommandError as error:  # one host may lack a folder that the others have
        fault = error
    results = grid.all_gather_objects(fault) if grid else [fault]
    if faults := [result for result in results if result is not None]:
        raise faults[0]
    assert located is not None
    folder, older = located
    problems, manifest = _check(folder, grid, weights_only=weights_only)
    if manifest is None or problems:
        for other in older:
            if not _check(other, grid, weights_only=weights_only)[0]:
                problems.append(f"{other} is intact: name it to use it instead")
                break
        raise CheckpointError("\n".join(problems))
    return folder, manifest


def _locate(path: Path, *, weights_only: bool) -> tuple[Path, list[Path]]:
    """Return the checkpoint that `path` refers to, and the older checkpoints of its run.

    Raises:
        CommandError: as `open_checkpoint`.
    """
    if not (path / disk.MANIFEST).exists():
        folders = disk.published(path / "checkpoints") or disk.published(path)
        if not folders:
            if (description := foreign.describe(path)) is not None:
                raise CommandError(f"{path} {description}")
            raise CommandError(
                f"{path} holds no checkpoint: name a step folder "
                "(.../checkpoints/step_00001000) or a run folder that has one; a command that only "
                "needs weights also takes a Hugging Face model folder, whose config.json has a "
                "model_type"
            )
        folder, *older = _best_first(folders) if weights_only else folders
        return folder, older
    if (kind := disk.other_format(path)) is not None:
        raise CommandError(
            f"{path} holds {kind!r}, not a checkpoint: name a step folder or a run folder"
        )
    return path, []


def _best_first(folders: list[Path]) -> list[Path]:
    """Return the checkpoints of a run, the best one of a fine-tuned run first."""
    try:
        finetune = files.read_json(folders[0] / "config.json").get("finetune")
    except (OSError, ValueError, AttributeError):  # damaged, which is reported later
        return folders
    best = disk.best(folders) if finetune else None
    if best not in (None, folders[0]):
        logger.info("%s is the best of its run on the held-out split", best)
    return sorted(folders, key=lambda folder: folder != best)


def restore(
    engine: Engine,
    config: RunConfig,
    *,
    grid: Grid,
    folder: Path,
    manifest: disk.CheckpointManifest,
) -> Progress:
    """Set the engine's weights, optimizer states and counters; a collective of all ranks.

    Raises:
        DamagedCheckpoint: on every rank, if tensors on disk differ from those that were written.
            The engine's state is then unusable.
        CheckpointError: the engine's values differ from those that it was given.
    """
    refuse_other_model(config.model, folder, manifest)

    def states(row: arch.ParameterSpec) -> tuple[str, ...]:
        return (WEIGHT, *state_names(config, row))

    if any(
        set(manifest.tensors[tensor.name].states) != {*states(row)}
        for row in arch.parameters(config.model)
        for tensor in row.tensors
    ):
        logger.warning("%s was trained by another optimizer: its states start fresh", folder)
        load_weights(engine, config.model, grid=grid, folder=folder, manifest=manifest)
        return Progress(manifest.step, manifest.samples, manifest.tokens, manifest.valid_loss)
    target = LoadTarget(engine, config.model, states, grid)
    _set_states(target, StoredCheckpoint(folder, manifest))
    engine.restore_progress(manifest.progress)
    updates = engine.progress().get("updates")
    if updates != manifest.progress.get("updates"):
        raise CheckpointError(
            f"{folder}: the optimizer should have made {manifest.progress.get('updates')} updates, "
            f"but reports {updates} after the load"
        )
    return Progress(manifest.step, manifest.samples, manifest.tokens, manifest.valid_loss)


def load_weights(
    engine: Engine,
    model: ModelConfig,
    *,
    grid: Grid,
    folder: Path,
    manifest: disk.CheckpointManifest,
) -> None:
    """Set only the weights, for a new run that starts from another run's checkpoint.

    A classifier or a model with adapters also loads from its base model: its further parameters
    keep their initial values. Raises as `restore`.
    """
    shared = refuse_other_model(model, folder, manifest, base=True)
    target = LoadTarget(engine, model, _weights_of(shared), grid)
    _set_states(target, StoredCheckpoint(folder, manifest))


def import_weights(engine: Engine, model: ModelConfig, *, grid: Grid, source: TensorSource) -> None:
    """Set the weights from a source other than a checkpoint; a collective of all ranks.

    Raises:
        CheckpointError: on every rank, if any rank could not read its part.
    """
    unread = _write_states(
        LoadTarget(engine, model, _weights_of(arch.base_model(model)), grid), source
    )
    if faults := [line for lines in grid.all_gather_objects(unread) for line in lines]:
        raise CheckpointError("\n".join(faults))


def _set_states(target: LoadTarget, source: StoredCheckpoint) -> None:
    """Set states, and check that the engine's values are those that were written."""
    unread = _write_states(target, source)
    differing = compare_states(target, source)
    results = target.grid.all_gather_objects(unread + differing)
    faults: list[Any] = [line for lines in results for line in lines]
    if not faults:
        return
    problems, _ = _check(source.folder, target.grid)
    if problems:
        raise DamagedCheckpoint("\n".join(problems))
    raise CheckpointError(
        f"{source.folder}: the engine's values differ from the loaded ones: "
        f"{', '.join(faults[:3])}" + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
    )


def _write_states(target: LoadTarget, source: TensorSource) -> list[str]:
    """Set states; owners read the next states while others are being sent.

    Returns:
        the faults of this rank's reads. An exception would leave the other ranks waiting.
    """
    engine, grid = target.engine, target.grid
    unread: list[str] = []
    # On CPUs every rank reads: the ranks of a host share the page cache, and gloo is slower.
    all_read = grid.device.type == "cpu"
    local_shapes = [arch.local_shape(r, grid.at) for r in arch.parameters(target.model)]
    # All reads use one buffer, because allocating pages costs more than copying into them.
    buffer = torch.empty(max(math.prod(shape) for shape in local_shapes))

    def read(owner: ParameterOwner, state: str) -> Tensor:
        try:
            return read_part(source, owner.row, state, grid.at, buffer=buffer).to(grid.device)
        except CheckpointError as error:
            unread.append(str(error))
            return torch.zeros(arch.local_shape(owner.row, grid.at), device=grid.device)

    in_flight: deque[tuple[ParameterOwner, str, Tensor, Any]] = deque()

    def receive() -> None:
        owner, state, value, work = in_flight.popleft()
        work.wait()
        engine.write_state(owner.parameter, state, value)

    for owner in owned_parameters(engine, target.model, grid):
        for state in target.states(owner.row):
            only_owner = owner.local and state != WEIGHT  # no other rank needs the state
            if only_owner and not owner.in_my_copy(grid):
                continue
            if only_owner or all_read:
                engine.write_state(owner.parameter, state, read(owner, state))
                continue
            value, work = _start_broadcast(owner, grid, partial(read, owner, state))
            in_flight.append((owner, state, value, work))
            if len(in_flight) > _MAX_IN_FLIGHT:
                receive()
    while in_flight:
        receive()
    return unread


def _start_broadcast(
    owner: ParameterOwner, grid: Grid, read: Callable[[], Tensor]
) -> tuple[Tensor, Any]:
    """Start to broadcast a state from its owner's copy of the model to the other copies.

    Returns:
        the value, and the work to wait for before using it.
    """
    if owner.in_my_copy(grid):
        value = read()
    else:
        shape = arch.local_shape(owner.row, grid.at)
        value = torch.empty(shape, dtype=torch.float32, device=grid.device)
    reader = replace(grid.at, data_rank=owner.at.data_rank, context_rank=owner.at.context_rank).rank
    return value, dist.broadcast(value, src=reader, group=grid.zero_group, async_op=True)


def refuse_other_model(
    model: ModelConfig, folder: Path, manifest: disk.CheckpointManifest, *, base: bool = False
) -> ModelConfig:
    """Check that a checkpoint's tensors have the names and shapes of a model's.

    Every rank checks, so that all raise and none waits for the others.

    Args:
        base: If true, also accept the tensors of the base model (without labels and adapters).
    Returns:
        the model section that the checkpoint's tensors belong to.
    Raises:
        CommandError: a tensor is missing, or has another shape.
    """
    stored = {name: entry.shape for name, entry in manifest.tensors.items()}
    expected = {name: list(tensor.shape) for name, tensor in arch.tensors(model).items()}
    if expected != stored and base and model != arch.base_model(model):
        return refuse_other_model(arch.base_model(model), folder, manifest)
    if expected != stored:
        names = {*expected, *stored}
        name = sorted(k for k in names if expected.get(k) != stored.get(k))[0]
        raise CommandError(
            f"{folder} holds another model: {name} is {stored.get(name, 'absent')} there, "
            f"{expected.get(name, 'absent')} in this configuration"
        )
    return model


def _check(
    folder: Path, grid: Grid | None, *, weights_only: bool = False, tensors: bool = True
) -> tuple[list[str], disk.CheckpointManifest | None]:
    """Return the faults of a checkpoint, and its manifest; each rank checks a part of the files.

    Args:
        weights_only: If true, ignore the files of optimizer states.
        tensors: If true, check the contents of tensors.
    Raises:
        OtherVersion: on every rank, if another version of MegaLite wrote the checkpoint.
    """
    manifest: disk.CheckpointManifest | None = None
    refusal: OtherVersion | None = None
    mine = list[str]()
    try:
        manifest = disk.read_manifest(folder)
        rank, size = (grid.rank, grid.world_size) if grid else (0, 1)
        ignored = disk.optimizer_files(manifest) if weights_only else set()
        names = disk.files_of_rank(manifest, rank, size) - ignored
        mine = disk.find_damage(
            folder, manifest, names, threads=torch.get_num_threads(), tensors=tensors
        )
    except CheckpointError as error:
        mine = [str(error)]
    except OtherVersion as error:
        refusal = error
    results: list[Any] = grid.all_gather_objects((mine, refusal)) if grid else [(mine, refusal)]
    for _, other_version in results:
        if other_version is not None:
            raise other_version
    return list(dict.fromkeys(line for lines, _ in results for line in lines)), manifest

"""Load the newest valid checkpoint: the owner of a tensor reads it, and its group receives it.

No byte is hashed twice. A resume first checks everything except the contents of tensors. These are
hashed as the engine holds them after the load, which proves the disk, the reading and the setting.
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

_TRAVELLING = 4  # most tensors that are being received at a time


def _weights_of(model: ModelConfig) -> Callable[[arch.ParameterSpec], Sequence[str]]:
    """Select the weights of the parameters that `model` has; others keep their initial values."""
    names = {row.name for row in arch.parameters(model)}
    return lambda row: (WEIGHT,) if row.name in names else ()


def find_newest(
    root: Path, grid: Grid
) -> tuple[tuple[Path, disk.CheckpointManifest] | None, tuple[Path, ...]]:
    """Return the newest valid checkpoint below `root`, and the damaged ones that are newer.

    The faults of damaged ones are logged; the caller decides on `set_aside_damaged`. The contents
    of tensors are not checked, because `restore` hashes them.
    """
    damaged = list[Path]()
    # all ranks use rank 0's view
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
    """Return a checkpoint by its own folder or its run's, checked.

    If `path` is a run folder, its newest published checkpoint is used.

    Args:
        weights_only: accept checkpoints without optimizer state, and pick a fine-tuned run's best
            checkpoint instead of its newest.
    Raises:
        CommandError: on every rank, if a host has no checkpoint there; what the folder holds
            instead, if it is known.
        CheckpointError: a damaged one; an older one of the run that is whole is named.
    """
    located: tuple[Path, list[Path]] | None = None
    fault: CommandError | None = None
    try:
        located = _locate(path, weights_only=weights_only)
    except CommandError as error:  # one host may lack what the others have
        fault = error
    faults = [
        found
        for found in (grid.all_gather_objects(fault) if grid else [fault])
        if found is not None
    ]
    if faults:
        raise faults[0]
    assert located is not None
    folder, older = located
    problems, manifest = _check(folder, grid, weights_only=weights_only)
    if manifest is None or problems:
        for other in older:
            if not _check(other, grid, weights_only=weights_only)[0]:
                problems.append(f"{other} is whole: give that one to go on from it")
                break
        raise CheckpointError("\n".join(problems))
    return folder, manifest


def _locate(path: Path, *, weights_only: bool) -> tuple[Path, list[Path]]:
    """Return the checkpoint that a path means, and the older ones of its run.

    Raises:
        CommandError: as `open_checkpoint`.
    """
    if not (path / disk.MANIFEST).exists():
        found = disk.published(path / "checkpoints") or disk.published(path)
        if not found:
            if (kind := foreign.describe(path)) is not None:
                raise CommandError(f"{path} {kind}")
            raise CommandError(
                f"{path} holds no checkpoint: give a step folder "
                "(.../checkpoints/step_00001000) or a run folder that has one; for use also a "
                "model folder of Hugging Face's, whose config.json names a model_type"
            )
        folder, *older = _best_first(found) if weights_only else found
        return folder, older
    if (kind := disk.other_format(path)) is not None:
        raise CommandError(
            f"{path} holds {kind!r}, not a checkpoint: give a step folder or a run folder"
        )
    return path, []


def _best_first(folders: list[Path]) -> list[Path]:
    """Return the checkpoints with the one that a fine-tuned run chose as its best in front."""
    try:
        tuned = files.read_json(folders[0] / "config.json").get("finetune")
    except (OSError, ValueError, AttributeError):  # damaged, which is reported later
        return folders
    chosen = disk.best(folders) if tuned else None
    if chosen not in (None, folders[0]):
        logger.info("%s is the best of its run by the split held out", chosen)
    return sorted(folders, key=lambda folder: folder != chosen)


def restore(
    engine: Engine,
    config: RunConfig,
    *,
    grid: Grid,
    folder: Path,
    manifest: disk.CheckpointManifest,
) -> Progress:
    """Set weights, optimizer states and counters; a collective of all ranks.

    Raises:
        DamagedCheckpoint: on every rank, if the tensors on the disk are not those that were
            written. The engine's state is then unusable.
        CheckpointError: if the engine holds other values than it was given.
    """
    refuse_other_model(config.model, folder, manifest)

    def states(row: arch.ParameterSpec) -> tuple[str, ...]:
        return (WEIGHT, *state_names(config, row))

    if any(
        set(manifest.tensors[tensor.name].states) != {*states(row)}
        for row in arch.parameters(config.model)
        for tensor in row.tensors
    ):
        logger.warning("%s was trained by another optimizer: its states begin again", folder)
        load_weights(engine, config.model, grid=grid, folder=folder, manifest=manifest)
        return Progress(manifest.step, manifest.samples, manifest.tokens, manifest.valid_loss)
    target = LoadTarget(engine, config.model, states, grid)
    _set_states(target, StoredCheckpoint(folder, manifest))
    engine.restore_progress(manifest.progress)
    updates = engine.progress().get("updates")
    if updates != manifest.progress.get("updates"):
        raise CheckpointError(
            f"{folder}: the optimizer should have taken {manifest.progress.get('updates')} updates "
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
    """Set only the weights, for a new run that starts from another run's; raises as `restore`.

    A classifier, or a model with adapters, takes the weights that it shares with a language model.
    """
    shared = refuse_other_model(model, folder, manifest, base=True)
    target = LoadTarget(engine, model, _weights_of(shared), grid)
    _set_states(target, StoredCheckpoint(folder, manifest))


def import_weights(engine: Engine, model: ModelConfig, *, grid: Grid, source: TensorSource) -> None:
    """Set the weights from a source other than a checkpoint; a collective of all ranks.

    Raises:
        CheckpointError: on every rank, if any rank could not read.
    """
    unread = _write_states(
        LoadTarget(engine, model, _weights_of(arch.base_model(model)), grid), source
    )
    if faults := [line for lines in grid.all_gather_objects(unread) for line in lines]:
        raise CheckpointError("\n".join(faults))


def _set_states(target: LoadTarget, source: StoredCheckpoint) -> None:
    """Set states, and prove that the engine holds what was written."""
    unread = _write_states(target, source)
    differing = compare_states(target, source)
    every = target.grid.all_gather_objects(unread + differing)
    faults: list[Any] = [line for lines in every for line in lines]
    if not faults:
        return
    problems, _ = _check(source.folder, target.grid)
    if problems:
        raise DamagedCheckpoint("\n".join(problems))
    raise CheckpointError(
        f"{source.folder}: the engine holds something else than was loaded: "
        f"{', '.join(faults[:3])}" + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
    )


def _write_states(target: LoadTarget, source: TensorSource) -> list[str]:
    """Set states. While a group receives one, its owners read the next ones.

    Returns:
        faults of this rank's reads. Raised here, they would leave the other ranks waiting.
    """
    engine, grid = target.engine, target.grid
    unread: list[str] = []
    # On CPUs every rank reads: the ranks of a host share the pages in memory, and gloo is slower.
    all_read = grid.device.type == "cpu"
    local_shapes = [arch.local_shape(r, grid.at) for r in arch.parameters(target.model)]
    # one buffer for all reads, because allocating pages costs more than copying into them
    room = torch.empty(max(math.prod(shape) for shape in local_shapes))

    def read(owner: ParameterOwner, state: str) -> Tensor:
        try:
            return read_part(source, owner.row, state, grid.at, room=room).to(grid.device)
        except CheckpointError as error:
            unread.append(str(error))
            return torch.zeros(arch.local_shape(owner.row, grid.at), device=grid.device)

    travelling: deque[tuple[ParameterOwner, str, Tensor, Any]] = deque()

    def arrive() -> None:
        owner, state, value, work = travelling.popleft()
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
            value, work = _start_receiving(owner, grid, partial(read, owner, state))
            travelling.append((owner, state, value, work))
            if len(travelling) > _TRAVELLING:
                arrive()
    while travelling:
        arrive()
    return unread


def _start_receiving(
    owner: ParameterOwner, grid: Grid, read: Callable[[], Tensor]
) -> tuple[Tensor, Any]:
    """Start to send a state from its owner's copy of the model to the other copies.

    Returns:
        the value, which is valid after the wait, and the work to wait for.
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
    """Refuse a checkpoint whose tensors have other names or shapes.

    Every rank compares, so that all raise and none waits for the others.

    Args:
        base: if true, the weights of the base model (without labels and adapters) also suffice.
    Returns:
        the model section that the checkpoint has the weights of.
    Raises:
        CommandError: another model.
    """
    found = {name: entry.shape for name, entry in manifest.tensors.items()}
    wanted = {name: list(tensor.shape) for name, tensor in arch.tensors(model).items()}
    if wanted != found and base and model != arch.base_model(model):
        return refuse_other_model(arch.base_model(model), folder, manifest)
    if wanted != found:
        name = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))[0]
        raise CommandError(
            f"{folder} holds another model: {name} is {found.get(name, 'absent')} there, "
            f"{wanted.get(name, 'absent')} in this configuration"
        )
    return model


def _check(
    folder: Path, grid: Grid | None, *, weights_only: bool = False, tensors: bool = True
) -> tuple[list[str], disk.CheckpointManifest | None]:
    """Return the problems of a checkpoint; each rank hashes a share of the files.

    Args:
        weights_only: whether the files of optimizer states may be missing.
        tensors: whether to check the contents of tensors.
    Raises:
        OtherVersion: on every rank.
    """
    manifest: disk.CheckpointManifest | None = None
    refusal: OtherVersion | None = None
    mine = list[str]()
    try:
        manifest = disk.read_manifest(folder)
        rank, size = (grid.rank, grid.world_size) if grid else (0, 1)
        others = disk.optimizer_files(manifest) if weights_only else set()
        names = disk.files_of_rank(manifest, rank, size) - others
        mine = disk.find_damage(
            folder, manifest, names, threads=torch.get_num_threads(), tensors=tensors
        )
    except CheckpointError as error:
        mine = [str(error)]
    except OtherVersion as error:
        refusal = error
    found: list[Any] = grid.all_gather_objects((mine, refusal)) if grid else [(mine, refusal)]
    for _, refused in found:
        if refused is not None:
            raise refused
    return list(dict.fromkeys(line for lines, _ in found for line in lines)), manifest

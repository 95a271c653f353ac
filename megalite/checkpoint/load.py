"""Loading: the newest checkpoint that proves whole; a tensor's owner reads, its group receives.

No byte is hashed twice. A resume checks at first all but the tensors' own bytes; those are hashed
as the engine holds them in the end, which proves the disk, the reading and the setting at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite import arch, files
from megalite.checkpoint.compare import States, compare_states
from megalite.checkpoint.save import Place
from megalite.checkpoint.states import Owned, owned_parameters
from megalite.checkpoint.stored import Stored, StoredCheckpoint, read_local
from megalite.config import ModelConfig, RunConfig
from megalite.engine import WEIGHT, Engine
from megalite.errors import CheckpointError, CommandError, DamagedCheckpoint, OtherVersion
from megalite.formats import checkpoint as disk
from megalite.hub import foreign
from megalite.log import logger
from megalite.parallel import Grid
from megalite.plan.optimizer import state_names

_TRAVELLING = 4  # tensors on their way at once


def _weights_of(model: ModelConfig) -> States:
    """The weights of the parameters that `model` has as well; other ones stay as they started."""
    names = {row.name for row in arch.parameters(model)}
    return lambda row: (WEIGHT,) if row.name in names else ()


def find_newest(
    root: Path, grid: Grid
) -> tuple[tuple[Path, disk.Manifest] | None, tuple[Path, ...]]:
    """The newest whole checkpoint below `root`, and the damaged ones that are newer.

    What is wrong with those is said; `set_aside_damaged` is the caller's. The tensors' own bytes
    are left to `restore`, which hashes them.
    """
    damaged = list[Path]()
    # rank 0's view, for all
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
) -> tuple[Path, disk.Manifest]:
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
    except (OSError, ValueError, AttributeError):  # damaged, which is told in its turn
        return folders
    chosen = disk.best(folders) if tuned else None
    if chosen not in (None, folders[0]):
        logger.info("%s is the best of its run by the split held out", chosen)
    return sorted(folders, key=lambda folder: folder != chosen)


def restore(
    engine: Engine, config: RunConfig, *, grid: Grid, folder: Path, manifest: disk.Manifest
) -> Place:
    """Set weights, optimizer states and counters; a collective of all ranks.

    Raises:
        DamagedCheckpoint: on every rank, if the tensors on the disk are not those that were
            written. What the engine holds then is of no use.
        CheckpointError: if the engine holds something else than it was given.
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
        return Place(manifest.step, manifest.samples, manifest.tokens, manifest.valid_loss)
    _set_states(engine, config.model, states, grid, folder, manifest)
    engine.restore_progress(manifest.progress)
    updates = engine.progress().get("updates")
    if updates != manifest.progress.get("updates"):
        raise CheckpointError(
            f"{folder}: the optimizer should have taken {manifest.progress.get('updates')} updates "
            f"but reports {updates} after the load"
        )
    return Place(manifest.step, manifest.samples, manifest.tokens, manifest.valid_loss)


def load_weights(
    engine: Engine, model: ModelConfig, *, grid: Grid, folder: Path, manifest: disk.Manifest
) -> None:
    """Set the weights alone: a new run that starts from another's; raises as `restore`.

    A classifier, or a model with adapters, starts from what it shares with a language model.
    """
    shared = refuse_other_model(model, folder, manifest, base=True)
    _set_states(engine, model, _weights_of(shared), grid, folder, manifest)


def import_weights(engine: Engine, model: ModelConfig, *, grid: Grid, stored: Stored) -> None:
    """Set the weights from elsewhere than a checkpoint; a collective of all ranks.

    Raises:
        CheckpointError: on every rank, if any could not read.
    """
    states = _weights_of(arch.base_model(model))
    unread = _write_states(engine, model, states, grid, stored)
    if told := [line for lines in grid.all_gather_objects(unread) for line in lines]:
        raise CheckpointError("\n".join(told))


def _set_states(
    engine: Engine,
    model: ModelConfig,
    states: States,
    grid: Grid,
    folder: Path,
    manifest: disk.Manifest,
) -> None:
    """Set states, and prove that the engine holds what was once written."""
    stored = StoredCheckpoint(folder, manifest)
    unread = _write_states(engine, model, states, grid, stored)
    differing = compare_states(engine, model, states, grid, folder, manifest)
    told: list[Any] = [
        line for lines in grid.all_gather_objects(unread + differing) for line in lines
    ]
    if not told:
        return
    problems, _ = _check(folder, grid)
    if problems:
        raise DamagedCheckpoint("\n".join(problems))
    raise CheckpointError(
        f"{folder}: the engine holds something else than was loaded: {', '.join(told[:3])}"
        + (f" and {len(told) - 3} more" if len(told) > 3 else "")
    )


def _write_states(
    engine: Engine, model: ModelConfig, states: States, grid: Grid, stored: Stored
) -> list[str]:
    """Set states. What the group receives travels while its owners read the next ones.

    Returns:
        what could not be read: raised here, it would leave the other ranks waiting.
    """
    unread: list[str] = []
    # on CPUs every rank reads: their common pages are in memory, and gloo is slower
    all_read = grid.device.type == "cpu"
    local = [arch.local_shape(r, grid.at) for r in arch.parameters(model)]
    room = torch.empty(max(math.prod(shape) for shape in local))  # new pages cost more than bytes

    def read(owned: Owned, state: str) -> Tensor:
        try:
            return read_local(stored, owned.row, state, grid.at, room=room).to(grid.device)
        except CheckpointError as error:
            unread.append(str(error))
            return torch.zeros(arch.local_shape(owned.row, grid.at), device=grid.device)

    travelling: deque[tuple[Owned, str, Tensor, Any]] = deque()

    def arrive() -> None:
        owned, state, value, work = travelling.popleft()
        work.wait()
        engine.write_state(owned.parameter, state, value)

    for owned in owned_parameters(engine, model, grid):
        for state in states(owned.row):
            alone = owned.held and state != WEIGHT  # nobody else has a use for it
            if alone and owned.data_rank != grid.at.zero_rank:
                continue
            if alone or all_read:
                engine.write_state(owned.parameter, state, read(owned, state))
                continue
            value, work = _start_receiving(owned, grid, partial(read, owned, state))
            travelling.append((owned, state, value, work))
            if len(travelling) > _TRAVELLING:
                arrive()
    while travelling:
        arrive()
    return unread


def _start_receiving(owned: Owned, grid: Grid, read: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """A state's value on its way to every rank of the data-parallel group, read by its owner."""
    if owned.data_rank == grid.at.zero_rank:
        value = read()
    else:
        shape = arch.local_shape(owned.row, grid.at)
        value = torch.empty(shape, dtype=torch.float32, device=grid.device)
    source = owned.data_rank * grid.mesh.tensor + grid.at.tensor_rank
    return value, dist.broadcast(value, src=source, group=grid.zero_group, async_op=True)


def refuse_other_model(
    model: ModelConfig, folder: Path, manifest: disk.Manifest, *, base: bool = False
) -> ModelConfig:
    """Every rank compares names and shapes, so that all raise and none waits for the others.

    Args:
        base: whether what a model was made from will do.
    Returns:
        the model that the checkpoint has the weights of.
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
) -> tuple[list[str], disk.Manifest | None]:
    """Problems of a checkpoint, its files' hashes shared out over the ranks.

    Raises:
        OtherVersion: on every rank.
    """
    manifest: disk.Manifest | None = None
    refusal: OtherVersion | None = None
    mine = list[str]()
    try:
        manifest = disk.read_manifest(folder)
        rank, size = (grid.rank, grid.world_size) if grid else (0, 1)
        others = disk.files_of_other_states(manifest) if weights_only else set()
        names = disk.share(manifest, rank, size) - others
        mine = disk.damage(
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

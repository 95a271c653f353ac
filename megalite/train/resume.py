"""Choose the checkpoint that a start goes on from, and check what has changed in the run file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite import arch, checkpoint, env, files
from megalite.checkpoint import (
    Grown,
    Lease,
    Place,
    StoredCheckpoint,
    TensorSource,
    compare_models,
    find_newest,
    merge_lora,
    open_checkpoint,
    open_model_folder,
    refuse_other_model,
    set_aside_damaged,
)
from megalite.config import (
    ModelConfig,
    RunConfig,
    explain_redacted,
    redacted_keys,
    restore_redacted,
)
from megalite.engine import Engine
from megalite.errors import CheckpointError, CommandError, DamagedCheckpoint, OtherVersion
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.observe import began_from, resumed_before
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.plan import recorded_precision
from megalite.train.changes import ALLOWABLE, find_changes, moved_defaults
from megalite.train.ledger import joined_gaps, order_id, read_notes

_VOCABULARY = "model.vocab_size"


@dataclass(frozen=True)
class Origin:
    """The checkpoint to go on from, and the changes against its run file worth recording.

    weights_only: a fresh run starts from its weights (`--init-from`); `weights` reads those that
    are in no checkpoint as they are, and then there is no `manifest`. damaged: checkpoints of this
    run that were passed over, to be set aside once the start is not refused. config: the run file
    with the length that follows from the checkpoint. rates: the learning rate of the next step, as
    the checkpoint's run file gives it and as this one does. orders: the data order of the
    checkpoint and of this start.
    """

    folder: Path
    manifest: disk.Manifest | None
    changes: dict[str, Any]
    place: Place
    weights_only: bool = False
    weights: TensorSource | None = None
    damaged: tuple[Path, ...] = ()
    config: RunConfig | None = None
    rates: tuple[float, float] | None = None
    orders: tuple[str | None, str | None] = (None, None)


_Found = tuple[tuple[Path, disk.Manifest] | None, tuple[Path, ...]]


def check_request(root: Path, resume: str) -> None:
    """Refuse `never` where checkpoints exist, before anything is started."""
    if resume == "never" and (found := disk.published(root)):
        raise CommandError(
            f"--resume never, but {root} holds {found[0].name}: choose another name, move that "
            "folder away, or resume with --resume auto"
        )
    if resume not in ("auto", "never") and (not resume or not Path(resume).is_dir()):
        raise CommandError(
            f"--resume {resume!r}: no such folder; give auto, never, a step folder or a run folder"
        )


def find_origin(
    config: RunConfig,
    *,
    grid: Grid,
    root: Path,
    resume: str,
    init_from: str | None = None,
    allow: tuple[str, ...],
    data_fingerprint: str,
    tokenizer_sha256: str,
    deepspeed: Mapping[str, Any] | None = None,
    total_samples: int | None = None,
    read_only: bool = False,
    lease: Lease | None = None,
) -> Origin | None:
    """Return the checkpoint of `resume`, else that of `init_from`, or None for a fresh start.

    Args:
        deepspeed: defaults of the installed DeepSpeed that hold in this run, by dotted key.
        total_samples: samples to train on in all. training.steps follows from it and from the
            samples that the checkpoint was trained on. None leaves training.steps as it is.
        read_only: if true, nothing in the run folder is renamed.
        lease: rank 0's right to rename.
    Raises:
        CheckpointError: damaged checkpoints and no whole one.
        CommandError: a change that needs `--allow-change`.
    """
    found, damaged = None, tuple[Path, ...]()
    if resume != "never":
        found, damaged = _find(resume, root, grid, read_only, lease)
    if found is None:
        return _start(config.model, init_from, grid, damaged) if init_from is not None else None
    if init_from is not None and grid.rank == 0 and not began_from(root.parent, "start"):
        logger.warning("%s goes on from %s: --init-from is for a fresh start", root, found[0].name)
    folder, manifest = found
    refuse_other_model(config.model, folder, manifest)
    stored = _stored(folder, manifest, config.model_dump(mode="json"))
    orders = (
        order_id(manifest.data_fingerprint, stored.data),
        order_id(data_fingerprint, config.data),
    )
    samples = manifest.samples if orders[0] == orders[1] else 0
    if total_samples is not None:
        config = _with_length(config, total_samples, samples, folder, manifest, stored, orders[1])
    before, after = _comparable(stored, folder, config), config.model_dump(mode="json")
    changed = find_changes(before, after, manifest, data_fingerprint, tokenizer_sha256)
    _refuse_changes(changed, allow, folder)
    _refuse_shorter(config, folder, manifest)
    changed |= moved_defaults(manifest, deepspeed or {})
    return Origin(
        folder,
        manifest,
        changed,
        Place(manifest.step, samples, manifest.tokens, manifest.valid_loss),
        damaged=damaged,
        config=config,
        rates=(learning_rate(stored, manifest.step + 1), learning_rate(config, manifest.step + 1)),
        orders=orders,
    )


def _comparable(stored: RunConfig, folder: Path, config: RunConfig) -> dict[str, Any]:
    """Return a checkpoint's run file with the precision it was trained in, as JSON."""
    before = stored.model_dump(mode="json")
    known = recorded_precision(before, folder.parents[1])
    # without a record a difference would be a guess
    before["training"]["precision"] = config.training.precision if known == "auto" else known
    return before


def samples_at(
    origin: Origin | None, folder: Path, manifest: disk.Manifest, config: RunConfig
) -> int:
    """Return the place of a checkpoint of this run in the data order of this start.

    Args:
        origin: the checkpoint that this start went on from.
    """
    if origin is None or origin.weights_only or manifest.step > origin.place.step:
        return manifest.samples  # saved by this start
    stored = _stored(folder, manifest, config.model_dump(mode="json"))
    same = order_id(manifest.data_fingerprint, stored.data) == origin.orders[1]
    return manifest.samples if same else origin.place.samples


def _refuse_changes(changed: Mapping[str, Any], allow: tuple[str, ...], folder: Path) -> None:
    """Raise CommandError for changes that need `--allow-change`, all at once."""
    refused = [key for key in ALLOWABLE if key in changed and key not in allow]
    if refused:
        raise CommandError(
            "\n".join(
                f"{key} differs from the checkpoint {folder}: {changed[key]}; restore it, or go on "
                f"knowingly with --allow-change {key}"
                for key in refused
            )
        )


def _refuse_shorter(config: RunConfig, folder: Path, manifest: disk.Manifest) -> None:
    """Raise CommandError if the checkpoint has taken more steps than the run is to take."""
    if manifest.step > config.training.steps:
        raise CommandError(
            f"training.steps {config.training.steps}, but {folder} is already past it; ask for "
            "more steps, or start another run with --set name=..."
        )


def _with_length(
    config: RunConfig,
    total: int,
    samples: int,
    folder: Path,
    manifest: disk.Manifest,
    stored: RunConfig,
    order: str,
) -> RunConfig:
    """Set training.steps to what the samples still to come take at the present batch size.

    Samples that a rollback left out were not trained on, so others take their place.

    Raises:
        CommandError: the checkpoint was trained on more than `total` samples.
    """
    gaps = joined_gaps(read_notes(folder).get("entries", []), order)
    trained = samples - sum(min(last, samples) - first for first, last in gaps if first < samples)
    size = config.training.global_batch_size
    if config.finetune is not None and trained - total >= stored.training.global_batch_size:
        per_epoch = total // config.finetune.epochs
        raise CommandError(
            f"finetune.epochs {config.finetune.epochs}, but {folder} has trained "
            f"{trained / per_epoch:.2f} epochs; ask for more epochs, or start another run with "
            "--set name=..."
        )
    steps = manifest.step + math.ceil(max(0, total - trained) / size)
    training = config.training.model_copy(update={"steps": steps})
    return config.model_copy(update={"training": training})


def _start(model: ModelConfig, path: str, grid: Grid, damaged: tuple[Path, ...]) -> Origin:
    """Return the weights that `--init-from` names.

    Adapters that are not the model's own are added to the weights; a smaller vocabulary grows.
    """
    whole: TensorSource
    base, adapters = arch.base_model(model), model.adapter is not None
    if (theirs := open_model_folder(Path(path), grid)) is not None:
        changes = compare_models(base, theirs.section, theirs.path, adapters=adapters)
        if not model.num_labels:
            theirs.require_head()
        theirs.say_ignored()
        whole = Grown(theirs, theirs.section) if _VOCABULARY in changes else theirs
        return Origin(theirs.path, None, changes, Place(), True, whole, damaged)
    folder, manifest = _open("--init-from", path, grid, weights_only=True)
    section = _stored(folder, manifest).model
    changes = compare_models(base, arch.base_model(section), folder, adapters=adapters)
    if _VOCABULARY in changes:
        whole, _ = merge_lora(StoredCheckpoint(folder, manifest), section)
        grown = Grown(whole, arch.base_model(section))
        return Origin(folder, None, changes, Place(), True, grown, damaged)
    if section.adapter in (None, model.adapter):
        refuse_other_model(model, folder, manifest, base=True)
        return Origin(folder, manifest, changes, Place(), weights_only=True, damaged=damaged)
    whole, _ = merge_lora(StoredCheckpoint(folder, manifest), section)
    plain = {name: entry for name, entry in manifest.tensors.items() if ".lora_" not in name}
    plain_manifest = manifest.model_copy(update={"tensors": plain})
    refuse_other_model(arch.base_model(model), folder, plain_manifest)
    return Origin(folder, None, changes, Place(), True, whole, damaged)


def _stored(
    folder: Path, manifest: disk.Manifest, own: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the run file of a checkpoint; a field younger than it has its default.

    Args:
        own: the run file of this start, for values that an earlier version's redaction replaced.
    """
    place = folder / "config.json"
    try:
        raw = files.read_object(place)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place} cannot be read: {error}") from None
    if own is not None and (keys := restore_redacted(raw, own)):
        logger.warning("%s: %s; taken from the run file", place, explain_redacted(keys))
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        if keys := redacted_keys(raw):
            raise OtherVersion(f"{place}: {explain_redacted(keys)}") from None
        first = error.errors()[0]
        raise OtherVersion(
            f"{folder}/config.json is of another version, MegaLite "
            f"{manifest.versions.get('megalite')}: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}; go on with that version"
        ) from None


def load(
    origin: Origin,
    again: Callable[[], Origin | None],
    engine: Engine,
    config: RunConfig,
    grid: Grid,
    root: Path,
    lease: Lease | None = None,
) -> tuple[Origin, Place]:
    """Bring the engine to where the run stands; a collective.

    A checkpoint of this run, below `root`, that turns out damaged is set aside and the one before
    it loaded, as `again` finds it.

    Returns:
        what was loaded, and the place training goes on from.
    """
    while True:
        folder, manifest = origin.folder, origin.manifest
        try:
            if origin.weights is not None:
                checkpoint.import_weights(engine, config.model, grid=grid, source=origin.weights)
                return origin, origin.place
            assert manifest is not None
            if origin.weights_only:
                checkpoint.load_weights(
                    engine, config.model, grid=grid, folder=folder, manifest=manifest
                )
                return origin, origin.place
            restored = checkpoint.restore(
                engine, config, grid=grid, folder=folder, manifest=manifest
            )
            return origin, replace(restored, samples=origin.place.samples)
        except DamagedCheckpoint as error:
            if origin.weights_only or folder.parent != root:
                raise
            logger.warning("%s", error)
            set_aside_damaged([origin.folder], grid, lease)
            before = again()
            if before is None:
                raise
            set_aside_damaged(before.damaged, grid, lease)
            if _states(before) != _states(origin):
                # what is in the engine now is of no use, and would be in part left there
                raise CheckpointError(
                    f"{origin.folder} is damaged, and {before.folder} before it was trained by "
                    "another optimizer: give the same command again to go on from there"
                ) from error
            origin = before


def _states(origin: Origin) -> dict[str, set[str]]:
    assert origin.manifest is not None
    return {name: {*entry.states} for name, entry in origin.manifest.tensors.items()}


def _find(
    resume: str, root: Path, grid: Grid, read_only: bool = False, lease: Lease | None = None
) -> _Found:
    """Return what `resume` names, and the damaged checkpoints that were passed over.

    Raises:
        CheckpointError: checkpoints exist and every one is damaged. Nothing starts afresh then.
    """
    own, asked = root.parent.resolve(), Path(resume).resolve()
    if resume == "auto" or asked in (own, root.resolve()):
        newest, damaged = find_newest(root, grid)
        if newest is None:
            if not read_only:
                set_aside_damaged(damaged, grid, lease)
            if damaged or any(root.glob("bad_*")):
                raise CheckpointError(
                    f"every checkpoint in {root} is damaged and none is used; repair one of the "
                    "bad_ folders, resume from another run with --resume PATH, or start under "
                    "another name"
                )
        return newest, damaged
    back = own in asked.parents  # to an earlier step of this run
    if back and not _is_repeated(root.parent, asked, grid):
        return _open("--resume", resume, grid), ()
    # a requeued job repeats its command; what it has saved since is further along
    newest, damaged = find_newest(root, grid)
    if newest is None:
        return _open("--resume", resume, grid), damaged
    again = grid.rank == 0 and began_from(root.parent, "resume", asked)
    if newest[0].resolve() != asked and not again:
        logger.warning(
            "%s goes on from its own %s: --resume %s is where it began; to begin there again, "
            "choose another name",
            root.parent,
            newest[0].name,
            resume,
        )
    return newest, damaged


def _is_repeated(run: Path, asked: Path, grid: Grid) -> bool:
    """Return whether this job, requeued, has gone back to `asked` before, as rank 0 sees it."""
    job = env.job()
    before = bool(
        grid.rank == 0
        and job.id
        and job.restart_count
        and resumed_before(run, path=str(asked), job=job.id)
    )
    return bool(grid.all_gather_objects(before)[0])


def _open(
    option: str, path: str, grid: Grid, *, weights_only: bool = False
) -> tuple[Path, disk.Manifest]:
    try:
        return open_checkpoint(Path(path), grid, weights_only=weights_only)
    except (CheckpointError, CommandError) as error:
        raise CommandError(f"{option} {path}: {error}") from None

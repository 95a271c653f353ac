"""Choose the checkpoint that a start goes on from, and check what has changed in the run file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite import arch, env, files
from megalite.checkpoint import (
    GrownVocabulary,
    Lease,
    Progress,
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
    rename_keys,
    restore_redacted,
)
from megalite.config.names import missing_plugin
from megalite.errors import CheckpointError, CommandError, OtherVersion
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.observe import began_from, resumed_before
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.plan import recorded_precision
from megalite.train.changes import ALLOWABLE, find_changes, moved_defaults
from megalite.train.interventions import joined_gaps, order_id, read_notes

_VOCABULARY = "model.vocab_size"


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint to go on from, and the changes since its run file that are recorded.

    Attributes:
        manifest: None if `weights` reads tensors that are in no checkpoint in this form.
        changes: changes since the checkpoint, by dotted key.
        progress: progress that training goes on from.
        weights_only: if true, a fresh run starts from the weights (`--init-from`).
        damaged: checkpoints of this run that were passed over. They are set aside once the start is
            not refused.
        config: run file with the length that follows from the checkpoint.
        rates: learning rate of the next step, by the checkpoint's run file and by this start's.
        orders: data order of the checkpoint and of this start.
    """

    folder: Path
    manifest: disk.CheckpointManifest | None
    changes: dict[str, Any]
    progress: Progress
    weights_only: bool = False
    weights: TensorSource | None = None
    damaged: tuple[Path, ...] = ()
    config: RunConfig | None = None
    rates: tuple[float, float] | None = None
    orders: tuple[str | None, str | None] = (None, None)


_Found = tuple[tuple[Path, disk.CheckpointManifest] | None, tuple[Path, ...]]


def check_resume(root: Path, resume: str) -> None:
    """Raise CommandError if `--resume` names nothing, or is `never` and checkpoints exist."""
    found = disk.published(root) if resume == "never" else []
    if found:
        raise CommandError(
            f"--resume never, but {root} holds {found[0].name}: choose another name, move that "
            "folder away, or resume with --resume auto"
        )
    if resume not in ("auto", "never") and (not resume or not Path(resume).is_dir()):
        raise CommandError(
            f"--resume {resume!r}: no such folder; give auto, never, a step folder or a run folder"
        )


def find_resume_point(
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
) -> ResumePoint | None:
    """Return the checkpoint of `resume`, else that of `init_from`; None means a fresh start.

    Args:
        deepspeed: defaults of the installed DeepSpeed that hold in this run, by dotted key.
        total_samples: samples to train on in all, which decides training.steps; None does not.
        read_only: if true, nothing in the run folder is renamed.
        lease: rank 0's right to rename.
    Raises:
        CheckpointError: all checkpoints are damaged.
        CommandError: a change needs `--allow-change`, or the arguments name no checkpoint.
    """
    found, damaged = _find(resume, root, grid, read_only=read_only, lease=lease)
    if found is None:
        return _start(config.model, init_from, grid, damaged) if init_from is not None else None
    folder, manifest = found
    if init_from is not None and grid.rank == 0 and not began_from(root.parent, "start"):
        logger.warning("%s goes on from %s: --init-from is for a fresh start", root, folder.name)
    refuse_other_model(config.model, folder, manifest)
    stored = stored_config(folder, manifest, config.model_dump(mode="json"))
    orders = (
        order_id(manifest.data_fingerprint, stored.data),
        order_id(data_fingerprint, config.data),
    )
    samples = manifest.samples if orders[0] == orders[1] else 0
    if total_samples is not None:
        size = stored.training.global_batch_size
        trained = _trained_samples(folder, samples, orders[1])
        _refuse_fewer_epochs(config, total_samples, trained, folder=folder, batch_size=size)
        config = _with_length(config, manifest.step, max(0, total_samples - trained))
    before = _comparable(stored, folder, config)
    after = config.model_dump(mode="json")
    changed = find_changes(before, after, manifest, data_fingerprint, tokenizer_sha256)
    _refuse_changes(changed, allow, folder)
    _refuse_shorter(config, folder, manifest)
    changed |= moved_defaults(manifest, deepspeed or {})
    return ResumePoint(
        folder,
        manifest,
        changed,
        Progress(manifest.step, samples, manifest.tokens, manifest.valid_loss),
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


def _refuse_shorter(config: RunConfig, folder: Path, manifest: disk.CheckpointManifest) -> None:
    """Raise CommandError if the checkpoint has taken more steps than the run is to take."""
    if manifest.step > config.training.steps:
        raise CommandError(
            f"training.steps {config.training.steps}, but {folder} is already past it; set "
            "more steps, or start another run with --set name=..."
        )


def _trained_samples(folder: Path, samples: int, order: str) -> int:
    """Return how many samples before a position of a data order were trained on.

    Samples that a rollback omitted were not, so others take their place.
    """
    gaps = joined_gaps(read_notes(folder).get("entries", []), order)
    return samples - sum(min(last, samples) - first for first, last in gaps if first < samples)


def _refuse_fewer_epochs(
    config: RunConfig, total: int, trained: int, *, folder: Path, batch_size: int
) -> None:
    """Raise CommandError if a fine-tuned checkpoint was trained on more than `total` samples.

    Args:
        batch_size: samples of the checkpoint's steps. Its last step may have gone beyond the total.
    """
    if config.finetune is None or trained - total < batch_size:
        return
    epochs = trained / (total // config.finetune.epochs)
    raise CommandError(
        f"finetune.epochs {config.finetune.epochs}, but {folder} has trained "
        f"{epochs:.2f} epochs; set more epochs, or start another run with "
        "--set name=..."
    )


def _with_length(config: RunConfig, step: int, samples: int) -> RunConfig:
    """Set training.steps to those until `step` and those that `samples` more samples take."""
    steps = step + math.ceil(samples / config.training.global_batch_size)
    training = config.training.model_copy(update={"steps": steps})
    return config.model_copy(update={"training": training})


def _start(model: ModelConfig, path: str, grid: Grid, damaged: tuple[Path, ...]) -> ResumePoint:
    """Return the weights that `--init-from` names.

    Adapters that are not the model's own are added to the weights; a smaller vocabulary grows.
    """
    whole: TensorSource
    base = arch.base_model(model)
    adapters = model.adapter is not None
    theirs = open_model_folder(Path(path), grid)
    if theirs is not None:
        changes = compare_models(base, theirs.section, theirs.path, adapters=adapters)
        if not model.num_labels:
            theirs.require_head()
        theirs.log_ignored()
        whole = GrownVocabulary(theirs, theirs.section) if _VOCABULARY in changes else theirs
        return _weights_of(theirs.path, None, changes, weights=whole, damaged=damaged)
    folder, manifest = _open("--init-from", path, grid, weights_only=True)
    section = stored_config(folder, manifest).model
    changes = compare_models(base, arch.base_model(section), folder, adapters=adapters)
    if _VOCABULARY in changes:
        whole, _ = merge_lora(StoredCheckpoint(folder, manifest), section)
        grown = GrownVocabulary(whole, arch.base_model(section))
        return _weights_of(folder, None, changes, weights=grown, damaged=damaged)
    if section.adapter in (None, model.adapter):
        refuse_other_model(model, folder, manifest, base=True)
        return _weights_of(folder, manifest, changes, weights=None, damaged=damaged)
    whole, _ = merge_lora(StoredCheckpoint(folder, manifest), section)
    plain = {name: entry for name, entry in manifest.tensors.items() if ".lora_" not in name}
    plain_manifest = manifest.model_copy(update={"tensors": plain})
    refuse_other_model(arch.base_model(model), folder, plain_manifest)
    return _weights_of(folder, None, changes, weights=whole, damaged=damaged)


def _weights_of(
    folder: Path,
    manifest: disk.CheckpointManifest | None,
    changes: dict[str, Any],
    *,
    weights: TensorSource | None,
    damaged: tuple[Path, ...],
) -> ResumePoint:
    return ResumePoint(
        folder,
        manifest,
        changes,
        Progress(),
        weights_only=True,
        weights=weights,
        damaged=damaged,
    )


def stored_config(
    folder: Path, manifest: disk.CheckpointManifest, own: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the run file of a checkpoint. A field that is newer than it has its default.

    Args:
        own: the run file of this start, for values that an earlier version's redaction replaced.
    """
    path = folder / "config.json"
    try:
        raw = files.read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    rename_keys(raw)
    keys = [] if own is None else restore_redacted(raw, own)
    if keys:
        logger.warning("%s: %s; taken from the run file", path, explain_redacted(keys))
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        keys = redacted_keys(raw)
        if keys:
            raise OtherVersion(f"{path}: {explain_redacted(keys)}") from None
        first = error.errors()[0]
        if first["type"] == "unknown_name":
            lacking = missing_plugin(f"{first['ctx']['kind']}.{first['input']}", raw)
            raise OtherVersion(f"{path}: {lacking or first['msg']}") from None
        raise OtherVersion(
            f"{folder}/config.json is of another version, MegaLite "
            f"{manifest.versions.get('megalite')}: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}; go on with that version"
        ) from None


def _find(
    resume: str, root: Path, grid: Grid, *, read_only: bool = False, lease: Lease | None = None
) -> _Found:
    """Return the checkpoint that `resume` names, and damaged ones that were passed over.

    Raises:
        CheckpointError: checkpoints exist and all are damaged. The run does not start afresh then.
    """
    if resume == "never":
        return None, ()
    own = root.parent.resolve()
    asked = Path(resume).resolve()
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
) -> tuple[Path, disk.CheckpointManifest]:
    try:
        return open_checkpoint(Path(path), grid, weights_only=weights_only)
    except (CheckpointError, CommandError) as error:
        raise CommandError(f"{option} {path}: {error}") from None

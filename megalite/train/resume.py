"""Choose the checkpoint that a start resumes from, and check the changes of the run file."""

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
from megalite.observe import has_resumed, started_from
from megalite.optim import learning_rate
from megalite.parallel import Grid
from megalite.plan import recorded_precision
from megalite.train.changes import ALLOWABLE, find_changes, moved_defaults
from megalite.train.interventions import joined_gaps, order_id, read_interventions

_VOCABULARY = "model.vocab_size"
_IGNORED_START = (
    "%s resumes from %s, so --init-from is ignored; to start a new run from that model, choose "
    "another name"
)


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint to resume from, and the recorded changes of its run file.

    Attributes:
        manifest: manifest of the checkpoint. None means that `weights` is the source.
        changes: changes since the checkpoint, by dotted key.
        progress: progress that training continues from.
        weights_only: if true, a fresh run starts from the weights (`--init-from`).
        weights: source of weights that need a conversion, such as a Hugging Face folder.
        damaged: damaged checkpoints of this run. They are set aside after the claim.
        config: run file with the number of steps that follows from the checkpoint.
        rates: learning rate of the next step by the checkpoint's run file, and by this start's.
        orders: data order of the checkpoint, and of this start.
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


# (checkpoint or None, damaged checkpoints)
_Found = tuple[tuple[Path, disk.CheckpointManifest] | None, tuple[Path, ...]]


def check_resume(root: Path, resume: str) -> None:
    """Raise CommandError if `--resume` is no folder, or is `never` and checkpoints exist."""
    published = disk.published(root) if resume == "never" else []
    if published:
        raise CommandError(
            f"--resume never, but {root} holds {published[0].name}: choose another name, move that "
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
    """Return the checkpoint of `resume`, else that of `init_from`. None means a fresh start.

    Args:
        deepspeed: defaults of the installed DeepSpeed that are in effect, by dotted key.
        total_samples: samples to train on in all, from which training.steps follows. None leaves
            training.steps unchanged.
        read_only: if true, rename nothing in the run folder.
        lease: rank 0's right to rename.
    Raises:
        CheckpointError: all checkpoints are damaged.
        CommandError: a change needs `--allow-change`, or the arguments name no checkpoint.
    """
    source, damaged = _find(resume, root, grid, read_only=read_only, lease=lease)
    if source is None:
        return _start(config.model, init_from, grid, damaged) if init_from is not None else None
    folder, manifest = source
    if init_from is not None and grid.rank == 0 and not started_from(root.parent, "start"):
        logger.warning(_IGNORED_START, root, folder.name)
    refuse_other_model(config.model, folder, manifest)
    stored = stored_config(folder, manifest, config.model_dump(mode="json"))
    stored_order = order_id(manifest.data_fingerprint, stored.data)
    orders = (stored_order, order_id(data_fingerprint, config.data))
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
    """Return a checkpoint's run file as JSON, with the resolved precision."""
    before = stored.model_dump(mode="json")
    precision = recorded_precision(before, folder.parents[1])
    # if no record exists, report no difference
    resolved = config.training.precision if precision == "auto" else precision
    before["training"]["precision"] = resolved
    return before


def _refuse_changes(changed: Mapping[str, Any], allow: tuple[str, ...], folder: Path) -> None:
    """Raise CommandError with all changes that need `--allow-change`."""
    refused = [key for key in ALLOWABLE if key in changed and key not in allow]
    if refused:
        raise CommandError(
            "\n".join(
                f"{key} differs from the checkpoint {folder}: {changed[key]}; undo the change, or "
                f"accept it with --allow-change {key}"
                for key in refused
            )
        )


def _refuse_shorter(config: RunConfig, folder: Path, manifest: disk.CheckpointManifest) -> None:
    """Raise CommandError if the checkpoint's step is beyond training.steps."""
    if manifest.step > config.training.steps:
        raise CommandError(
            f"training.steps {config.training.steps}, but {folder} is already past it; set "
            "more steps, or start another run with --set name=..."
        )


def _trained_samples(folder: Path, samples: int, order: str) -> int:
    """Return how many samples before a position of a data order were trained on.

    Samples that a rollback omitted do not count.
    """
    gaps = joined_gaps(read_interventions(folder).get("entries", []), order)
    return samples - sum(min(last, samples) - first for first, last in gaps if first < samples)


def _refuse_fewer_epochs(
    config: RunConfig, total: int, trained: int, *, folder: Path, batch_size: int
) -> None:
    """Raise CommandError if a fine-tuned checkpoint was trained on more than `total` samples.

    Args:
        batch_size: samples of a step of the checkpoint. The last step may exceed the total.
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
    """Return the run file with training.steps for `samples` more samples after `step`."""
    steps = step + math.ceil(samples / config.training.global_batch_size)
    training = config.training.model_copy(update={"steps": steps})
    return config.model_copy(update={"training": training})


def _start(model: ModelConfig, path: str, grid: Grid, damaged: tuple[Path, ...]) -> ResumePoint:
    """Return the resume point of `--init-from`.

    The checkpoint's adapters are merged into its weights, unless the model has the same adapters.
    A smaller vocabulary grows.
    """
    whole: TensorSource
    base = arch.base_model(model)
    adapters = model.adapter is not None
    foreign = open_model_folder(Path(path), grid)
    if foreign is not None:
        changes = compare_models(base, foreign.section, foreign.path, adapters=adapters)
        if not model.num_labels:
            foreign.require_head()
        foreign.log_ignored()
        whole = GrownVocabulary(foreign, foreign.section) if _VOCABULARY in changes else foreign
        return _weights_of(foreign.path, None, changes, weights=whole, damaged=damaged)
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
    folder: Path, manifest: disk.CheckpointManifest, current: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the run file of a checkpoint. Keys that are newer than the file get their defaults.

    Args:
        current: run file of this start, for values that an earlier version's redaction replaced.
    """
    path = folder / "config.json"
    try:
        raw = files.read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    rename_keys(raw)
    keys = [] if current is None else restore_redacted(raw, current)
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
            f"{folder}/config.json was written by another version, MegaLite "
            f"{manifest.versions.get('megalite')}: {'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}; use that version"
        ) from None


def _find(
    resume: str, root: Path, grid: Grid, *, read_only: bool = False, lease: Lease | None = None
) -> _Found:
    """Return the checkpoint of `resume`, and damaged checkpoints that are newer.

    Raises:
        CheckpointError: checkpoints exist, but all are damaged.
    """
    if resume == "never":
        return None, ()
    run = root.parent.resolve()
    requested = Path(resume).resolve()
    if resume == "auto" or requested in (run, root.resolve()):
        newest, damaged = find_newest(root, grid)
        if newest is None:
            if not read_only:
                set_aside_damaged(damaged, grid, lease)
            if damaged or any(root.glob("bad_*")):
                raise CheckpointError(
                    f"every checkpoint in {root} is damaged, so the run cannot resume; repair one "
                    "of the bad_ folders, resume from another run with --resume PATH, or choose "
                    "another name to start a new run"
                )
        return newest, damaged
    in_this_run = run in requested.parents
    if in_this_run and not _is_repeated(root.parent, requested, grid):
        return _open("--resume", resume, grid), ()
    # a requeued job repeats its command, but its own newer checkpoints come first
    newest, damaged = find_newest(root, grid)
    if newest is None:
        return _open("--resume", resume, grid), damaged
    again = grid.rank == 0 and started_from(root.parent, "resume", requested)
    if newest[0].resolve() != requested and not again:
        logger.warning(
            "%s resumes from its newest checkpoint, %s, and not from --resume %s; to begin there, "
            "choose another name",
            root.parent,
            newest[0].name,
            resume,
        )
    return newest, damaged


def _is_repeated(run: Path, requested: Path, grid: Grid) -> bool:
    """Return whether this requeued job has resumed from `requested` before, by rank 0's view."""
    job = env.job()
    before = bool(
        grid.rank == 0
        and job.id
        and job.restart_count
        and has_resumed(run, path=str(requested), job=job.id)
    )
    return bool(grid.all_gather_objects(before)[0])


def _open(
    option: str, path: str, grid: Grid, *, weights_only: bool = False
) -> tuple[Path, disk.CheckpointManifest]:
    try:
        return open_checkpoint(Path(path), grid, weights_only=weights_only)
    except (CheckpointError, CommandError) as error:
        raise CommandError(f"{option} {path}: {error}") from None

"""Which checkpoint a start goes on from, and which changes of the run file it may bring along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite import checkpoint, env, files, shapes
from megalite.checkpoint import (
    Grown,
    HuggingFaceFolder,
    Place,
    Stored,
    StoredCheckpoint,
    compare_models,
    find_newest,
    is_huggingface,
    merged,
    open_checkpoint,
    refuse_other_commits,
    refuse_other_model,
    set_aside_damaged,
)
from megalite.config import ModelConfig, RunConfig
from megalite.engine import Engine
from megalite.errors import CheckpointError, CommandError, DamagedCheckpoint, OtherVersion
from megalite.formats import checkpoint as disk
from megalite.log import logger
from megalite.observe import resumed_before
from megalite.parallel import Grid

ALLOWABLE = ("model", "tokenizer", "data", "sequence_length", "seed")
_RECORDED = (
    "objective",
    "optimizer",
    "schedule",
    "training.global_batch_size",
    "training.precision",
)
# each of these makes another order of samples, whose places mean something else
_NEW_ORDER = ("data", "sequence_length")
_VOCABULARY = "model.vocab_size"


@dataclass(frozen=True)
class Origin:
    """The checkpoint to go on from, and the changes against its run file worth recording.

    weights_only: a fresh run starts from its weights (`--init-from`); `weights` reads those that
    are in no checkpoint as they are, and then there is no `manifest`. damaged: checkpoints of this
    run that were passed over, to be set aside once the start is not refused.
    """

    folder: Path
    manifest: disk.Manifest | None
    changes: dict[str, Any]
    place: Place
    weights_only: bool = False
    weights: Stored | None = None
    damaged: tuple[Path, ...] = ()


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
) -> Origin | None:
    """The checkpoint `resume` names, else the one `init_from` names, or None for a fresh start.

    Args:
        deepspeed: defaults of the installed DeepSpeed that hold in this run, by dotted key.

    Raises:
        CheckpointError: damaged checkpoints and no whole one.
        CommandError: a change that needs `--allow-change`.
    """
    found, damaged = (None, ()) if resume == "never" else _find(resume, root, grid)
    if found is not None and init_from is not None:
        logger.warning("%s goes on from %s: --init-from is for a fresh start", root, found[0].name)
    if found is None and init_from is not None:
        return _start(config.model, init_from, grid, damaged)
    if found is None:
        return None
    folder, manifest = found
    refuse_other_model(config.model, folder, manifest)
    before = _stored(folder, manifest).model_dump(mode="json")
    after = config.model_dump(mode="json")
    changed = _changes(before, after, manifest, data_fingerprint, tokenizer_sha256)
    refused = [key for key in ALLOWABLE if key in changed and key not in allow]
    if refused:
        raise CommandError(
            "\n".join(
                f"{key} differs from the checkpoint {folder}: {changed[key]}; restore it, or go on "
                f"knowingly with --allow-change {key}"
                for key in refused
            )
        )
    if manifest.step > config.training.steps:
        raise CommandError(
            f"training.steps {config.training.steps}, but {folder} is already past it; ask for "
            "more steps, or start another run with --set name=..."
        )
    changed |= _moved_defaults(manifest, deepspeed or {})
    moved = any(key in changed for key in _NEW_ORDER) or _order_seed_differs(before, after)
    samples = 0 if moved else manifest.samples
    place = Place(manifest.step, samples, manifest.tokens)
    return Origin(folder, manifest, changed, place, damaged=damaged)


def _start(model: ModelConfig, path: str, grid: Grid, damaged: tuple[Path, ...]) -> Origin:
    """Return the weights that `--init-from` names.

    Adapters that are not the model's own are added to the weights; a smaller vocabulary grows.
    """
    whole: Stored
    base, adapters = shapes.base(model), model.adapter is not None
    if is_huggingface(Path(path)):
        theirs = HuggingFaceFolder(Path(path))
        refuse_other_commits(theirs.path, grid)
        changes = compare_models(base, theirs.section, theirs.path, adapters=adapters)
        if not model.num_labels:
            theirs.require_head()
        theirs.say_ignored()
        whole = Grown(theirs, theirs.section) if _VOCABULARY in changes else theirs
        return Origin(theirs.path, None, changes, Place(), True, whole, damaged)
    folder, manifest = _open("--init-from", path, grid, weights_only=True)
    section = _stored(folder, manifest).model
    changes = compare_models(base, shapes.base(section), folder, adapters=adapters)
    if _VOCABULARY in changes:
        whole, _ = merged(StoredCheckpoint(folder, manifest), section)
        grown = Grown(whole, shapes.base(section))
        return Origin(folder, None, changes, Place(), True, grown, damaged)
    if section.adapter in (None, model.adapter):
        refuse_other_model(model, folder, manifest, base=True)
        return Origin(folder, manifest, changes, Place(), weights_only=True, damaged=damaged)
    whole, _ = merged(StoredCheckpoint(folder, manifest), section)
    plain = {name: entry for name, entry in manifest.tensors.items() if ".lora_" not in name}
    plain_manifest = manifest.model_copy(update={"tensors": plain})
    refuse_other_model(shapes.base(model), folder, plain_manifest)
    return Origin(folder, None, changes, Place(), True, whole, damaged)


def _stored(folder: Path, manifest: disk.Manifest) -> RunConfig:
    """The run file of a checkpoint; a field younger than it has its default."""
    try:
        return RunConfig.model_validate(files.read_json(folder / "config.json"))
    except ValidationError as error:
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
                checkpoint.import_weights(engine, config.model, grid=grid, stored=origin.weights)
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
            set_aside_damaged([origin.folder], grid)
            before = again()
            if before is None:
                raise
            set_aside_damaged(before.damaged, grid)
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


def _find(resume: str, root: Path, grid: Grid) -> _Found:
    """What `resume` names, and the damaged checkpoints that were passed over.

    Raises:
        CheckpointError: checkpoints exist and every one is damaged. Nothing starts afresh then.
    """
    own, asked = root.parent.resolve(), Path(resume).resolve()
    if resume == "auto" or asked in (own, root.resolve()):
        newest, damaged = find_newest(root, grid)
        if newest is None:
            set_aside_damaged(damaged, grid)
            if damaged or any(root.glob("bad_*")):
                raise CheckpointError(
                    f"every checkpoint in {root} is damaged and none is used; mend one of the bad_ "
                    "folders, resume from another run with --resume PATH, or start under another "
                    "name"
                )
        return newest, damaged
    back = own in asked.parents  # to an earlier step of this run
    if back and not _is_repeated(root.parent, asked, grid):
        return _open("--resume", resume, grid), ()
    # a requeued job repeats its command; what it has saved since is further along
    newest, damaged = find_newest(root, grid)
    if newest is None:
        return _open("--resume", resume, grid), damaged
    if newest[0].resolve() != asked:
        logger.warning(
            "%s goes on from its own %s: --resume %s is where it began; to begin there again, "
            "choose another name",
            root.parent,
            newest[0].name,
            resume,
        )
    return newest, damaged


def _is_repeated(run: Path, asked: Path, grid: Grid) -> bool:
    """Whether this job, requeued, has already gone back to `asked`: rank 0's view, for all."""
    job = env.job()
    before = bool(
        grid.rank == 0
        and job.id
        and job.restart_count
        and resumed_before(run, path=str(asked), job=job.id)
    )
    return bool(grid.gather(before)[0])


def _order_seed_differs(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """`training.seed` is of weights and dropout alone."""
    return bool(before["data"]["seed"] != after["data"]["seed"])


def _open(
    option: str, path: str, grid: Grid, *, weights_only: bool = False
) -> tuple[Path, disk.Manifest]:
    try:
        return open_checkpoint(Path(path), grid, weights_only=weights_only)
    except (CheckpointError, CommandError) as error:
        raise CommandError(f"{option} {path}: {error}") from None


def _changes(
    before: dict[str, Any],
    after: dict[str, Any],
    manifest: disk.Manifest,
    data_fingerprint: str,
    tokenizer_sha256: str,
) -> dict[str, Any]:
    """What differs, by key: a pair (before, after) or a sentence."""
    found: dict[str, Any] = {}
    if (was := _differing(before["model"], after["model"])) is not None:
        found["model"] = was
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        found["tokenizer"] = "another tokenizer made these shards"
    lengths = before["data"]["sequence_length"], after["data"]["sequence_length"]
    if lengths[0] != lengths[1]:
        found["sequence_length"] = f"{lengths[0]} before, {lengths[1]} now"
    seeds = [
        f"{section}.seed {before[section]['seed']} before, {after[section]['seed']} now"
        for section in ("training", "data")
        if before[section]["seed"] != after[section]["seed"]
    ]
    if seeds:
        found["seed"] = ", ".join(seeds)
    if manifest.data_fingerprint != data_fingerprint:
        found["data"] = "other shards, weights or mask_documents than it was trained on"
    for key in _RECORDED:
        old, new = _at(before, key), _at(after, key)
        if old != new:
            found[key] = {"before": old, "after": new}
    steps = before["training"]["steps"], after["training"]["steps"]
    if steps[0] != steps[1] and _follows_steps(after["schedule"]):
        found["training.steps"] = {"before": steps[0], "after": steps[1]}
    return found


def _follows_steps(schedule: dict[str, Any]) -> bool:
    """Whether another length of the run makes other learning rates."""
    return schedule["name"] == "wsd" or (
        schedule["name"] != "constant" and schedule["decay_steps"] is None
    )


def _moved_defaults(manifest: disk.Manifest, now: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own defaults that another release has set otherwise; each with a warning."""
    found = {}
    for key, value in now.items():
        if key in manifest.deepspeed and (before := manifest.deepspeed[key]) != value:
            found[f"deepspeed.{key}"] = {"before": before, "after": value}
            logger.warning(
                "deepspeed.%s is left to DeepSpeed, whose default was %r in %s and is %r now; to "
                "go on as before, write it into the run file",
                key,
                before,
                manifest.versions.get("deepspeed", "an earlier release"),
                value,
            )
    return found


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted key."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _differing(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    keys = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
    if not keys:
        return None
    return ", ".join(f"{k} {before.get(k)!r} before, {after.get(k)!r} now" for k in keys)


def _at(tree: dict[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value

"""Changes of the run file at a resume: some are refused, some recorded, the rest ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.formats import checkpoint as disk
from megalite.log import logger

ALLOWABLE = ("model", "tokenizer", "data", "sequence_length", "seed")
_RECORDED = (
    "objective",
    "optimizer",
    "schedule",
    "training.global_batch_size",
    "training.precision",
)


def find_changes(
    before: dict[str, Any],
    after: dict[str, Any],
    manifest: disk.CheckpointManifest,
    data_fingerprint: str,
    tokenizer_sha256: str,
) -> dict[str, Any]:
    """Return the changes by dotted key: each is a pair (before, after) or a sentence."""
    changes: dict[str, Any] = {}
    model = _differing(before["model"], after["model"])
    if model is not None:
        changes["model"] = model
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        changes["tokenizer"] = "the data was made with another tokenizer"
    lengths = before["data"]["sequence_length"], after["data"]["sequence_length"]
    if lengths[0] != lengths[1]:
        changes["sequence_length"] = f"{lengths[0]} before, {lengths[1]} now"
    seeds = [
        f"{section}.seed {before[section]['seed']} before, {after[section]['seed']} now"
        for section in ("training", "data")
        if before[section]["seed"] != after[section]["seed"]
    ]
    if seeds:
        changes["seed"] = ", ".join(seeds)
    if manifest.data_fingerprint != data_fingerprint:
        changes["data"] = "the shards, their weights or mask_documents are not the same"
    for key in _RECORDED:
        old, new = (flat({key: _at(tree, key)}) for tree in (before, after))
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                changes[name] = {"before": old.get(name), "after": new.get(name)}
    steps = before["training"]["steps"], after["training"]["steps"]
    if steps[0] != steps[1] and _depends_on_steps(after["schedule"]):
        changes["training.steps"] = {"before": steps[0], "after": steps[1]}
    return changes


def _depends_on_steps(schedule: dict[str, Any]) -> bool:
    """Return whether the learning rate depends on the length of the run."""
    return schedule["name"] == "wsd" or (
        schedule["name"] != "constant" and schedule["decay_steps"] is None
    )


def moved_defaults(manifest: disk.CheckpointManifest, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's defaults that changed with its release, and log a warning for each."""
    changes = {}
    for key, value in now.items():
        before = manifest.deepspeed.get(key, value)
        if before != value:
            changes[f"deepspeed.{key}"] = {"before": before, "after": value}
            logger.warning(
                "deepspeed.%s is not set, and DeepSpeed's default was %r in %s and is %r now; to "
                "keep the old value, set it in the run file",
                key,
                before,
                manifest.versions.get("deepspeed", "an earlier release"),
                value,
            )
    return changes


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by dotted key."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


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

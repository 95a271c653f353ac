"""The changes of the run file that a resume brings along: refused, recorded, or free."""

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
    """Return the differences by dotted key: a pair (before, after) or a sentence each."""
    found: dict[str, Any] = {}
    model = _differing(before["model"], after["model"])
    if model is not None:
        found["model"] = model
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
        old, new = (flat({key: _at(tree, key)}) for tree in (before, after))
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                found[name] = {"before": old.get(name), "after": new.get(name)}
    steps = before["training"]["steps"], after["training"]["steps"]
    if steps[0] != steps[1] and _follows_steps(after["schedule"]):
        found["training.steps"] = {"before": steps[0], "after": steps[1]}
    return found


def _follows_steps(schedule: dict[str, Any]) -> bool:
    """Return whether another length of the run makes other learning rates."""
    return schedule["name"] == "wsd" or (
        schedule["name"] != "constant" and schedule["decay_steps"] is None
    )


def moved_defaults(manifest: disk.CheckpointManifest, now: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own defaults that another release has set otherwise; each with a warning."""
    found = {}
    for key, value in now.items():
        before = manifest.deepspeed.get(key, value)
        if before != value:
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
    """Return the values of nested sections by dotted key."""
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

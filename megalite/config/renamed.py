"""Keys of the run file that were renamed: the old names are read, the new ones are written."""

from __future__ import annotations

from typing import Any

# (section, old name) -> new name
_RENAMED = {
    ("training", "drift_every"): "replica_check_every",
    ("checkpoint", "grace_seconds"): "stop_grace_seconds",
}


def current_name(section: str, name: str) -> str:
    """Return today's name of a section's key."""
    return _RENAMED.get((section, name), name)


def rename_keys(raw: dict[str, Any]) -> dict[str, str]:
    """Rename old keys in `raw`, in place.

    A key that stands under both names stays: `conflicts` reports it.

    Returns:
        the new dotted key of each old one that was renamed.
    """
    renamed = {}
    for (section, old), new in _RENAMED.items():
        values = raw.get(section)
        if isinstance(values, dict) and old in values and new not in values:
            # in its old position, so that what lists the keys of a file keeps their order
            raw[section] = {(new if key == old else key): value for key, value in values.items()}
            renamed[f"{section}.{old}"] = f"{section}.{new}"
    return renamed


def conflicts(raw: dict[str, Any]) -> list[str]:
    """Return a fault for each key of `raw` that stands under both names; remove the old one."""
    faults = []
    for (section, old), new in _RENAMED.items():
        values = raw.get(section)
        if isinstance(values, dict) and old in values and new in values:
            faults.append(
                f"{section}.{old}: the old name of {section}.{new}, which is set, too; remove "
                f"{section}.{old}"
            )
            del values[old]  # otherwise it would be an unknown key besides
    return faults

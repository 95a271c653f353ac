"""Renamed keys of the run file: old names are read, new names are written."""

from __future__ import annotations

from typing import Any

# (section, old name) -> new name
_RENAMED = {
    ("training", "drift_every"): "replica_check_every",
    ("checkpoint", "grace_seconds"): "stop_grace_seconds",
}


def current_name(section: str, name: str) -> str:
    """Return the current name of a section's key."""
    return _RENAMED.get((section, name), name)


def rename_keys(raw: dict[str, Any]) -> dict[str, str]:
    """Rename old keys in `raw`, in place.

    If a section has both the old and the new name, nothing is renamed; `conflicts` reports that.

    Returns:
        the new dotted key of each old key that was renamed.
    """
    renamed = {}
    for (section, old), new in _RENAMED.items():
        values = raw.get(section)
        if isinstance(values, dict) and old in values and new not in values:
            # at the same position, so that the order of the keys does not change
            raw[section] = {(new if key == old else key): value for key, value in values.items()}
            renamed[f"{section}.{old}"] = f"{section}.{new}"
    return renamed


def conflicts(raw: dict[str, Any]) -> list[str]:
    """Return a fault for each key that `raw` has under both names, and remove the old one."""
    faults = []
    for (section, old), new in _RENAMED.items():
        values = raw.get(section)
        if isinstance(values, dict) and old in values and new in values:
            faults.append(
                f"{section}.{old}: the old name of {section}.{new}, which is also set; remove "
                f"{section}.{old}"
            )
            del values[old]  # otherwise it would also be reported as unknown
    return faults

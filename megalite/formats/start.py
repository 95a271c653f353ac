"""The model folder that a fresh run starts from."""

from __future__ import annotations

from pathlib import Path

from megalite import hub
from megalite.formats import checkpoint


def find_start(name: str | None, root: Path | None, option: str = "--init-from") -> str | None:
    """Return the folder that a fresh run starts from.

    Args:
        name: a folder or a name on the hub. None is returned unchanged.
        root: the folder of the run's checkpoints. If it has any, the run continues from them and
            `name` is returned unchanged. None means that the run always starts fresh.
    Raises:
        CommandError: there is no such folder or model, or the hub cannot be reached.
    """
    if name is None or (root is not None and checkpoint.published(root)):
        return name
    return str(hub.find_model(name, option))

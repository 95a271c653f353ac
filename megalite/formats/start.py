"""The model folder that a fresh run starts from."""

from __future__ import annotations

from pathlib import Path

from megalite import hub
from megalite.formats import checkpoint


def find_start(name: str | None, root: Path | None, option: str = "--init-from") -> str | None:
    """Return the folder that a fresh run starts from.

    Args:
        name: a folder, a name on the hub, or None, which is returned.
        root: the run's checkpoints. If there are any, the run continues from them, and `name` is
            returned unchanged. None means a fresh start in any case.
    Raises:
        CommandError: no such folder or model, or a hub out of reach.
    """
    if name is None or (root is not None and checkpoint.published(root)):
        return name
    return str(hub.find_model(name, option))

"""Work that the first rank of each host does for the host's other ranks, before they can talk.

The first rank leaves its result in a file, the note. While it works, it renews the note, so that
the others can distinguish a long download from a dead rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite import files
from megalite.errors import CommandError
from megalite.hub import foreign

_POLL = 0.1  # seconds
_RENEWAL = 10.0  # seconds between two signs of life
_STARTED = time.time()
_LAG = 120.0  # seconds that one rank of a host may start after another
_SILENCE = _LAG + 6 * _RENEWAL  # seconds without a sign of life, after which the rank is given up


def share_folder(note: Path, is_first: bool, find: Callable[[], Path], what: str) -> Path:
    """Return the folder that `find` returns on the first rank of this host.

    Args:
        note: a file of this host and this start, below the cache's `.locks/megalite`.
        find: called on the first rank only.
        what: how messages call the folder.
    Raises:
        CommandError: on all ranks, as `find` raises it; on the others, if the first rank is silent.
    """
    if not is_first:
        return _await(note, what)
    with suppress(OSError):
        note.unlink()
    try:
        _leave(note, {})
        with files.repeating(
            lambda: _leave(note, {}), every=_RENEWAL, ignored=CommandError
        ):  # signs of life
            folder = find()
    except CommandError as error:
        _leave(note, {"error": str(error)})
        raise
    _leave(note, {"folder": str(folder)})
    return folder


def _leave(note: Path, content: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(note, content | {"time": time.time()})
    except OSError as error:
        raise CommandError(
            f"the hub's cache {note.parents[2]} cannot be written: {error}; name another with "
            "HF_HOME"
        ) from None


def _await(note: Path, what: str) -> Path:
    """Wait for the first rank's result."""
    last = None
    seen = time.monotonic()
    while True:
        content = foreign.read_object(note)
        if content.get("time") != last:
            last = content.get("time")
            seen = time.monotonic()
        age = _STARTED - float(content.get("time", 0.0))
        if "folder" in content and age < _LAG:
            return Path(str(content["folder"]))
        if "error" in content and age < 0:  # not that of an earlier start
            raise CommandError(str(content["error"]))
        if time.monotonic() - seen > _SILENCE:
            raise CommandError(
                f"{what}: the first rank of this host fetches it for all, and has given no sign of "
                f"life for {_SILENCE:.0f} s; find out from its log why it died, and start again"
            )
        time.sleep(_POLL)

"""Work that the first rank of each host does for its other ranks, before they form a group.

The first rank writes its result to a file, the note. While it works, it rewrites the note every few
seconds, so that the others can distinguish a long download from a dead rank.
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
_RENEWAL = 10.0  # seconds between heartbeats
_STARTED = time.time()
_LAG = 120.0  # seconds that one rank of a host may start after another
_SILENCE = _LAG + 6 * _RENEWAL  # seconds without a heartbeat after which the rank counts as dead


def share_folder(note: Path, is_first: bool, find: Callable[[], Path], name: str) -> Path:
    """Return the folder that `find` returns on the first rank of this host.

    Args:
        note: a file for this host and this start, in the cache's `.locks/megalite`.
        find: function that only the first rank calls.
        name: name of the folder in messages.
    Raises:
        CommandError: on all ranks, if `find` raises it; on the other ranks, if the first rank died.
    """
    if not is_first:
        return _await(note, name)
    with suppress(OSError):
        note.unlink()
    try:
        _write_note(note, {})
        with files.repeating(
            lambda: _write_note(note, {}), every=_RENEWAL, ignored=CommandError
        ):  # the heartbeat
            folder = find()
    except CommandError as error:
        _write_note(note, {"error": str(error)})
        raise
    _write_note(note, {"folder": str(folder)})
    return folder


def _write_note(note: Path, content: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(note, content | {"time": time.time()})
    except OSError as error:
        raise CommandError(
            f"the hub's cache {note.parents[2]} cannot be written: {error}; set HF_HOME to another "
            "folder"
        ) from None


def _await(note: Path, name: str) -> Path:
    """Wait for the first rank's result and return it."""
    last = None
    last_change = time.monotonic()
    while True:
        content = foreign.read_object(note)
        if content.get("time") != last:
            last = content.get("time")
            last_change = time.monotonic()
        age = _STARTED - float(content.get("time", 0.0))
        if "folder" in content and age < _LAG:
            return Path(str(content["folder"]))
        if "error" in content and age < 0:  # written after this rank started
            raise CommandError(str(content["error"]))
        if time.monotonic() - last_change > _SILENCE:
            raise CommandError(
                f"{name}: the first rank of this host fetches it for all, and has given no sign of "
                f"life for {_SILENCE:.0f} s; read in its log why it died, and start again"
            )
        time.sleep(_POLL)

"""The lease of a run folder: only the newest start of a run may write into the folder.

A scheduler may start a job again while ranks of the last start still run on an unreachable node.
Both would write the same files. The start that took the lease last may write; every older one ends
with exit code 3.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from megalite import env, files
from megalite.errors import CommandError, Superseded
from megalite.parallel import Grid

_NAME = ".lease.json"
_CHECK_SECONDS = 1.0  # between reads of the lease, each a request on a network file system
_TRIES = 3


class Lease:
    """A claim on a run folder, written by rank 0 and checked before every change of the folder.

    Raises:
        OSError: the claim cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / _NAME
        self._nonce = secrets.token_hex(16)
        self._last_check = time.monotonic()
        self._newer: dict[str, object] | None = None  # the claim of a newer start, if there is one
        job = env.job()
        owner = {"job": job.id, "restart_count": job.restart_count, "nonce": self._nonce}
        root.mkdir(parents=True, exist_ok=True)
        for left in reversed(range(_TRIES)):
            try:
                files.write_json(self._path, owner)
                return
            except FileNotFoundError:  # another start has removed our partial file
                if not left:
                    raise

    def check(self) -> None:
        """Raise Superseded if a newer start has taken the lease. A lost lease never returns."""
        self._newer = owner = self._newer or self._owner()
        if owner is not None:
            raise Superseded(
                f"{self._path.parent} is owned by a newer start of this run (job "
                f"{owner.get('job') or 'none'}, restart {owner.get('restart_count')}): this one "
                "publishes nothing and ends"
            )

    def is_lost(self) -> bool:
        """Return whether a newer start has taken the lease. The answer may be a second old."""
        if self._newer is None and time.monotonic() - self._last_check >= _CHECK_SECONDS:
            self._last_check = time.monotonic()
            self._newer = self._owner()
        return self._newer is not None

    def _owner(self) -> dict[str, object] | None:
        """Return the claim of another start, or None if there is none or it is unreadable."""
        try:
            owner = files.read_json(self._path)
            return None if owner["nonce"] == self._nonce else dict(owner)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def take_lease(root: Path, grid: Grid) -> Lease | None:
    """Take the lease of a run folder; a collective.

    Returns:
        the lease on rank 0, None on the other ranks.
    Raises:
        CommandError: on every rank, if rank 0 cannot write into the folder.
    """
    lease, fault = None, None
    if grid.rank == 0:
        try:
            lease = Lease(root)
        except OSError as error:
            fault = f"the run folder {root.parent} cannot be written: {error}"
            for folder in (root, root.parent):  # remove folders that this start created
                with suppress(OSError):  # not empty
                    folder.rmdir()
    if fault := grid.all_gather_objects(fault)[0]:
        raise CommandError(f"{fault}; make room or set its permissions, or name another directory")
    return lease

"""Who may publish into a run folder: the newest incarnation of the run, and no other.

A scheduler may start a job again while ranks of its last start still run on a node it has lost
sight of. Both would save under the same names; only the one that wrote the lease last may.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from megalite import env, files
from megalite.errors import Superseded

_NAME = ".lease.json"


class Lease:
    """Taken by rank 0 when a run starts, checked before every publication."""

    def __init__(self, root: Path) -> None:
        self._path = root / _NAME
        self._nonce = secrets.token_hex(16)
        job = env.job()
        owner = {"job": job.id, "restart_count": job.restart_count, "nonce": self._nonce}
        files.write_json(self._path, owner)

    def check(self) -> None:
        """Raises Superseded where a newer start has taken the lease since."""
        try:
            owner = files.read_json(self._path)
            nonce = owner["nonce"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # lost, not taken: nobody else claims the folder
        if nonce != self._nonce:
            raise Superseded(
                f"{self._path.parent} is owned by a newer start of this run (job "
                f"{owner.get('job') or 'none'}, restart {owner.get('restart_count')}): this one "
                "publishes nothing and ends"
            )

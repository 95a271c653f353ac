"""Every error MegaLite raises on purpose, and the exit code each one ends a process with.

    MegaLiteError               1   something failed; the run folder says what
    ├── UserError               2   the user's to mend; raised before anything is written
    │   ├── ConfigError         2   a run file, or two keys of it that contradict each other
    │   ├── DataError           2   shards, corpora, tokenizers
    │   ├── CommandError        2   command-line arguments
    │   │   └── OtherVersion    2   a checkpoint of a MegaLite that writes another format
    │   └── LaunchError         2   ranks, hosts and devices as the launcher handed them over
    ├── CheckpointError         1   a checkpoint that is damaged or cannot be written
    │   ├── NoSpace             1   the disk has no room for it; nothing was begun
    │   └── DamagedCheckpoint   1   its bytes are not those that were written: another may be
    ├── EngineError             1   the engine does something else than it was told
    ├── Stopped                75   a signal ended the run; it can be resumed (EX_TEMPFAIL)
    └── Superseded              3   a newer incarnation of the same job owns the run folder

A message says what was asked, what was found and what to do about it. Broken invariants are
assertions, not errors of this tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MegaLiteError(Exception):
    """The root: caught once, by `megalite.log.run_main`, and printed without a traceback."""

    exit_code = 1


class UserError(MegaLiteError):
    """The user's to mend. Found before the run folder is opened, so nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """One or more faults of a run file, all of them at once."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(UserError):
    """A corpus, a shard folder or a tokenizer that cannot be used."""


class CommandError(UserError):
    """Arguments of a command that do not go together."""


class OtherVersion(CommandError):
    """A checkpoint that is whole, but of a version of MegaLite that keeps other things in it."""


class LaunchError(UserError):
    """Ranks, hosts or devices that are half set or contradict each other."""


class CheckpointError(MegaLiteError):
    """A checkpoint that is damaged, incomplete, or could not be written."""


class NoSpace(CheckpointError):
    """A checkpoint that the disk has no room for, found before anything was written."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes turned out, as they were loaded, to be others than were written."""


class EngineError(MegaLiteError):
    """The training engine reports a value other than the one it was given."""


class Stopped(MegaLiteError):
    """A signal ended the run after a save; the same command resumes it."""

    exit_code = 75


class Superseded(MegaLiteError):
    """A newer incarnation of this job owns the run folder; this one must not publish."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint `; did you mean "x"?` for a misspelt name, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{found[0]}"?' if found else ""

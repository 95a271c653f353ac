"""Every error MegaLite raises on purpose, and the exit code each one ends a process with.

    MegaLiteError               1   something failed; the run folder says what
    ├── UserError               2   a user error; raised before anything is written
    │   ├── ConfigError         2   a run file, or two keys of it that contradict each other
    │   ├── DataError           2   shards, corpora, tokenizers
    │   ├── CommandError        2   command-line arguments
    │   │   └── OtherVersion    2   a checkpoint of a MegaLite that writes another format
    │   └── LaunchError         2   ranks, hosts and devices as the launcher handed them over
    ├── CheckpointError         1   a checkpoint that is damaged or cannot be written
    │   ├── NoSpace             1   the disk has no room for it; nothing was begun
    │   └── DamagedCheckpoint   1   its bytes are not those that were written: another may be
    ├── EngineError             1   the engine does not do what was requested
    ├── Stopped                75   a signal ended the run; it can be resumed (EX_TEMPFAIL)
    └── Superseded              3   a newer incarnation of the same job owns the run folder

A message states the request, the finding and the remedy. Broken invariants are
assertions, not errors of this tree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence


class MegaLiteError(Exception):
    """The root: caught once, by `megalite.cli.run_main`, and printed without a traceback."""

    exit_code = 1


class UserError(MegaLiteError):
    """A user error. Found before the run folder is opened, so nothing was written."""

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


_TYPO = 0.7  # similarity of two words that differ by a typing error


def nearest(
    name: str, known: Iterable[str], shown: Callable[[str], str] = lambda found: found
) -> str:
    """Return the hint `; did you mean "x"?` for a misspelt name, or an empty string.

    Word for word: `save_steps` is not a misspelt `steps`, and `warmup_ratio` no `warmup_steps`.

    Args:
        shown: how to write the name that is meant.
    """
    matches = difflib.get_close_matches(name, list(known), n=5, cutoff=0.6)
    found = next((match for match in matches if _is_typo(name, match)), None)
    return f'; did you mean "{shown(found)}"?' if found else ""


def _is_typo(name: str, meant: str) -> bool:
    words, others = (re.split(r"[_\-. ]+", text.lower()) for text in (name, meant))
    if len(words) != len(others):
        return difflib.SequenceMatcher(None, "".join(words), "".join(others)).ratio() >= 0.9
    pairs = zip(words, others, strict=True)
    return all(difflib.SequenceMatcher(None, *pair).ratio() >= _TYPO for pair in pairs)

"""The errors that MegaLite raises deliberately, and their exit codes.

    MegaLiteError               1   something failed; the run folder states what
    ├── UserError               2   a user error; raised before anything is written
    │   ├── ConfigError         2   invalid keys of a run file, or keys that contradict each other
    │   ├── DataError           2   invalid shards, corpora or tokenizers
    │   ├── CommandError        2   invalid command-line arguments
    │   │   └── OtherVersion    2   a checkpoint in the format of another version of MegaLite
    │   └── LaunchError         2   an incomplete or contradicting launch: ranks, hosts, devices
    ├── CheckpointError         1   a checkpoint that is damaged or cannot be written
    │   ├── NoSpace             1   the disk has no room for a checkpoint; nothing was written
    │   └── DamagedCheckpoint   1   a checkpoint's bytes are not those that were written
    ├── EngineError             1   the engine uses another value than the requested one
    ├── Stopped                75   a signal ended the run, which can be resumed (EX_TEMPFAIL)
    └── Superseded              3   a newer start of the same job owns the run folder

A message states a fact, numbers and the remedy. Broken invariants are assertions, not errors of
this tree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence


class MegaLiteError(Exception):
    """The root. `megalite.cli.run_main` catches it and prints it without a traceback."""

    exit_code = 1


class UserError(MegaLiteError):
    """A user error, raised before the run folder is opened, so that nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """All faults of a run file, one line each."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(UserError):
    """A corpus, a shard folder or a tokenizer that cannot be used."""


class CommandError(UserError):
    """Invalid arguments of a command."""


class OtherVersion(CommandError):
    """An intact checkpoint in the format of another version of MegaLite."""


class LaunchError(UserError):
    """Incomplete or contradicting descriptions of ranks, hosts or devices."""


class CheckpointError(MegaLiteError):
    """A checkpoint that is damaged, incomplete, or could not be written."""


class NoSpace(CheckpointError):
    """A checkpoint that the disk has no room for, noticed before anything was written."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes are not those that were written, noticed while loading it."""


class EngineError(MegaLiteError):
    """The training engine reports another value than the requested one."""


class Stopped(MegaLiteError):
    """A signal ended the run after a save; the same command resumes it."""

    exit_code = 75


class Superseded(MegaLiteError):
    """A newer start of this job owns the run folder, so this one must not publish anything."""

    exit_code = 3


_TYPO = 0.7  # least similarity of two words that differ by a typing error


def nearest(
    name: str, candidates: Iterable[str], shown: Callable[[str], str] = lambda match: match
) -> str:
    """Return the hint `; did you mean "x"?` for a misspelt name, or an empty string.

    Names are compared word by word: `save_steps` is not a misspelt `steps`.

    Args:
        name: the name that does not exist.
        candidates: the names that exist.
        shown: returns the text of a name in the hint.
    """
    matches = difflib.get_close_matches(name, list(candidates), n=5, cutoff=0.6)
    nearest_match = next((match for match in matches if _is_typo(name, match)), None)
    return f'; did you mean "{shown(nearest_match)}"?' if nearest_match else ""


def _is_typo(name: str, meant: str) -> bool:
    words, others = (re.split(r"[_\-. ]+", text.lower()) for text in (name, meant))
    if len(words) != len(others):
        return difflib.SequenceMatcher(None, "".join(words), "".join(others)).ratio() >= 0.9
    pairs = zip(words, others, strict=True)
    return all(difflib.SequenceMatcher(None, *pair).ratio() >= _TYPO for pair in pairs)

"""The end of a start in words: its state for status.json, and the reason."""

from __future__ import annotations

import re

from megalite.errors import MegaLiteError, Stopped, Superseded
from megalite.observe.status import State

# what gloo and NCCL say of a rank that they have lost
_LOST = re.compile(r"gloo/|closed by peer|reset by peer|remote process|Broken pipe")
# places in their sources, and gloo's advice, which ends in a picture that fonts lack
_SOURCE = re.compile(r"\[?[\w./+-]*/[\w.+-]+\.(?:cc|cpp|cu|h|hpp):\d+\]?[:,]?\s*")
_ADVICE = re.compile(r"\s*(?:This (?:may|might|could) (?:indicate|be)|GLHF).*", re.DOTALL)


def lost_rank(error: BaseException) -> MegaLiteError | None:
    """Return a collective's failure in plain words if another rank has gone, else None."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    cause = plain_cause(str(error))
    return MegaLiteError(
        "another rank no longer answers: see what ended it first, in its own output; the same "
        f"command goes on from the last checkpoint{f' ({cause})' if cause else ''}"
    )


def plain_cause(message: str) -> str:
    """Return the fact in a library's message: one line, no place in its source, no advice."""
    text = _ADVICE.sub("", _SOURCE.sub("", message)).strip()
    line = text.splitlines()[0] if text else ""
    return "".join(c for c in line if c.isprintable()).strip(" .")


def verdict(error: BaseException) -> tuple[State, str]:
    """Return the state and the reason that status.json gives for an error."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, Stopped):
        return "stopped", reason
    return ("superseded" if isinstance(error, Superseded) else "failed"), reason

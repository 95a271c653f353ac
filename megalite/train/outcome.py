"""The end of a start: its state and reason for status.json."""

from __future__ import annotations

import re

from megalite.errors import MegaLiteError, Stopped, Superseded
from megalite.observe.status import State

# messages of gloo and NCCL about a lost rank
_LOST = re.compile(r"gloo/|closed by peer|reset by peer|remote process|Broken pipe")
# source locations, and gloo's advice, which ends in an emoji that fonts may lack
_SOURCE = re.compile(r"\[?[\w./+-]*/[\w.+-]+\.(?:cc|cpp|cu|h|hpp):\d+\]?[:,]?\s*")
_ADVICE = re.compile(r"\s*(?:This (?:may|might|could) (?:indicate|be)|GLHF).*", re.DOTALL)


def lost_rank(error: BaseException) -> MegaLiteError | None:
    """Return a plain error for a collective that failed because another rank ended, else None."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    cause = plain_cause(str(error))
    return MegaLiteError(
        "another rank no longer answers: find the cause in that rank's output; the same command "
        f"resumes from the last checkpoint{f' ({cause})' if cause else ''}"
    )


def plain_cause(message: str) -> str:
    """Return the first line of a library's message, without source locations and advice."""
    text = _ADVICE.sub("", _SOURCE.sub("", message)).strip()
    line = text.splitlines()[0] if text else ""
    return "".join(c for c in line if c.isprintable()).strip(" .")


def end_state(error: BaseException) -> tuple[State, str]:
    """Return the state and reason of an error for status.json."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, Stopped):
        return "stopped", reason
    return ("superseded" if isinstance(error, Superseded) else "failed"), reason

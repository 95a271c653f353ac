"""Logging, redaction of secrets, and reports on standard output.

Rank 0 speaks for all. Logs and progress go to standard error, so that standard output belongs
to what a command reports.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from megalite import env

logger = logging.getLogger("megalite")

REDACTED = "[redacted]"
# The random part of a token: long, and no plain word, so that data/sk-wikipedia-2024 is a path.
_BODY = r"(?:[a-z]{20,}|(?=[a-z]*[0-9A-Z])[A-Za-z0-9]{16,})"
_SECRET = re.compile(
    rf"\b(?:(?:hf_|gh[pousr]_|npm_){_BODY}"
    rf"|sk-(?:[A-Za-z0-9]+-)*{_BODY}[\w-]*"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[A-Za-z0-9-]{12,}|AKIA[A-Z0-9]{12,}"
    r"|AIza[\w-]{24,}|ya29\.[\w-]{16,}|[rs]k_(?:live|test)_\w{16,}"
    r"|eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*)"  # a JSON Web Token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^/@:\s]+:[^/@\s]+(?=@)"
)
_SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:(?:api|access|secret|private)_?key|secret|passw(?:or)?d|credentials?"
    r"|(?:auth|access|api|bearer|hf|refresh|secret|session)_?token)$|^token$",
    re.IGNORECASE,
)
# C0 without tab and newline, DEL, C1, and halves of surrogate pairs, which no encoding has.
# A carriage return that ends a line does no harm; another overwrites what stands there.
# Characters that begin a command; a text file keeps the others, such as form feeds of source code.
_COMMANDS = re.compile(r"[\x1b\x80-\x9f\ud800-\udfff]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


def setup(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send this process's messages to standard error: rank 0 from `level` up, others errors."""
    logger.handlers.clear()
    handler = _StandardError(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Redacting(f"{prefix}%(levelname_lower)s%(message)s"))
    handler.addFilter(_lower_level)
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False


@contextmanager
def shown(rank: int) -> Iterator[None]:
    """Show this process's messages on standard error during a block, as `setup` does.

    A program that has added a handler to the logger keeps its own settings.
    """
    if logger.handlers:
        yield
        return
    level = logger.level
    propagate = logger.propagate
    setup(rank=rank)
    try:
        yield
    finally:
        logger.handlers.clear()
        logger.setLevel(level)
        logger.propagate = propagate


def add_file(path: Path) -> logging.Handler:
    """Append this process's messages, with times, to the run's `log.txt`."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    return handler


class _StandardError(logging.StreamHandler[TextIO]):
    """Standard error; if it leads to a full disk, its lines are lost without a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _LogFile(logging.FileHandler):
    """The run's `log.txt`: a full disk costs lines of it, reported once, and not the run."""

    _complained = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._complained:
            self._complained = True  # before the warning, which comes here, too
            logger.warning("%s cannot be written: %s; the run goes on", self.baseFilename, error)

    def close(self) -> None:
        with suppress(OSError):  # lines that never found room
            super().close()


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text: str = redact(super().format(record))
        return printable(text)


def redact(value: Any) -> Any:
    """Return a JSON value, or a text, without what opens accounts: tokens, keys, passwords in URLs.

    They are recognised by their form, by the environment variables that hold them, and by their
    keys. Only what is read by people is redacted: values that a run needs are never changed.
    """
    if isinstance(value, str):
        for secret in env.secrets():
            value = value.replace(secret, REDACTED)
        return _SECRET.sub(REDACTED, value)
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret(item, key=key) else redact(item)
            for key, item in value.items()
        }
    return [redact(item) for item in value] if isinstance(value, list | tuple) else value


def is_secret(value: Any, *, key: str = "") -> bool:
    """Return whether a value is a text that holds a secret, or stands under a secret's name."""
    if not isinstance(value, str) or not value:
        return False
    return _SECRET_KEY.search(key) is not None or redact(value) != value


def printable(text: str, *, terminal: bool = True) -> str:
    r"""Return a text that a terminal cannot take for commands: ESC becomes `\x1b`.

    Tabs and line ends stay. Text that comes from elsewhere (a model, a document, a file's name)
    goes through this function before it is printed.

    Args:
        terminal: if false, the text goes to a file or a pipe: only what would begin a command on a
            terminal later (ESC, C1) is replaced.
    """
    return (_CONTROLS if terminal else _COMMANDS).sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable_pieces(pieces: Iterable[str], *, terminal: bool = True) -> Iterator[str]:
    """Yield the pieces of one text as `printable` has the whole, wherever a line end is cut."""
    held = ""
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""
        yield printable(text.removesuffix("\r"), terminal=terminal)
    yield printable(held, terminal=terminal)


def write_report(report: Any, *, as_json: bool = False) -> None:
    """Write a command's report to standard output: a text as it is printable, or one JSON object.

    The JSON is strict: numbers that it lacks (nan, inf) are null.
    """
    if as_json:
        text = json.dumps(finite(report), allow_nan=False) + "\n"
    else:
        text = encodable(printable(str(report)))
    sys.stdout.write(text)


def encodable(text: str) -> str:
    """Return a text with question marks for what standard output's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def finite(value: Any) -> Any:
    """Return a JSON value whose numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def remove(handler: logging.Handler | None) -> None:
    """Take back what `add_file` added."""
    if handler is not None:
        logger.removeHandler(handler)
        handler.close()


def _lower_level(record: logging.LogRecord) -> bool:
    plain = record.levelno < logging.WARNING
    record.levelname_lower = "" if plain else f"{record.levelname.lower()}: "
    return True

"""Logging, redaction of secrets, and reports on standard output.

Rank 0 logs for all ranks. Logs and progress go to standard error, so that standard output has only
a command's report.
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
# The random part of a token: long, and not a plain word. So data/sk-wikipedia-2024 is no secret.
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
# Characters that begin a command of a terminal, and halves of surrogate pairs, which no encoding
# has. A text file may contain other controls, such as form feeds of source code.
_COMMANDS = re.compile(r"[\x1b\x80-\x9f\ud800-\udfff]")
# The same, C0 except tab and newline, and DEL. A carriage return is harmless at the end of a line;
# elsewhere it lets the following text overwrite the line.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


def setup(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send messages to standard error: on rank 0 from `level` up, on other ranks errors only."""
    logger.handlers.clear()
    handler = _StandardError(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_Redacting(f"{prefix}%(levelname_lower)s%(message)s"))
    handler.addFilter(_lower_level)
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False


@contextmanager
def show_messages(rank: int) -> Iterator[None]:
    """Send messages to standard error during a block, as `setup` does.

    If a program has added a handler to the logger, its settings stay.
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
    """Standard error. If it is a file on a full disk, lines are lost without a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _LogFile(logging.FileHandler):
    """The run's `log.txt`. If the disk is full, lines are lost, with one warning."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True  # first, because the warning itself fails here as well
            logger.warning("%s cannot be written: %s; the run goes on", self.baseFilename, error)

    def close(self) -> None:
        with suppress(OSError):  # the last lines may not fit on the disk
            super().close()


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text: str = redact(super().format(record))
        return printable(text)


def redact(value: Any) -> Any:
    """Return a JSON value, or a text, without secrets: tokens, keys and passwords in URLs.

    A secret is recognised by its form, by its key, or because an environment variable contains it.
    Only output for people is redacted. Values that a run needs are never changed.
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
    """Return whether a value is a text that contains a secret, or whose key names a secret."""
    if not isinstance(value, str) or not value:
        return False
    return _SECRET_KEY.search(key) is not None or redact(value) != value


def printable(text: str, *, terminal: bool = True) -> str:
    r"""Escape the control characters of a text, which a terminal would execute: ESC is `\x1b`.

    Tabs and line ends stay. Text from other sources (a model, a document, a file name) must pass
    through this function before it is printed.

    Args:
        text: the text.
        terminal: if false, the text goes to a file or a pipe, and only characters that begin a
            command (ESC, C1) are replaced.
    """
    return (_CONTROLS if terminal else _COMMANDS).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable_pieces(pieces: Iterable[str], *, terminal: bool = True) -> Iterator[str]:
    """Yield the pieces of a text so that their sum is `printable` of the whole text.

    A carriage return at the end of a piece is emitted with the next piece.
    """
    pending = ""
    for piece in pieces:
        text = pending + piece
        pending = "\r" if text.endswith("\r") else ""
        yield printable(text.removesuffix("\r"), terminal=terminal)
    yield printable(pending, terminal=terminal)


def write_report(report: Any, *, as_json: bool = False) -> None:
    """Write a command's report to standard output, as printable text or as one JSON object.

    In JSON, numbers that are not finite are null.
    """
    if as_json:
        text = json.dumps(replace_nonfinite(report), allow_nan=False) + "\n"
    else:
        text = encodable(printable(str(report)))
    sys.stdout.write(text)


def encodable(text: str) -> str:
    """Return a text with question marks for characters that standard output cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def replace_nonfinite(value: Any) -> Any:
    """Return a JSON value with null for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    return value


def remove(handler: logging.Handler | None) -> None:
    """Remove and close the handler of `add_file`."""
    if handler is not None:
        logger.removeHandler(handler)
        handler.close()


def _lower_level(record: logging.LogRecord) -> bool:
    plain = record.levelno < logging.WARNING
    record.levelname_lower = "" if plain else f"{record.levelname.lower()}: "
    return True

"""Logging, and the one place that ends a process: `run_main` turns an error into its exit code.

Rank 0 speaks for all. Logs and progress go to standard error, so that standard output belongs
to what a command reports.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from megalite import env
from megalite.errors import LaunchError, MegaLiteError, Stopped, UserError

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
# What begins a command; a file of text keeps the others, such as form feeds of source code.
_COMMANDS = re.compile(r"[\x1b\x80-\x9f\ud800-\udfff]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")
# metavars of paths
_PATHS = {"CHECKPOINT", "DIR", "FILE", "FOLDER", "INPUT", "PATH", "RUN"}
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_GRACE_FOR_RANK_0 = 10.0  # seconds


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
    """Whether a value is a text that holds a secret, or stands under a secret's name."""
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


class CommandParser(argparse.ArgumentParser):
    """A parser that expands `~` in paths, also where a shell does not (`--output=~/page.html`).

    An argument is a path if its metavar says so.
    """

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        found, rest = super().parse_known_args(*arguments, **keywords)
        for action in self._actions:
            if isinstance(action.metavar, str) and _PATHS & set(re.split(r"\W", action.metavar)):
                value = getattr(found, action.dest, None)
                if isinstance(value, list):
                    setattr(found, action.dest, [_expand(item) for item in value])
                elif value is not None:
                    setattr(found, action.dest, _expand(value))
        return found, rest


def _expand(path: str | Path) -> str | Path:
    return type(path)(env.expand_user(str(path)))


def command_parser(about: str | None, examples: str) -> CommandParser:
    """The parser of a command whose help ends in examples, left as they are laid out."""
    plain = argparse.RawDescriptionHelpFormatter
    return CommandParser(description=about, epilog=examples, formatter_class=plain)


def _launched_rank() -> int:
    return env.find_launch().rank


def run_main(
    main: Callable[[], int | None],
    *,
    ranks: bool = False,
    find_rank: Callable[[], int] = _launched_rank,
) -> None:
    """Run a command and leave with its exit code; an error of ours is a line, not a traceback.

    `ranks` says that the command talks to other ranks. The process then ends without the
    interpreter's teardown: gloo's threads outlive Python's, and one that wants the interpreter
    while it is torn down aborts the process (seen in 1 of 6 runs); a finished run would count as
    crashed.

    Every rank finds the same user error. Rank 0 prints it; the others wait for the launcher to
    end them, or the first to leave would take rank 0 along before it has spoken.
    """
    os.umask(os.umask(0o077) | 0o002)  # nothing written is everyone's to change
    try:
        rank = find_rank()
    except LaunchError:
        rank = 0
    setup(rank=rank)
    if ranks:
        end_with_agent()
    try:
        code = main() or 0
    except UserError as error:
        if rank != 0:
            time.sleep(_GRACE_FOR_RANK_0)
        else:
            _print_error(error)
        code = error.exit_code
    except Stopped as error:  # by all ranks, as one of them was asked to: rank 0 says it
        logger.info("%s", error)
        code = error.exit_code
    except MegaLiteError as error:
        _print_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `... | head` has read enough
        _silence(sys.stdout)
        code = 141
    except Exception as error:
        code = _print_fault(error)
    code = _flush(code, ranks=ranks)
    logging.shutdown()
    if ranks:
        os._exit(code)
    sys.exit(code)


def _flush(code: int, *, ranks: bool) -> int:
    """Write out both streams and return the exit code.

    A full disk under a log costs the log. A report that could not be written is a failure; ranks
    write none.
    """
    try:
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
        return code or 141
    except OSError as error:
        _silence(sys.stdout)
        if not ranks:
            logger.error("standard output cannot be written: %s; make room", error)
            return code or 1
    return code


def _silence(stream: TextIO) -> None:
    """Send a stream that cannot be written to nowhere, so that the exit does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_with_agent() -> None:
    """Have Linux send this rank SIGTERM when torchrun's agent dies, as `kill -9` makes it.

    The agent can then end nobody: without this its ranks would train on, and hold their devices.
    A rank that gets the signal saves and stops.
    """
    if not sys.platform.startswith("linux") or not env.variable("TORCHELASTIC_RUN_ID"):
        return
    agent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != agent:  # it died before the call
            signal.raise_signal(signal.SIGTERM)


def _print_error(error: MegaLiteError) -> None:
    for line in str(error).splitlines():
        logger.error("%s", line)


def _print_fault(error: Exception) -> int:
    """Say what was not foreseen; the exit code. A package that we need is the user's to install."""
    from importlib.metadata import PackageNotFoundError, requires  # of no use to a start

    name = error.name if isinstance(error, ModuleNotFoundError) else None
    with suppress(PackageNotFoundError):
        lines = (line for line in requires("megalite") or () if ";" not in line)  # no extras
        name = name if name in {re.split(r"\W", line)[0] for line in lines} else None
    if name is not None:
        advice = "install MegaLite into it (`pip install -e .`), or start the one that has it"
        logger.error("this Python, %s, has no package %s; %s", sys.executable, name, advice)
        return UserError.exit_code
    logger.error("a fault of the program, not of its input:", exc_info=error)
    return 1


def _lower_level(record: logging.LogRecord) -> bool:
    plain = record.levelno < logging.WARNING
    record.levelname_lower = "" if plain else f"{record.levelname.lower()}: "
    return True

"""Logging, and the one place that ends a process: `run_main` turns an error into its exit code.

Rank 0 speaks for all. Logs and progress go to standard error, so that standard output belongs
to what a command reports.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from megalite import env
from megalite.errors import LaunchError, MegaLiteError, Stopped, UserError

logger = logging.getLogger("megalite")

_REDACTED = "[redacted]"
_SECRET = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}"
    r"|(?<=://)[^/@:\s]+:[^/@\s]+(?=@)"
)
_SECRET_KEY = re.compile(r"(?:^|_)(?:api_?key|access_?key|auth_token|secret|passw(?:or)?d)$", re.I)
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
        return text


def redact(value: Any) -> Any:
    """A JSON value, or a text, without what opens accounts: tokens, keys, passwords in URLs.

    Known by their form, by the environment variables that hold them, and by the keys they are
    under.
    """
    if isinstance(value, str):
        for secret in env.secrets():
            value = value.replace(secret, _REDACTED)
        return _SECRET.sub(_REDACTED, value)
    if isinstance(value, Mapping):
        return {
            key: _REDACTED if isinstance(item, str) and _SECRET_KEY.search(key) else redact(item)
            for key, item in value.items()
        }
    return [redact(item) for item in value] if isinstance(value, list | tuple) else value


def remove(handler: logging.Handler | None) -> None:
    """Take back what `add_file` added."""
    if handler is not None:
        logger.removeHandler(handler)
        handler.close()


def command_parser(about: str | None, examples: str) -> argparse.ArgumentParser:
    """The parser of a command whose help ends in examples, left as they are laid out."""
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=about, epilog=examples, formatter_class=plain)


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

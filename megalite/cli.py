"""Parsers of commands, and `run_main`, which ends a command with its exit code."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from megalite import env
from megalite.errors import LaunchError, MegaLiteError, Stopped, UserError, nearest
from megalite.log import logger, setup

_PATHS = {"CHECKPOINT", "DIR", "FILE", "FOLDER", "INPUT", "PATH", "RUN"}  # metavars for paths
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_GRACE_FOR_RANK_0 = 10.0  # seconds


def _launched_rank() -> int:
    return env.find_launch().rank


def run_main(
    main: Callable[[], int | None],
    *,
    ranks: bool = False,
    find_rank: Callable[[], int] = _launched_rank,
) -> None:
    """Run a command and end the process with its exit code.

    A `MegaLiteError` becomes one line per fault, without a traceback. All ranks raise the same user
    error, and rank 0 prints it. The other ranks wait until the launcher ends them. If one of them
    exited first, the launcher would end rank 0 before rank 0 has printed the error.

    Args:
        main: function of the command. It returns the exit code, or None for 0.
        ranks: If true, the command communicates with other ranks, and the process ends without
            the interpreter's teardown. A thread of gloo that needs the interpreter during teardown
            aborts the process (in 1 of 6 runs), and a finished run would count as crashed.
        find_rank: returns the rank of this process. Ranks other than 0 log errors only.
    """
    os.umask(os.umask(0o077) | 0o002)  # other users cannot change what is written
    try:
        rank = find_rank()
    except LaunchError:
        rank = 0
    setup(rank=rank)
    if ranks:
        end_with_agent()
    code = _flush(_exit_code(main, rank), ranks=ranks)
    logging.shutdown()
    if ranks:
        os._exit(code)
    sys.exit(code)


def _exit_code(main: Callable[[], int | None], rank: int) -> int:
    """Run `main`, report what it raised, and return the exit code."""
    try:
        return main() or 0
    except UserError as error:
        if rank != 0:
            time.sleep(_GRACE_FOR_RANK_0)
        else:
            _print_error(error)
        return error.exit_code
    except Stopped as error:  # all ranks stop when one gets a signal; rank 0 reports it
        logger.info("%s", error)
        return error.exit_code
    except MegaLiteError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _silence(sys.stdout)
        return 141
    except Exception as error:
        return _print_fault(error)


def _print_error(error: MegaLiteError) -> None:
    for line in str(error).splitlines():
        logger.error("%s", line)


def _print_fault(error: Exception) -> int:
    """Log an unexpected exception and return the exit code.

    A missing dependency of MegaLite is a user error, with advice to install it.
    """
    from importlib.metadata import PackageNotFoundError, requires  # slow, and rarely needed

    name = error.name if isinstance(error, ModuleNotFoundError) else None
    with suppress(PackageNotFoundError):
        lines = (line for line in requires("megalite") or () if ";" not in line)  # no extras
        name = name if name in {re.split(r"\W", line)[0] for line in lines} else None
    if name is not None:
        advice = "install MegaLite into it (`pip install -e .`), or use the Python that has it"
        logger.error("this Python, %s, has no package %s; %s", sys.executable, name, advice)
        return UserError.exit_code
    logger.error("internal error, not an error of the input:", exc_info=error)
    return 1


def _flush(code: int, *, ranks: bool) -> int:
    """Flush both streams and return the exit code.

    A full disk under the log loses the log only. A report that cannot be written is a failure.
    Ranks write no report.
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
    """Redirect a broken stream to the null device, so that the interpreter's exit can flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_with_agent() -> None:
    """Request SIGTERM for this rank when the process that started it dies (Linux only).

    The starter is torchrun's agent or the `megalite` command. If the starter is killed by SIGKILL,
    it cannot end its ranks, which would continue to train and occupy their devices. With SIGTERM
    the ranks save and stop.
    """
    started = env.variable("TORCHELASTIC_RUN_ID") or env.variable(env.STARTED_BY)
    if not sys.platform.startswith("linux") or not started:
        return
    agent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != agent:  # the agent died before the call
            signal.raise_signal(signal.SIGTERM)


class CommandParser(argparse.ArgumentParser):
    """Parser of a command.

    The parser expands `~` in paths, even if the shell does not (`--output=~/page.html`). `_PATHS`
    contains the metavars of paths.

    Attributes:
        first: option whose name may be omitted (`megalite plan 7b.json`). "" means none.
    """

    first = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        parsed, rest = super().parse_known_args(self._name_first(words), namespace)
        for action in self._actions:
            if isinstance(action.metavar, str) and _PATHS & set(re.split(r"\W", action.metavar)):
                value = getattr(parsed, action.dest, None)
                if isinstance(value, list):
                    setattr(parsed, action.dest, [_expand(item) for item in value])
                elif value is not None:
                    setattr(parsed, action.dest, _expand(value))
        return parsed, rest

    def _name_first(self, words: list[str]) -> list[str]:
        """Return words with `first` inserted before the first word that belongs to no option."""
        position = 0
        while self.first and position < len(words):
            word = words[position]
            if word == "--" or word.partition("=")[0] == self.first:
                break
            if not word.startswith("-"):
                return [*words[:position], self.first, *words[position:]]
            values = "" if "=" in word else self._values_of(word)
            position += 1
            while values and position < len(words) and not words[position].startswith("-"):
                if values == "?" and not words[position].isdigit():
                    break  # `--dry-run mine.json`
                position += 1
                values = values if values == "+" else ""
        return words

    def _values_of(self, option: str) -> str:
        """Return the number of values of an option: "" none, "1", "?" at most one, "+" several."""
        names = [name for name in self._option_string_actions if name.startswith(option)]
        action = self._option_string_actions[min(names, key=len)] if names else None
        if action is None or action.nargs is None:
            return "1"
        return "" if action.nargs == 0 else str(action.nargs)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not one of the choices, and suggest the nearest choice."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            advice = nearest(str(value), choices)
            fault = f"expected {', '.join(choices)}; got {str(value)!r}{advice}"
            raise argparse.ArgumentError(action, fault)


def _expand(path: str | Path) -> str | Path:
    return type(path)(env.expand_user(str(path)))


def command_parser(about: str | None, examples: str, *, first: str = "") -> CommandParser:
    """Return a parser whose help ends with `examples`, printed verbatim.

    Args:
        first: see `CommandParser`.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(description=about, epilog=examples, formatter_class=plain)
    parser.first = first
    return parser


def add_ranks(parser: CommandParser, default: str) -> None:
    """Add `--ranks`, which `megalite.commands` handles before the arguments are parsed.

    Args:
        default: text of the help about the number of ranks without the option.
    """
    parser.add_argument(
        "--ranks",
        type=_refuse_ranks,
        metavar="N",
        help=f"number of ranks that `megalite` starts on this host (default: {default})",
    )


def _refuse_ranks(value: str) -> int:
    raise argparse.ArgumentTypeError(
        f"only the command megalite starts ranks; use it, or torchrun --nproc-per-node {value}"
    )


def run_parser(about: str | None, examples: str) -> CommandParser:
    """Return the parser of a command that starts a run (pretrain and finetune)."""
    parser = command_parser(about, examples, first="--config")
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="run file (JSON or YAML); the option's name may be omitted",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the run file, such as training.steps=100; may be repeated",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): resume the run's newest intact checkpoint, or start fresh if there "
        "is none. never: start fresh, and refuse a run that has checkpoints. PATH: resume from a "
        "step folder or a run folder",
    )
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start a fresh run with the weights of a checkpoint, a Hugging Face model folder, or "
        "a model of the hub (ORG/NAME, ORG/NAME@REVISION)",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume even if KEY changed: model, tokenizer, data, sequence_length or seed; may be "
        "repeated",
    )
    parser.add_argument(
        "--dry-run",
        type=_ranks,
        nargs="?",
        const=0,
        metavar="RANKS",
        help="check shapes and communication of a step on RANKS ranks, simulated in this process, "
        "without training (default: the number of started ranks)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME|FILE",
        help="device for --dry-run: a device name of `megalite plan --gpu`, cpu, or a JSON file "
        "(default: this host's device, or GPUs if RANKS is given)",
    )
    add_ranks(parser, "one per visible GPU, or one on a CPU")
    # the deepspeed launcher appends this option; environment variables contain the same number
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _ranks(text: str) -> int:
    """Parse a number of ranks, which must be 1 or more."""
    if text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of ranks, 1 or more, got {text!r}")

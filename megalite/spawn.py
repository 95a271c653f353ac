"""Run a function or a command on N ranks of this host, each in a process of its own.

The ranks get torchrun's variables, so that `env.find_launch` describes them. Parity, tests and
benchmarks start their ranks here, and a notebook can do the same.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megalite import env
from megalite.errors import MegaLiteError, Stopped, Superseded, UserError

_SHOWN_LINES = 8  # last lines of a failed rank's output
_POLL = 0.02  # seconds between two checks of the processes
# Seconds that ranks may continue after one has failed. A rank that waits for rank 0 to print a user
# error ends after 10 (`megalite.cli`), and a save in progress should complete.
_GRACE = 30.0
_ENDS = tuple(error.exit_code for error in (UserError, Superseded, Stopped))
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class RankError(MegaLiteError):
    """A rank failed, or ranks did not finish in time.

    Attributes:
        code: exit code of the failed rank's process. None if it raised an exception, or after a
            timeout.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


def free_port() -> int:
    """Return a port that no process of this host listens on at the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RankProcess:
    """A started rank: its process, the pipe of its result, and the file of its output if any."""

    rank: int
    process: BaseProcess
    pipe: connection.Connection
    log: Path | None


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float | None = None,
    preload: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    logs: Path | None = None,
) -> list[Any]:
    """Run `function(launch, *arguments)` on every rank and return the results in order of ranks.

    Function, arguments and results are pickled. The result of a rank that ends its process with
    exit code 0 before it returns is None. If a rank fails, the others are killed.

    Args:
        timeout: seconds until all ranks must be done. None means no limit.
        preload: modules that a server process imports once. The ranks are forks of the server,
            which start at once. If empty, each rank is a new interpreter. A host with GPUs needs
            that, because DeepSpeed's import initializes CUDA, after which a process cannot fork.
        environment: variables to set in addition to those of `env.rank_environment`.
        logs: the folder of `rank_0.log`, ..., which receive the ranks' output. If None, the ranks
            write to this process's standard output and standard error.
    Raises:
        RankError: a rank failed, or not all were done in time; no process is left running.
    """
    started = start_ranks(
        function, ranks, *arguments, preload=preload, environment=environment, logs=logs
    )
    try:
        return _collect(started, timeout)
    finally:
        _end(started)


def _end(started: Sequence[RankProcess]) -> None:
    for rank in started:
        rank.process.kill()
        rank.process.join()
        rank.pipe.close()


def start_ranks(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    preload: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    logs: Path | None = None,
) -> list[RankProcess]:
    """Start the ranks of `run_ranks` without waiting for them; the arguments are the same."""
    port = free_port()
    context = _context(preload)
    started: list[RankProcess] = []
    try:
        for rank in range(ranks):
            receive, send = context.Pipe(duplex=False)
            environ = env.rank_environment(rank, ranks, port) | dict(environment or {})
            log = logs / f"rank_{rank}.log" if logs is not None else None
            args = (send, function, arguments, environ, None if log is None else str(log))
            process = context.Process(target=_be_rank, args=args, daemon=True)
            process.start()
            send.close()  # the pipe then ends when the rank's process ends
            started.append(RankProcess(rank, process, receive, log))
    except BaseException:
        _end(started)
        raise
    return started


def run_command(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    timeout: float | None = None,
    quiet: bool = False,
) -> None:
    """Run a command as every rank at once, each with its own environment.

    Args:
        environments: the complete environment of each rank, such as `env.rank_environment`.
        timeout: seconds until all must be done. None means no limit.
        quiet: if true, standard error is discarded.
    Raises:
        RankError: a rank failed, or not all were done in time; no process is left running.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    stderr = subprocess.DEVNULL if quiet else None
    started: list[subprocess.Popen[bytes]] = []
    try:
        for environ in environments:
            started.append(subprocess.Popen(command, env=dict(environ), stderr=stderr))
        while any(process.poll() is None for process in started):
            _refuse_failed(started, command)
            if time.monotonic() > deadline:
                raise RankError(f"{' '.join(command)} was not done after {timeout:.0f} s")
            time.sleep(_POLL)
        _refuse_failed(started, command)
    finally:
        for process in started:
            process.kill()
            process.wait()


def supervise(command: Sequence[str], ranks: int) -> int:
    """Run a command as every rank of this host and return one exit code for all.

    SIGTERM, SIGINT and SIGUSR1 are forwarded to every rank, so that a run is saved. If a rank
    fails, the others have `_GRACE` seconds to end; then they are killed. After a user error of rank
    0 they are killed at once, because they only wait for its message (`megalite.cli.run_main`).

    Returns:
        The code of rank 0 if it says how the run ended, as `status.json` does (2, 3 or 75); else
        that of the first rank that failed, or 0. A rank that a signal ended counts as 1, or as 128
        and the signal's number if the signal was passed on.
    """
    port = free_port()
    owner = {env.STARTED_BY: str(os.getpid())}
    environments = [
        env.rank_environment(rank, ranks, port, one_thread=False) | owner for rank in range(ranks)
    ]
    started: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        for process in started:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        for environ in environments:
            # in its own process group, so that Ctrl-C arrives once, through `pass_on`
            process = subprocess.Popen(command, env=environ, start_new_session=True)
            started.append(process)
            for number in tuple(received):  # before this rank was in the list
                process.send_signal(number)
        first = _wait_for_all(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    rank_0 = started[0].returncode
    code = rank_0 if rank_0 in _ENDS else first
    return code if code >= 0 else 128 - code if -code in received else 1


def _wait_for_all(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until every process has ended, at most `_GRACE` seconds after the first failure.

    Returns:
        The return code of the first process that failed, negative for a signal; 0 if none did.
    """
    code = 0
    deadline = math.inf
    while time.monotonic() < deadline:
        running = any(process.poll() is None for process in started)
        if not code and (code := next(filter(None, (one.returncode for one in started)), 0)):
            refused = started[0].returncode == UserError.exit_code
            deadline = time.monotonic() + (0 if refused else _GRACE)
        if not running:
            break
        time.sleep(_POLL)
    return code


def _refuse_failed(started: Sequence[subprocess.Popen[bytes]], command: Sequence[str]) -> None:
    for rank, process in enumerate(started):
        if process.returncode:
            raise RankError(
                f"rank {rank} of `{' '.join(command)}` ended with exit code {process.returncode}",
                process.returncode,
            )


def _context(preload: Sequence[str]) -> SpawnContext | ForkServerContext:
    if not preload:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _be_rank(
    pipe: connection.Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environ: Mapping[str, str],
    log: str | None,
) -> None:
    """Become a rank: run the function, and send its result or the traceback of its exception."""
    env.replace(environ)
    if log is not None:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        outcome = (True, function(env.find_launch(), *arguments))
    except SystemExit:
        raise
    except BaseException:  # pytest's failures are not subclasses of Exception
        outcome = (False, traceback.format_exc())
    pipe.send(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # exit handlers of DeepSpeed and gloo's threads can abort a finished process (`run_main`)
    os._exit(0)


def _collect(started: Sequence[RankProcess], timeout: float | None) -> list[Any]:
    """Wait for all ranks and return their results; the first failure ends the wait."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(started):
        running = [rank for rank in started if rank.rank not in results]
        left = None if timeout is None else max(0.0, deadline - time.monotonic())
        ready = connection.wait([rank.pipe for rank in running], timeout=left)
        if not ready:
            numbers = [rank.rank for rank in running]
            raise RankError(f"ranks {numbers} were not done after {timeout:.0f} s")
        for rank in running:
            if rank.pipe in ready:
                results[rank.rank] = _result(rank)
    return [results[rank.rank] for rank in started]


def _result(rank: RankProcess) -> Any:
    """Return the result of a rank that has sent one, or whose process has ended."""
    try:
        succeeded, value = rank.pipe.recv()
    except EOFError:
        rank.process.join()
        code = rank.process.exitcode
        if code == 0:
            return None
        output = "" if rank.log is None else f":\n{_last_lines(rank.log)}"
        message = f"rank {rank.rank} ended with exit code {code}{output}"
        raise RankError(message, code) from None
    if not succeeded:
        raise RankError(f"rank {rank.rank}:\n{value}")
    return value


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-_SHOWN_LINES:]) or "(no output)"

"""The worker processes of one rank."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess

from data_prep.streams import Stream
from data_prep.work_folder import PrepRun
from megalite import log
from megalite.errors import MegaLiteError

_POLL = 0.5  # seconds

Work = Callable[[PrepRun, Sequence[Stream], int], None]


class WorkerPool:
    """Pool of `count` processes that run `work(run, streams, number)` and end with the block.

    The processes are forked, which is faster, on Linux and without MPI, whose libraries do not
    support forks. Otherwise they are spawned.
    """

    def __init__(self, work: Work, run: PrepRun, streams: Sequence[Stream], count: int) -> None:
        self.idle = count == 0  # the caller must do the work
        forks = sys.platform == "linux" and "mpi4py.MPI" not in sys.modules
        context = mp.get_context("fork" if forks else "spawn")
        arguments = (work, run, streams, os.getpid())
        self._run = run
        self._processes: list[BaseProcess] = [
            context.Process(target=_be_worker, args=(*arguments, number), daemon=True)  # type: ignore[attr-defined]
            for number in range(count)
        ]

    def check(self) -> bool:
        """Return True, or raise the error of a worker that died."""
        for process in self._processes:
            if process.exitcode:
                self._run.check()  # the worker's own error, if it reported one
                raise MegaLiteError(
                    f"a worker ended with exit code {process.exitcode} (-9: killed, often for "
                    "memory); what is done is kept: start again, with fewer --workers"
                )
        return True

    def __enter__(self) -> WorkerPool:
        sys.stdout.flush()
        sys.stderr.flush()
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            if error is not None:
                process.kill()
            process.join()


def _be_worker(
    work: Work, run: PrepRun, streams: Sequence[Stream], parent: int, number: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if not log.logger.handlers:
        log.setup()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        work(run, streams, number)
    except Exception as error:
        if not isinstance(error, FileNotFoundError) or run.folder.exists():
            _fail(run, error)
    # Exit without the parent's teardown, whose threads and handlers a fork does not have.
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(0)


def _fail(run: PrepRun, error: Exception) -> None:
    if not isinstance(error, MegaLiteError):
        from_disk = isinstance(error, OSError)
        error = MegaLiteError(f"the disk refused: {error}" if from_disk else traceback.format_exc())
        log.logger.error("%s", error)  # the run's folder may be unwritable
    run.fail(error)
    os._exit(error.exit_code)


def _end_with(parent: int) -> None:
    """End this process when its parent has died, because its work would not be used."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)

"""Inputs of the loop's steps: batches, the loss's divisor, and whether to stop.

In each step the ranks sum five numbers, in one small reduction over the CPU group:

    targets       of the global batch
    tokens        of the global batch
    stop          ranks that received a stop signal
    written       checkpoints that ranks have written
    superseded    ranks that saw a newer start in the run folder

The reduction starts a step ahead, so that no rank waits for it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megalite.data import Loader, StepBatches
from megalite.log import logger
from megalite.parallel import Grid

# At Ctrl-C a terminal sends SIGINT to every rank, and torchrun sends SIGTERM shortly after.
DEBOUNCE_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class ShutdownSignal:
    """The first stop signal of this process. A later signal ends the process at once.

    Signals within `DEBOUNCE_SECONDS` of the first count as the same request. As a context manager,
    it installs signal handlers and restores the previous ones. Python delivers signals only to the
    main thread, so a run in another thread ignores them.

    Attributes:
        name: name of the signal. None means that no signal has arrived.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> ShutdownSignal:
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "the run is in a thread, which gets no signals: stop it with a hook that returns "
                "Outcome(stop=True)"
            )
            return self
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            self._first = time.monotonic()
        elif time.monotonic() - self._first > DEBOUNCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class StopPoll:
    """Check whether any rank has received a stop signal, as of the previous call.

    Evaluations and samples call it between two batches or tokens. Each call starts a reduction
    whose result the next call returns, so that no rank waits.
    """

    def __init__(self, grid: Grid, shutdown: ShutdownSignal) -> None:
        self._grid = grid
        self._shutdown = shutdown
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __call__(self) -> bool:
        """Return the result of the previous call's reduction; a collective. At first, false."""
        before = self._pending
        flag = torch.tensor([int(self._shutdown.name is not None)])
        self._pending = flag, dist.all_reduce(flag, group=self._grid.cpu_group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].item())

    def close(self) -> None:
        """Finish the pending reduction, for which other ranks may wait, and discard its result."""
        if self._pending is not None:
            self._pending[1].wait()
        self._pending = None


class StepInputs(NamedTuple):
    """A rank's batches of one step, and numbers that are identical on all ranks.

    Attributes:
        batches: micro-batches of this rank.
        targets: unmasked targets of the global batch, the divisor of its summed loss.
        stop: if true, the run stops before this step.
        written: checkpoints written so far, summed over ranks, as of the previous step.
        tokens: tokens of the global batch, without padding.
        superseded: if true, a newer start owns the run folder.
    """

    batches: StepBatches
    targets: int
    stop: bool
    written: int
    tokens: int
    superseded: bool = False


class StepIterator:
    """Iterator over the inputs of steps, one reduction ahead of the loop.

    Args:
        written: returns how many checkpoints this rank has written.
        superseded: returns whether this rank has seen a newer start in the run folder.
    """

    def __init__(
        self,
        loader: Loader,
        grid: Grid,
        shutdown: ShutdownSignal,
        *,
        written: Callable[[], int],
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._loader = loader
        self._grid = grid
        self._shutdown = shutdown
        self._written = written
        self._superseded = superseded
        self._ahead = self._start()

    def next(self) -> StepInputs:
        """Return the next step's inputs; a collective."""
        batches, sums, work = self._ahead
        self._ahead = self._start()
        work.wait()
        self._grid.count_once(sums[:2])
        targets, tokens, stop, written, superseded = sums.tolist()
        return StepInputs(
            batches=batches,
            targets=targets,
            stop=stop > 0,
            written=written,
            tokens=tokens,
            superseded=superseded > 0,
        )

    def close(self) -> None:
        """Finish the pending reduction, for which other ranks may wait, and stop reading ahead."""
        self._ahead[2].wait()
        self.abandon()

    def abandon(self) -> None:
        """Stop reading ahead, after a failure that other ranks may not share."""
        self._loader.close()

    def _start(self) -> tuple[StepBatches, torch.Tensor, Any]:
        batches = next(self._loader)
        stop = self._shutdown.name is not None
        numbers = [batches.targets, batches.tokens, stop, self._written(), self._superseded()]
        sums = torch.tensor([int(number) for number in numbers])
        return batches, sums, dist.all_reduce(sums, group=self._grid.cpu_group, async_op=True)

"""Steps as the loop consumes them: batches, the loss's divisor, and whether to stop.

Once a step the ranks agree on five numbers: the targets and the tokens of the global batch, whether
any rank was asked to stop, how many checkpoints have been written, and whether a newer start of the
run has taken its folder. They travel in one
small reduction over the CPU group, started a step ahead so that nobody waits for it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megalite.data import Loader, StepBatches
from megalite.parallel import Grid

_SAME_WISH = 5.0  # seconds
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers the first stop signal; one that comes later still ends the process at once.

    Launchers say the same thing twice: at Ctrl-C the terminal sends SIGINT to every rank, and the
    launcher SIGTERM right behind it. Signals within `_SAME_WISH` seconds are one wish. As a context
    it installs its handlers and puts the old ones back.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
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
            self.name, self._first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first > _SAME_WISH:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class Step(NamedTuple):
    """A rank's batches, and what all ranks agreed on.

    targets: the global batch's unmasked ones. stop: whether to stop instead of training on it.
    written: the sum over ranks of the checkpoints each has written, as it was a step ago. tokens:
    of the global batch, without padding. superseded: if true, a newer start owns the run folder.
    """

    batches: StepBatches
    targets: int
    stop: bool
    written: int
    tokens: int
    superseded: bool = False


class Feed:
    """Hands out a step at a time.

    Args:
        written: how many checkpoints this rank has written.
        superseded: whether this rank has seen that a newer start owns the run folder.
    """

    def __init__(
        self,
        loader: Loader,
        grid: Grid,
        stop: StopRequest,
        written: Callable[[], int],
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._loader, self._grid, self._stop, self._written = loader, grid, stop, written
        self._superseded = superseded
        self._ahead = self._begin()
        self._poll: tuple[torch.Tensor, Any] | None = None

    def next(self) -> Step:
        """The next step."""
        batches, agreed, work = self._ahead
        self._ahead = self._begin()
        work.wait()
        self._grid.count_once(agreed[:2])
        targets, tokens, stop, written, superseded = agreed.tolist()
        return Step(batches, targets, stop > 0, written, tokens, superseded > 0)

    def asked(self) -> bool:
        """Whether any rank was asked to stop, as it was a call ago; all ranks must call it."""
        before, flag = self._poll, torch.tensor([int(self._stop.name is not None)])
        self._poll = flag, dist.all_reduce(flag, group=self._grid.cpu_group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].item())

    def close(self) -> None:
        """Finish the reductions under way, which other ranks may be in, and stop reading ahead."""
        if self._poll is not None:
            self._poll[1].wait()
        self._ahead[2].wait()
        self._loader.close()

    def _begin(self) -> tuple[StepBatches, torch.Tensor, Any]:
        batches = next(self._loader)
        stop = int(self._stop.name is not None)
        numbers = [batches.targets, batches.tokens, stop, self._written(), self._superseded()]
        agreed = torch.tensor([int(number) for number in numbers])
        return batches, agreed, dist.all_reduce(agreed, group=self._grid.cpu_group, async_op=True)

"""A rank that is slower than the others, named: it sets the pace of all of them.

Ranks end a step together, since they wait for each other in it; what tells them apart is the time
of a forward pass, which a rank of data parallelism does alone. Where ranks wait within a forward
(tensor parallelism, ZeRO-3) those that wait look as slow as the one they wait for.
"""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch
from torch import nn

from megalite.parallel import Grid

_SLOW = 1.5  # times the median
_ROWS = 3  # in a row


class Stragglers:
    """Compares the ranks' forward passes of training, one before each row of metrics.jsonl."""

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        self._grid = grid
        self._begin: Any = None
        self._end: Any = None
        self._rows: dict[int, int] = {}
        if grid.world_size > 1:
            model.register_forward_pre_hook(self._enter)
            model.register_forward_hook(self._leave)

    def check(self) -> list[dict[str, Any]]:
        """Ranks that were slow in the last rows, newly so: rank, host, seconds and the median.

        A collective; the device has done its step.
        """
        if self._grid.world_size == 1 or self._end is None:
            return []
        seconds = self._seconds()
        told = self._grid.gather((seconds, socket.gethostname()))
        median = statistics.median(value for value, _ in told)
        found = []
        for rank, (value, host) in enumerate(told):
            self._rows[rank] = self._rows.get(rank, 0) + 1 if value > _SLOW * median else 0
            if self._rows[rank] == _ROWS:
                found.append({"rank": rank, "host": host, "seconds": value, "median": median})
        return found

    def _enter(self, model: nn.Module, _inputs: Any) -> None:
        if model.training:
            self._begin = _mark()

    def _leave(self, model: nn.Module, _inputs: Any, _output: Any) -> None:
        if model.training:
            self._end = _mark()

    def _seconds(self) -> float:
        begin, end = self._begin, self._end
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000


def _mark() -> Any:
    """Now, as the device counts it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

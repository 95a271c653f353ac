"""A rank that is slower than the others, named: it sets the pace of all of them.

Ranks end a step together, since they wait for each other in it; the difference between them is the
time of a forward pass, which a rank of data parallelism does alone. If ranks wait within a forward
(tensor parallelism, ZeRO-3) those that wait look as slow as the one they wait for.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from typing import Any

import torch
from torch import nn

from megalite.log import logger
from megalite.observe.metrics import Recorder
from megalite.parallel import Grid

_SLOW = 1.5  # times the median
_ROWS = 3  # in a row


class Stragglers:
    """Compares the ranks' forward passes of training, one before each row of metrics.jsonl."""

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        self._grid = grid
        self._marks: deque[Any] = deque(maxlen=2)  # the last forward's begin and end
        self._rows: dict[int, int] = {}
        if grid.world_size > 1:
            model.register_forward_pre_hook(self._mark)
            model.register_forward_hook(self._mark)

    def check(self) -> list[dict[str, Any]]:
        """Ranks that were slow in the last rows, newly so: rank, host, seconds and the median.

        A collective; the device has done its step.
        """
        if len(self._marks) < 2:
            return []
        begin, end = self._marks
        seconds = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        told = self._grid.all_gather_objects((seconds, socket.gethostname()))
        median = statistics.median(value for value, _ in told)
        found = []
        for rank, (value, host) in enumerate(told):
            self._rows[rank] = self._rows.get(rank, 0) + 1 if value > _SLOW * median else 0
            if self._rows[rank] == _ROWS:
                found.append({"rank": rank, "host": host, "seconds": value, "median": median})
        return found

    def report(self, recorder: Recorder, step: int) -> None:
        """Log and record the ranks that `check` finds; a collective."""
        for slow in self.check():
            logger.warning(
                "step %d: rank %d on %s is slow: %.3f s a forward pass, the median rank takes %.3f",
                step,
                *slow.values(),
            )
            recorder.event(step, "straggler", **slow)

    def _mark(self, model: nn.Module, *_inputs_and_output: Any) -> None:
        if model.training:
            self._marks.append(_now())


def _now() -> Any:
    """Return the time as the device counts it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

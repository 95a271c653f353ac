"""Detection of stragglers: a slow rank slows down all ranks.

Ranks finish a step together, because they wait for each other. So they are compared by the time of
the forward pass, which data-parallel ranks compute without waiting. If ranks wait within a forward
(tensor parallelism, ZeRO-3), the waiting ranks look as slow as the straggler.
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
_ROWS = 3  # consecutive rows


class Stragglers:
    """Detector that compares the ranks' forward times, once per row of metrics.jsonl."""

    def __init__(self, model: nn.Module, grid: Grid) -> None:
        self._grid = grid
        self._marks: deque[Any] = deque(maxlen=2)  # begin and end of the last forward
        self._slow_rows: dict[int, int] = {}
        if grid.world_size > 1:
            model.register_forward_pre_hook(self._mark)
            model.register_forward_hook(self._mark)

    def check(self) -> list[dict[str, Any]]:
        """Return ranks that just became stragglers: rank, host, seconds and the median.

        All ranks must call this collective, after the device has finished its step.
        """
        if len(self._marks) < 2:
            return []
        begin, end = self._marks
        seconds = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        times = self._grid.all_gather_objects((seconds, socket.gethostname()))
        median = statistics.median(value for value, _ in times)
        stragglers = []
        for rank, (value, host) in enumerate(times):
            is_slow = value > _SLOW * median
            self._slow_rows[rank] = self._slow_rows.get(rank, 0) + 1 if is_slow else 0
            if self._slow_rows[rank] == _ROWS:
                stragglers.append({"rank": rank, "host": host, "seconds": value, "median": median})
        return stragglers

    def report(self, recorder: Recorder, step: int) -> None:
        """Log and record the ranks that `check` returns. All ranks must call this collective."""
        for slow in self.check():
            logger.warning(
                "step %d: rank %d on %s is slow: its forward takes %.3f s, the median rank's %.3f",
                step,
                *slow.values(),
            )
            recorder.event(step, "straggler", **slow)

    def _mark(self, model: nn.Module, *_inputs_and_output: Any) -> None:
        if model.training:
            self._marks.append(_now())


def _now() -> Any:
    """Return the time on the device."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

"""Profiler trace of some steps: the time of each operation on the CPU and the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalite.log import logger

_ROWS = 40  # of the table, most expensive first


class Trace:
    """Recorder of a profiler trace of some steps of this rank.

    It writes `rank_00000.json.gz`, for https://ui.perfetto.dev or chrome://tracing, and
    `rank_00000.txt`, the operations by self time.

    Args:
        folder: output folder, created on the first write.
        steps: (first, last), counted from 1. None records nothing.
    """

    def __init__(self, folder: Path, rank: int, steps: tuple[int, int] | None) -> None:
        self._folder = folder
        self._name = f"rank_{rank:05d}"
        self._first, self._last = steps or (0, 0)
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Start recording if `step` is the first one. Call this before each step."""
        if self._profiler is None and self._first <= step <= self._last:
            self._profiler = torch.profiler.profile()  # on every kind of device
            self._profiler.start()

    def is_full(self, step: int) -> bool:
        """Return whether the last step is recorded, so that the trace can be closed."""
        return self._profiler is not None and step >= self._last

    def close(self) -> None:
        """Write the trace. If that fails, warn."""
        profiler = self._profiler
        self._profiler = None
        if profiler is None:
            return
        path = self._folder / f"{self._name}.json.gz"
        by = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            table = profiler.key_averages().table(
                sort_by=by, row_limit=_ROWS, max_name_column_width=80
            )
            path.with_name(f"{self._name}.txt").write_text(table + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            logger.warning("the trace cannot be written: %s; the run goes on", error)
            return
        logger.info("trace of steps %d to %d: %s", self._first, self._last, path)

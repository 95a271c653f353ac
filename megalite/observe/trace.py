"""A trace of some steps of a run: what each operation cost, on the CPU and on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalite.log import logger

_ROWS = 40  # of the table, the costliest first


class Trace:
    """Records steps `first` to `last` of this rank; between them nothing else changes.

    Writes `rank_00000.json.gz`, for https://ui.perfetto.dev or chrome://tracing, and
    `rank_00000.txt`, the operations by the time they took themselves.

    Args:
        folder: where to; made when there is something to write.
        steps: (first, last), counted from 1; None records nothing.
    """

    def __init__(self, folder: Path, rank: int, steps: tuple[int, int] | None) -> None:
        self._folder = folder
        self._name = f"rank_{rank:05d}"
        self._first, self._last = steps or (0, 0)
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Called before each step."""
        if self._profiler is None and self._first <= step <= self._last:
            self._profiler = torch.profiler.profile()  # of every kind of device there is
            self._profiler.start()

    def is_full(self, step: int) -> bool:
        """Return whether it has seen its last step and can be closed."""
        return self._profiler is not None and step >= self._last

    def close(self) -> None:
        """Write what was recorded; a trace that cannot be written ends no run."""
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
            logger.warning("the trace cannot be written: %s", error)
            return
        logger.info("a trace of the steps requested: %s", path)

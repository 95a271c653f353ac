"""Ranks on this host's CPU for the other benchmarks; each is a fresh process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megalite.spawn import run_ranks


def run_on_cpu(measure: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Run `measure(launch, *arguments)` on every rank and return the results in order of ranks.

    The cores are divided evenly among the ranks.

    Raises:
        RankError: a rank failed.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    device = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    return run_ranks(measure, ranks, *arguments, environment=device)

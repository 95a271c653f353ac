"""Start of ranks on this host's CPU for the other benchmarks, each in a new process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megalite.spawn import run_ranks


def run_on_cpu(measure: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Run `measure(launch, *arguments)` on every rank and return the results in order of ranks.

    Each rank gets an equal share of the cores.

    Raises:
        RankError: a rank failed.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    device = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    return run_ranks(measure, ranks, *arguments, environment=device)

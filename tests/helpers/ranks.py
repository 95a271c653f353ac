"""Run a function in N processes that form a world, as if a launcher had started them.

The processes are forks of a server that has imported torch and DeepSpeed once. So a world starts in
half a second instead of ten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megalite import spawn
from megalite.env import Launch

PRELOAD = ("megalite.engine.preload",)


def run_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 240.0
) -> list[Any]:
    """Run `function(launch, *arguments)` on every rank. Return the results in order of ranks.

    Raises:
        AssertionError: a rank failed, with its traceback, or the timeout passed.
    """
    try:
        return spawn.run_ranks(_run, ranks, function, *arguments, timeout=timeout, preload=PRELOAD)
    except spawn.RankError as error:
        raise AssertionError(str(error)) from None


def start_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Start `function(launch, *arguments)` on every rank. Return the processes."""
    started = spawn.start_ranks(_run, ranks, function, *arguments, preload=PRELOAD)
    return [rank.process for rank in started]


def _run(launch: Launch, function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    if launch.world_size == 1:
        launch = replace(launch, source="python")
    return function(launch, *arguments)

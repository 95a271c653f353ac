"""Run a function in N processes that form a world, as a launcher would have started them.

The processes are forks of a server that has imported torch and DeepSpeed once: a world starts in
half a second instead of ten.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megalite.engine.preload"])


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0
) -> list[Any]:
    """`function(launch, *args)` on every rank; the results in order of ranks.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or on the timeout.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_run, args=(send, function, rank, world_size, port, args), daemon=True
        )
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = mp.connection.wait(list(waiting), timeout=timeout)
        assert ready, f"ranks {sorted(waiting.values())} gave no result in {timeout:.0f} s"
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert ok, f"rank {rank}:\n{value}"
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _run(
    pipe: Any, function: Callable[..., Any], rank: int, world: int, port: int, args: tuple[Any, ...]
) -> None:
    import torch

    from megalite.env import Launch, publish_launch

    torch.set_num_threads(1)
    source = "python" if world == 1 else "torchrun"
    launch = Launch(rank, world, rank, world, "127.0.0.1", port, source)
    publish_launch(launch)
    try:
        value = function(launch, *args)
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        os._exit(0)  # DeepSpeed's and gloo's exit handlers have nothing to add


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

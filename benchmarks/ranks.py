"""A world of ranks on this host's CPU, for the scripts beside this file."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
from collections.abc import Callable
from typing import Any

from megalite import env


def run_ranks(measure: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """`measure(rank, ranks, *arguments)` in a fresh process a rank; the results in order of ranks.

    The cores are shared out evenly. A rank that dies ends the script.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(ranks):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_be, args=(send, measure, rank, ranks, port, arguments))
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise SystemExit("a rank died; its words are above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _be(
    pipe: Any, measure: Callable[..., Any], rank: int, ranks: int, port: int, arguments: Any
) -> None:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    device = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    env.replace(env.rank_environment(rank, ranks, port) | device)
    pipe.send(measure(rank, ranks, *arguments))

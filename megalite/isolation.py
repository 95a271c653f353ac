"""Isolation of a run within a process: default settings during the run, its own afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megalite import env


@contextmanager
def isolated() -> Iterator[None]:
    """Run a block with torch's default settings, and restore this process's settings afterwards.

    The function restores the environment, and torch's threads, default dtype and random states. An
    engine restores its own changes when it closes (`Engine.close`).
    """
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    with env.restored(), torch.random.fork_rng(devices):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            gc.collect()  # models and engines contain cycles
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

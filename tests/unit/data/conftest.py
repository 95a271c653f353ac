"""Token streams in memory, with the interface of a shard folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


class MemoryShards:
    """Documents of given lengths with random ids; reads from `broken_from` on fail."""

    def __init__(self, lengths: list[int], *, seed: int = 0, name: str = "memory") -> None:
        ends = np.cumsum([0, *lengths])
        self.tokens = int(ends[-1])
        self.starts = ends[:-1].astype(np.int64)
        self.ids = np.random.default_rng(seed).integers(0, 500, self.tokens).astype(np.uint16)
        self.path = name
        self.fingerprint = f"{name}-{seed}"
        self.vocab_size = 500
        self.broken_from: int | None = None

    def read(self, start: int, count: int) -> Any:
        assert start >= 0
        assert start + count <= self.tokens
        if self.broken_from is not None and start >= self.broken_from:
            raise OSError(f"{self.path}: cannot read token {start}")
        return self.ids[start : start + count]

    def document_starts(self, start: int, stop: int) -> Any:
        return self.starts[(self.starts > start) & (self.starts < stop)]


@pytest.fixture(scope="session")
def memory_shards() -> type[MemoryShards]:
    """Return the class `MemoryShards`, in session scope, as hypothesis requires."""
    return MemoryShards

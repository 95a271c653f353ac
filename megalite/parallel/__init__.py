"""Ranks, process groups, collectives, and the changes that make a model parallel."""

from megalite.parallel.apply import apply_recompute_and_compile
from megalite.parallel.grid import Grid, start, stop
from megalite.parallel.regions import make_regions, shard_config
from megalite.parallel.tensor import apply_tensor_parallel, is_counted

__all__ = [
    "Grid",
    "apply_recompute_and_compile",
    "apply_tensor_parallel",
    "is_counted",
    "make_regions",
    "shard_config",
    "start",
    "stop",
]

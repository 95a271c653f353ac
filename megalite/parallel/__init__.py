"""Ranks, process groups and collectives, and the ordered changes made to a single-device model."""

from megalite.parallel.apply import prepare
from megalite.parallel.grid import Grid, start, stop
from megalite.parallel.tensor import is_counted, local_model, split

__all__ = ["Grid", "is_counted", "local_model", "prepare", "split", "start", "stop"]

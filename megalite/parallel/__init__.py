"""Ranks, process groups and collectives, and the ordered changes made to a single-device model."""

from megalite.parallel.apply import prepare
from megalite.parallel.grid import Grid, start, stop

__all__ = ["Grid", "prepare", "start", "stop"]

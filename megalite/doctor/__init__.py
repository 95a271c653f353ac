"""Checks of a machine and of a run on it: a row each, with a remedy."""

from megalite.doctor.examine import examine
from megalite.doctor.row import Row, show

__all__ = ["Row", "examine", "show"]

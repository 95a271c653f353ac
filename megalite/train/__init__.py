"""Training: the loop, what is checked before it, and what happens around it."""

from megalite.train.options import RunOptions
from megalite.train.session import run

__all__ = ["RunOptions", "run"]

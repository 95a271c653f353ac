"""Training: the loop, what is checked before it, and what happens around it."""

from megalite.train.request import Request
from megalite.train.run import run

__all__ = ["Request", "run"]

"""Training: checks before a run, the training loop, and its hooks."""

from megalite.train.options import RunOptions
from megalite.train.session import run

__all__ = ["RunOptions", "run"]

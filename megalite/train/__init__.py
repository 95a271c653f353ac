"""Training: the loop, what is checked before it, and what happens around it."""

from megalite.train.run import Request, run

__all__ = ["Request", "run"]

"""Parameter groups, torch's own optimizers, and the learning rate as a function of the step."""

from megalite.optim.muon import Fragment, Muon, orthogonalize
from megalite.optim.optimizers import make_optimizer
from megalite.optim.schedule import learning_rate

__all__ = ["Fragment", "Muon", "learning_rate", "make_optimizer", "orthogonalize"]

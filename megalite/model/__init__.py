"""The models as single-device mathematics: no rank, no group, no environment."""

from megalite.model.decoder import CausalLM, build, head_loss
from megalite.model.init import initialize

__all__ = ["CausalLM", "build", "head_loss", "initialize"]

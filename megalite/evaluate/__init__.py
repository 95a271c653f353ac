"""What a trained model is worth: text it writes, and measures of it."""

from megalite.evaluate.generate import Sampling, generate, stream_text
from megalite.evaluate.loss import mean_loss, perplexity, score
from megalite.evaluate.opened import OpenedModel, open_model

__all__ = [
    "OpenedModel",
    "Sampling",
    "generate",
    "mean_loss",
    "open_model",
    "perplexity",
    "score",
    "stream_text",
]

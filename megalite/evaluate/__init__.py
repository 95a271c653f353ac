"""What a trained model is worth: text it writes, and measures of it."""

from megalite.evaluate.generate import Sampling, generate, stream_text
from megalite.evaluate.loss import mean_loss

__all__ = ["Sampling", "generate", "mean_loss", "stream_text"]

"""What a trained model is worth: text it writes, and measures of it."""

from megalite.evaluate.generate import Sampling, generate, stream_text

__all__ = ["Sampling", "generate", "stream_text"]

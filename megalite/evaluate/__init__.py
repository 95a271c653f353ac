"""What a trained model is worth: text it writes, and measures of it."""

from megalite.evaluate.generate import (
    Rereading,
    Sampling,
    generate,
    in_order,
    sample_ids,
    stream_text,
    stream_texts,
)
from megalite.evaluate.loss import mean_loss, perplexity, score_data
from megalite.evaluate.opened import OpenedModel, open_model

__all__ = [
    "OpenedModel",
    "Rereading",
    "Sampling",
    "generate",
    "in_order",
    "mean_loss",
    "open_model",
    "perplexity",
    "sample_ids",
    "score_data",
    "stream_text",
    "stream_texts",
]

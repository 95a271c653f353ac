"""What a trained model is worth: text it writes, and measures of it."""

from megalite.evaluate.conversation import Answerer, json_lines, read_turns
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
from megalite.evaluate.samples import Prompts, Writer, open_prompts

__all__ = [
    "Answerer",
    "OpenedModel",
    "Prompts",
    "Rereading",
    "Sampling",
    "Writer",
    "generate",
    "in_order",
    "json_lines",
    "mean_loss",
    "open_model",
    "open_prompts",
    "perplexity",
    "read_turns",
    "sample_ids",
    "score_data",
    "stream_text",
    "stream_texts",
]

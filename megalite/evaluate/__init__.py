"""Evaluation of trained models: generated text, losses and metrics."""

from megalite.evaluate.conversation import Answerer, json_lines, read_turns
from megalite.evaluate.generate import (
    Sampling,
    UncachedDecoder,
    generate,
    in_order,
    sample_ids,
    stream_text,
    stream_texts,
)
from megalite.evaluate.loading import LoadedModel, open_model
from megalite.evaluate.loss import mean_loss, perplexity, score_data
from megalite.evaluate.samples import Prompts, Writer, open_prompts

__all__ = [
    "Answerer",
    "LoadedModel",
    "Prompts",
    "Sampling",
    "UncachedDecoder",
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

"""FLOPs of training, by the shapes alone: the one formula.

The letters are those of `megalite.arch.part`. A product of a token with a weight costs 2 FLOPs an
element in the forward; in the backward 2 for the weight's gradient, where that learns, and 2 for
the input's, where something below it does. Attention's two products cost 4 Q for each token that a
token sees, and twice that in the backward. After PaLM (arXiv 2204.02311, appendix B), with the
causal mask, windows and documents counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megalite import arch
from megalite.config import (
    FinetuneConfig,
    ModelConfig,
    RunConfig,
    source_length,
    target_fraction,
    target_length,
)
from megalite.plan.gradients import gradients


@dataclass(frozen=True)
class Flops:
    """Of one window of T tokens, in one direction: products of the blocks and of the head, and
    attention's.
    """

    blocks: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        return self.blocks + self.head + self.attention


@lru_cache(maxsize=64)
def window_flops(
    model: ModelConfig,
    sequence_length: int,
    *,
    read: int = 0,
    written: int = 0,
    document_tokens: float | None = None,
    counted: float = 1.0,
    tuning: FinetuneConfig | None = None,
) -> tuple[Flops, Flops]:
    """FLOPs of a window's forward and backward, without recomputation.

    Of embedding look-ups there are none; a tied head has its own.

    Args:
        read, written: tokens of a window of two stacks on either side.
        document_tokens: mean length of documents that do not see each other; None: no such masks.
        counted: the part of the places that are to be named (`target_fraction`).
        tuning: what learns; None: all of it.
    """
    width, T = model.num_attention_heads * model.head_dim, sequence_length
    encodes, made = model.architecture == "encoder_decoder", gradients(model, tuning)
    products, attention = [0.0, 0.0], [0.0, 0.0]
    for stack in arch.stacks(model):
        writes = stack == "model.decoder"
        tokens = T if not encodes else written if writes else read
        causal = model.architecture == "decoder" or writes
        pairs = seen_pairs(tokens, causal, model.sliding_window, document_tokens)
        for row in arch.parameters(model):
            if not row.name.startswith(f"{stack}.layers."):
                continue
            if row.is_matrix_of_block or row.is_adapter:
                inputs = read if "cross_attn.kv_proj" in row.name else tokens
                product = 2.0 * row.elements * inputs
                products[0] += product
                products[1] += product * made.products(row.name)
            if row.name.endswith("attn.o_proj.weight"):
                seen = 4.0 * width * (tokens * read if "cross_attn" in row.name else pairs)
                attention[0] += seen
                attention[1] += 2 * seen * (row.name in made.passed)
    head = 2.0 * model.vocab_size * model.hidden_size * counted * (written if encodes else T)
    if model.num_labels:
        head = 2.0 * model.num_labels * model.hidden_size
    return (
        Flops(products[0], head, attention[0]),
        Flops(products[1], head * made.of_head(model), attention[1]),
    )


def run_flops(config: RunConfig, document_tokens: float | None = None) -> tuple[Flops, Flops]:
    """`window_flops` of a run's own windows."""
    return window_flops(
        config.model,
        config.data.sequence_length,
        read=source_length(config),
        written=target_length(config),
        document_tokens=document_tokens,
        counted=target_fraction(config),
        tuning=config.finetune,
    )


def seen_pairs(
    tokens: int, causal: bool, window: int | None, document_tokens: float | None
) -> float:
    """How many tokens are seen by those of a window, summed over them.

    Of documents of unequal lengths this is a lower bound: they count as if each had the mean's.
    """
    length = min(tokens, document_tokens or tokens)
    near = min(length, window or length)
    pairs = near * (near + 1) / 2 + (length - near) * near
    if not causal:
        pairs = length * length if near == length else 2 * pairs - length
    return tokens / length * pairs if length else 0.0


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of a token of a decoder or an encoder that learns as a whole from every token,
    forward and backward.
    """
    return _per_token(window_flops(model, sequence_length), sequence_length)


def run_flops_per_token(config: RunConfig) -> int:
    """Model FLOPs of a run's trained token, forward and backward, without recomputation.

    Of two stacks each token of the window pays its part of what is read and written.
    """
    return _per_token(run_flops(config), config.data.sequence_length)


def hardware_flops_per_token(config: RunConfig, *, document_tokens: float | None = None) -> int:
    """FLOPs that a device carries out for a trained token: with what is computed again.

    Selective recompute keeps every matrix product; full recompute repeats the blocks' forward.
    """
    forward, backward = run_flops(config, document_tokens)
    again = 0.0
    if config.training.activation_checkpointing == "full":
        share = gradients(config.model, config.finetune).share(config.model)
        again = share * (forward.blocks + forward.attention)
    return _per_token((forward, backward), config.data.sequence_length, again)


def _per_token(both: tuple[Flops, Flops], tokens: int, again: float = 0.0) -> int:
    return round(sum(flops.total for flops in both) + again) // tokens

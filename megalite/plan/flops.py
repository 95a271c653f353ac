"""FLOPs of training, by the shapes alone: the one formula.

The letters are those of `megalite.shapes`. A product of a token with a weight costs 2 FLOPs an
element in the forward and 4 in the backward; attention's two products cost 4 Q for each token that
a token sees, three times in all. After PaLM (arXiv 2204.02311, appendix B), with the causal mask,
windows and documents counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megalite import shapes
from megalite.config import ModelConfig, RunConfig, source_length, target_length


@dataclass(frozen=True)
class Forward:
    """FLOPs of the forward of one window of T tokens: products of the blocks and of the head, and
    attention's.
    """

    blocks: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        return self.blocks + self.head + self.attention


@lru_cache(maxsize=64)
def forward_flops(
    model: ModelConfig,
    sequence_length: int,
    *,
    read: int = 0,
    written: int = 0,
    document_tokens: float | None = None,
    counted: float = 1.0,
) -> Forward:
    """FLOPs of a window's forward. Of embedding look-ups there are none; a tied head has its own.

    Args:
        read, written: tokens of a window of two stacks on either side.
        document_tokens: mean length of documents that do not see each other; None: no such masks.
        counted: the part of the places that are to be named (`shapes.counted_share`).
    """
    width, T = model.num_attention_heads * model.head_dim, sequence_length
    encodes = model.architecture == "encoder_decoder"
    products, pairs = 0.0, 0.0
    for stack, layers in shapes.stacks(model).items():
        tokens = T if not encodes else written if stack == "model.decoder" else read
        causal = model.architecture == "decoder" or stack == "model.decoder"
        pairs += layers * seen_pairs(tokens, causal, model.sliding_window, document_tokens)
        for row in shapes.parameters(model):
            if row.is_matrix_of_block and row.name.startswith(f"{stack}."):
                of_source = "cross_attn.kv_proj" in row.name
                products += row.elements * (read if of_source else tokens)
        if encodes and stack == "model.decoder":
            pairs += layers * tokens * read
    head = model.vocab_size * model.hidden_size * counted * (written if encodes else T)
    if model.num_labels:
        head = model.num_labels * model.hidden_size
    return Forward(2.0 * products, 2.0 * head, 4.0 * width * pairs)


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


def flops_per_token(
    model: ModelConfig,
    sequence_length: int,
    *,
    read: int = 0,
    written: int = 0,
    document_tokens: float | None = None,
    counted: float = 1.0,
) -> int:
    """Model FLOPs of a trained token, forward and backward, without recomputation.

    Of two stacks each token of the window pays its part of what is `read` and `written`.
    """
    forward = forward_flops(
        model,
        sequence_length,
        read=read,
        written=written,
        document_tokens=document_tokens,
        counted=counted,
    )
    return round(3 * forward.total) // sequence_length


def hardware_flops_per_token(config: RunConfig, *, document_tokens: float | None = None) -> int:
    """FLOPs that a device carries out for a trained token: with what is computed again.

    Selective recompute keeps every matrix product; full recompute repeats the blocks' forward.
    """
    T = config.data.sequence_length
    forward = forward_flops(
        config.model,
        T,
        read=source_length(config),
        written=target_length(config),
        document_tokens=document_tokens,
        counted=shapes.counted_share(config),
    )
    again = 0.0
    if config.training.activation_checkpointing == "full":
        again = forward.blocks + forward.attention
    return round(3 * forward.total + again) // T

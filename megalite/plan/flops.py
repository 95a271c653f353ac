"""FLOPs of training: sums of what the parts state.

They follow PaLM (arXiv 2204.02311, appendix B), but count only the scores that the causal mask, the
attention window and the document masks let through.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megalite.arch.network import stack_lengths
from megalite.arch.part import Workload
from megalite.config import (
    FinetuneConfig,
    ModelConfig,
    RunConfig,
    source_length,
    target_fraction,
    target_length,
)
from megalite.plan.costs import model_costs, workloads
from megalite.plan.gradients import gradients


@dataclass(frozen=True)
class Flops:
    """FLOPs of one window of T tokens in one direction.

    Attributes:
        blocks: matrix products of the blocks.
        head: matrix product of the head.
        attention: products of queries with keys, and of scores with values.
    """

    blocks: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.blocks + self.head + self.attention


@lru_cache(maxsize=64)
def window_flops(
    model: ModelConfig,
    sequence_length: int,
    *,
    read: int = 0,
    written: int = 0,
    document_tokens: float | None = None,
    fraction: float = 1.0,
    tuning: FinetuneConfig | None = None,
) -> tuple[Flops, Flops]:
    """Return the FLOPs of a window's forward and backward, without recomputation.

    Embedding look-ups cost none. A tied head costs as much as an untied one.

    Args:
        read: tokens of a window in the encoder of an encoder-decoder.
        written: tokens of a window in the decoder of an encoder-decoder.
        document_tokens: mean length of documents that do not attend to each other. None means no
            document masks.
        fraction: share of the tokens that are predicted (`target_fraction`).
        tuning: fine-tuning section, which decides what is trained. None means all parameters.
    """
    lengths = stack_lengths(model, sequence_length, read, written)
    common = Workload(tokens=0, document_tokens=document_tokens, target_fraction=fraction)
    costs = model_costs(model, tuning, workloads(model, lengths, common))
    forward, backward = (
        Flops(
            blocks=sum(part.products[way] for part in costs.parts),
            head=costs.head.products[way],
            attention=sum(part.attention[way] for part in costs.parts),
        )
        for way in (0, 1)
    )
    return forward, backward


def run_flops(config: RunConfig, document_tokens: float | None = None) -> tuple[Flops, Flops]:
    """Return `window_flops` for the windows of a run."""
    return window_flops(
        config.model,
        config.data.sequence_length,
        read=source_length(config),
        written=target_length(config),
        document_tokens=document_tokens,
        fraction=target_fraction(config),
        tuning=config.finetune,
    )


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Return the model FLOPs per token, forward and backward, if all parameters are trained.

    The model is a decoder or an encoder.
    """
    return _per_token(window_flops(model, sequence_length), sequence_length)


def run_flops_per_token(config: RunConfig) -> int:
    """Return a run's model FLOPs per token, forward and backward, without recomputation.

    The FLOPs of a window are divided by `data.sequence_length`.
    """
    return _per_token(run_flops(config), config.data.sequence_length)


def hardware_flops_per_token(config: RunConfig, *, document_tokens: float | None = None) -> int:
    """Return the FLOPs per token that devices execute, recomputation included.

    Selective recomputation repeats no matrix product; full recomputation repeats the blocks'
    forward.
    """
    forward, backward = run_flops(config, document_tokens)
    recomputed = 0.0
    if config.training.activation_checkpointing == "full":
        share = gradients(config.model, config.finetune).share
        recomputed = share * (forward.blocks + forward.attention)
    return _per_token((forward, backward), config.data.sequence_length, recomputed)


def _per_token(both: tuple[Flops, Flops], tokens: int, recomputed: float = 0.0) -> int:
    return round(sum(flops.total for flops in both) + recomputed) // tokens

"""FLOPs of training: sums over what the parts state.

After PaLM (arXiv 2204.02311, appendix B), with the causal mask, windows and documents counted.
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
        blocks: matrix products of the blocks. head: product of the head.
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

    Embedding look-ups cost none; a tied head has its own.

    Args:
        read, written: tokens of a window in the encoder and the decoder of a model with two stacks.
        document_tokens: mean length of documents that do not see each other; None means no masks.
        fraction: share of the tokens that are predicted (`target_fraction`).
        tuning: decides what is trained; None means all parameters.
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
    """Return `window_flops` of a run's own windows."""
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
    """Return the model FLOPs of a token, forward and backward.

    All parameters of the model, a decoder or an encoder, are trained on every token.
    """
    return _per_token(window_flops(model, sequence_length), sequence_length)


def run_flops_per_token(config: RunConfig) -> int:
    """Return the model FLOPs of a run's trained token, forward and backward, without recomputation.

    Each token of a window bears its share of the tokens that are read and written.
    """
    return _per_token(run_flops(config), config.data.sequence_length)


def hardware_flops_per_token(config: RunConfig, *, document_tokens: float | None = None) -> int:
    """Return the FLOPs that a device carries out for a trained token, recomputation included.

    Selective recompute keeps every matrix product; full recompute repeats the blocks' forward.
    """
    forward, backward = run_flops(config, document_tokens)
    again = 0.0
    if config.training.activation_checkpointing == "full":
        share = gradients(config.model, config.finetune).share
        again = share * (forward.blocks + forward.attention)
    return _per_token((forward, backward), config.data.sequence_length, again)


def _per_token(both: tuple[Flops, Flops], tokens: int, again: float = 0.0) -> int:
    return round(sum(flops.total for flops in both) + again) // tokens

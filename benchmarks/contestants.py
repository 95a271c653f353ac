"""The shapes and contestants of benchmarks/train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
# name: (model, sequences per step)
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "42m": (LLAMA | {"vocab_size": 32000, "num_hidden_layers": 8}, 8),
    "smoke": (
        LLAMA
        | {"vocab_size": 8000, "num_hidden_layers": 4, "max_position_embeddings": 256}
        | {"hidden_size": 256, "intermediate_size": 704},
        16,
    ),
    "vocab": (LLAMA | {"vocab_size": 131072, "num_hidden_layers": 4}, 4),
    "gpt2": (
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "position_embedding": "learned",
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        4,
    ),
}


@dataclass(frozen=True)
class Contestant:
    """A framework and its configuration, to be compared with others.

    Attributes:
        ranks: number of MegaLite's ranks.
        sections: changes of MegaLite's run file.
        peer: argument of peers.py. Empty means MegaLite.
    """

    ranks: int = 1
    sections: dict[str, Any] = field(default_factory=dict)
    peer: str = ""


def zero_stage(stage: int) -> dict[str, Any]:
    """Return the deepspeed section with a ZeRO stage."""
    return {"zero_optimization": {"stage": stage}}


ZERO_0: dict[str, Any] = {"deepspeed": zero_stage(0)}
SAVING: dict[str, Any] = {"checkpoint": {"every": 20, "background": True, "keep": 1}}
QUIET: dict[str, Any] = {"logging": {"tensorboard": False}, "training": {"log_every": None}}
CONTESTANTS = {
    "megalite": Contestant(1, ZERO_0),
    "plain": Contestant(1, ZERO_0 | {"training": {"compile": False}}),
    "full": Contestant(1, ZERO_0 | SAVING),
    "bare": Contestant(1, ZERO_0 | QUIET),
    "fp32": Contestant(1, {"deepspeed": zero_stage(0), "training": {"precision": "fp32"}}),
    "zero1": Contestant(1, {"deepspeed": zero_stage(1)}),
    "dp2": Contestant(2, {"deepspeed": zero_stage(1)}),
    "tp2": Contestant(2, {"deepspeed": zero_stage(1), "parallel": {"tensor": 2}}),
    **{
        name: Contestant(peer=name)
        for name in ("hf", "hf-compiled", "hf-trainer", "litgpt", "litgpt-compiled")
    },
}
DEFAULT = ["megalite", "hf", "hf-compiled", "hf-trainer", "litgpt-compiled"]

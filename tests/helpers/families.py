"""Small models of every supported family of Hugging Face's, three random shapes each."""

from __future__ import annotations

import math
import random
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5", "marian")
ROPE = ("llama", "mistral", "qwen2", "qwen3")

_SCALINGS: tuple[dict[str, Any] | None, ...] = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
)


def model_section(family: str, number: int) -> dict[str, Any]:
    """Return the model section of a family's random shape.

    The size of the vocabulary is odd, and 4 tensor ranks can share the heads.
    """
    chosen = random.Random(f"{family} {number}")
    groups = chosen.choice((4, 8))
    heads = groups * (chosen.choice((1, 2)) if family in ROPE else 1)
    head_dim = 2 * chosen.randint(2, 5)
    model: dict[str, Any] = {
        "vocab_size": chosen.choice((61, 99, 131)),
        "hidden_size": heads * head_dim,
        "intermediate_size": 4 * chosen.randint(8, 20),
        "num_hidden_layers": chosen.randint(2, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 64,
        "tie_word_embeddings": number % 2 == 1,
        "norm_eps": 1e-5,
        "initializer_range": 0.1,
    }
    if family in ROPE:
        model |= {"head_dim": head_dim, "rope_theta": 500.0, "rope_scaling": _SCALINGS[number]}
        model |= {"hidden_size": heads * head_dim + 4 * (family in ("mistral", "qwen3"))}
    return model | _particular(family, number, model)


def _some_windows(number: int, layers: int) -> dict[str, Any]:
    """Return the layer types: sliding windows in all layers, in every second one, or in none."""
    if number == 0:
        return {"sliding_window": 9}
    kinds = (["sliding_attention", "full_attention"] * layers)[:layers]
    return {"sliding_window": 6, "layer_types": kinds} if number == 1 else {}


def _particular(family: str, number: int, model: dict[str, Any]) -> dict[str, Any]:
    biased = {"attention_bias": True, "mlp_bias": True}
    layers = {"num_decoder_layers": 2 + number % 2}
    root, tied = math.sqrt(model["hidden_size"]), model["tie_word_embeddings"]
    return {
        "llama": {"attention_bias": number > 0, "mlp_bias": number > 1},
        "mistral": {"sliding_window": (7, 24, 5)[number]},
        "qwen2": {"attention_bias": True, "attention_output_bias": False},
        "qwen3": {"qk_norm": True, **_some_windows(number, model["num_hidden_layers"])},
        "gpt2": {
            **biased, "norm": "layernorm", "position_embedding": "learned",
            "activation": ("gelu_tanh", "relu", "gelu")[number],
        },
        "bert": {
            **biased, "architecture": "encoder", "norm": "layernorm", "norm_position": "post",
            "embedding_norm": True, "position_embedding": "learned", "type_vocab_size": 2,
            "activation": ("gelu", "relu", "gelu_tanh")[number],
        },
        "t5": {
            **layers, "architecture": "encoder_decoder", "position_embedding": "relative",
            "attention_multiplier": 1.0, "logits_scaling": root if tied else 1.0,
            "activation": ("relu", "geglu_tanh", "swiglu")[number], "head_dim": 6,
            "relative_attention_num_buckets": 12, "relative_attention_max_distance": 20,
        },
        "marian": {
            **biased, **layers, "architecture": "encoder_decoder", "norm": "layernorm",
            "norm_position": "post", "position_embedding": "sinusoidal",
            "activation": ("relu", "gelu", "relu")[number],
            "embedding_multiplier": root if number else 1.0, "decoder_start_token_id": 3,
        },
    }[family]  # fmt: skip

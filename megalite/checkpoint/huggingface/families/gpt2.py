"""GPT-2: LayerNorm, a plain MLP, learned positions, biases; fused and transposed projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.family import (
    PLAIN,
    WITH_BIASES,
    Family,
    attention_mismatches,
)
from megalite.config import ModelConfig


class GPT2(Family):
    """GPT-2, whose class has a separate dropout for the embedding."""

    def mismatches(self, model: ModelConfig) -> list[str]:
        return attention_mismatches(model)

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        return super().extra_config(model) | {"embd_pdrop": model.hidden_dropout}

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        section = super().extra_section(values)
        if values.get("n_inner") is None:
            section["intermediate_size"] = 4 * values["n_embd"]
        return section


FAMILY = GPT2(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "initializer_range": "initializer_range",
        "intermediate_size": "n_inner",
        "tie_word_embeddings": "tie_word_embeddings",
        "hidden_dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    fixed=PLAIN
    | WITH_BIASES
    | {"architecture": "decoder", "norm": "layernorm", "position_embedding": "learned"},
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    defaults={
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "activation_function": "gelu_new",
    },
    renames=(
        (r"^model\.embed_tokens", "transformer.wte"),
        (r"^model\.embed_positions", "transformer.wpe"),
        (r"^model\.norm", "transformer.ln_f"),
        (r"^model\.layers\.", "transformer.h."),
        (r"input_layernorm", "ln_1"),
        (r"post_attention_layernorm", "ln_2"),
        (r"self_attn\.[qkv]_proj", "attn.c_attn"),
        (r"self_attn\.o_proj", "attn.c_proj"),
        (r"mlp\.up_proj", "mlp.c_fc"),
        (r"mlp\.down_proj", "mlp.c_proj"),
    ),
    transposed=r"\.c_(attn|proj|fc)\.weight$",
    fused=r"\.c_attn\.",
    parts=("q_proj", "k_proj", "v_proj"),
    prefix="transformer.",
    activation_key="activation_function",
    optional=("n_inner",),
)

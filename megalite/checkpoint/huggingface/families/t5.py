"""T5 and T5 1.1: encoder and decoder with relative positions, unscaled scores, RMSNorm."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from megalite.checkpoint.huggingface.family import (
    WITHOUT_BIASES,
    Family,
    key_value_mismatches,
    translate_value,
)
from megalite.config import ModelConfig

# T5's names of our activations, which include the gate.
_MLPS = {"relu": "relu", "gelu": "gelu", "geglu_tanh": "gated-gelu", "swiglu": "gated-silu"}


class T5(Family):
    """T5, which divides the logits of a tied head by the root of the hidden size."""

    def rename(self, name: str, model: ModelConfig) -> str:
        name = super().rename(name, model)
        return name.replace("up_proj", "wi_1" if model.gated else "wi")

    def aliases(self, name: str) -> tuple[str, ...]:
        return ("encoder.embed_tokens.weight",) if name == "shared.weight" else ()

    def mismatches(self, model: ModelConfig) -> list[str]:
        wrong = key_value_mismatches(model)
        if model.activation not in _MLPS:
            wrong.append(f"activation {model.activation!r}")
        scaling = math.sqrt(model.hidden_size) if model.tie_word_embeddings else 1.0
        if not math.isclose(model.logits_scaling, scaling):
            wrong.append(f"logits_scaling {model.logits_scaling}")
        if model.attention_dropout != model.hidden_dropout:
            wrong.append(f"attention_dropout {model.attention_dropout}")
        return wrong

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        return super().extra_config(model) | {
            "feed_forward_proj": _MLPS[model.activation],
            "is_encoder_decoder": True,
            "tie_word_embeddings": model.tie_word_embeddings,
            "pad_token_id": 0,
            "num_decoder_layers": model.num_decoder_layers or model.num_hidden_layers,
        }

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        root = math.sqrt(values["d_model"])
        names = {theirs: ours for ours, theirs in _MLPS.items()}
        tied = values.get("tie_word_embeddings", True)
        # transformers 5 always writes tie_word_embeddings true, and a separate key for the scaling.
        scaled = values.get("scale_decoder_outputs", tied)
        return super().extra_section(values) | {
            "activation": translate_value(names, "feed_forward_proj", values),
            "tie_word_embeddings": tied,
            "logits_scaling": root if scaled else 1.0,
            "attention_dropout": values["dropout_rate"],
            "max_position_embeddings": 512,  # T5 has no limit, but was trained on 512 tokens
        }

    def adjust_section(self, model: ModelConfig, stored: Collection[str]) -> ModelConfig:
        if model.logits_scaling != 1.0:
            return model
        # transformers 5 writes tie_word_embeddings true even if the folder has a separate head.
        tied = "lm_head.weight" not in stored and model.tie_word_embeddings
        return model.model_copy(update={"tie_word_embeddings": tied})


FAMILY = T5(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
        "norm_eps": "layer_norm_epsilon",
        "hidden_dropout": "dropout_rate",
        "relative_attention_num_buckets": "relative_attention_num_buckets",
        "relative_attention_max_distance": "relative_attention_max_distance",
        "decoder_start_token_id": "decoder_start_token_id",
    },
    fixed=WITHOUT_BIASES
    | {"architecture": "encoder_decoder", "norm": "rmsnorm", "norm_position": "pre"}
    | {"position_embedding": "relative", "attention_multiplier": 1.0, "qk_norm": False}
    | {"embedding_norm": False, "embedding_multiplier": 1.0},
    defaults={
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
        "num_decoder_layers": None,
    },
    renames=(
        (r"^model\.embed_tokens", "shared"),
        (r"^model\.(encoder|decoder)\.norm", r"\1.final_layer_norm"),
        (
            r"^model\.(encoder|decoder)\.relative_attention_bias",
            r"\1.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
        (r"^model\.(encoder|decoder)\.layers\.(\d+)", r"\1.block.\2.layer"),
        (r"input_layernorm", "0.layer_norm"),
        (r"self_attn\.([qkvo])_proj", r"0.SelfAttention.\1"),
        (r"cross_attn_layernorm", "1.layer_norm"),
        (r"cross_attn\.([qkvo])_proj", r"1.EncDecAttention.\1"),
        (r"^(encoder.*)post_attention_layernorm", r"\g<1>1.layer_norm"),
        (r"^(decoder.*)post_attention_layernorm", r"\g<1>2.layer_norm"),
        (r"^(encoder.*)mlp\.", r"\g<1>1.DenseReluDense."),
        (r"^(decoder.*)mlp\.", r"\g<1>2.DenseReluDense."),
        (r"gate_proj", "wi_0"),
        (r"down_proj", "wo"),
    ),
)

"""Marian: encoder and decoder with sinusoidal positions and norms after each half block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.family import WITH_BIASES, Family, attention_mismatches
from megalite.config import ModelConfig
from megalite.errors import CommandError


class Marian(Family):
    """Marian, whose class requires copies of the embedding and a bias of the logits."""

    def aliases(self, name: str) -> tuple[str, ...]:
        return ("model.encoder.embed_tokens.weight",) if name == "model.shared.weight" else ()

    def copies(self, model: ModelConfig) -> dict[str, str]:
        if model.tie_word_embeddings:
            return {}
        names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
        return dict.fromkeys(names, "model.embed_tokens.weight")

    def buffers(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        return {"final_logits_bias": (1, model.vocab_size)}

    def mismatches(self, model: ModelConfig) -> list[str]:
        wrong = attention_mismatches(model)
        scale = model.embedding_multiplier
        if scale != 1 and not math.isclose(scale, math.sqrt(model.hidden_size)):
            wrong.append(f"embedding_multiplier {scale}")
        return wrong

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        return super().extra_config(model) | {
            "scale_embedding": model.embedding_multiplier != 1,
            "is_encoder_decoder": True,
            "pad_token_id": model.decoder_start_token_id,
            "decoder_ffn_dim": model.intermediate_size,
            "decoder_attention_heads": model.num_attention_heads,
            "decoder_layers": model.num_decoder_layers or model.num_hidden_layers,
        }

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        section = super().extra_section(values)
        root = math.sqrt(values["d_model"])
        section["embedding_multiplier"] = root if values["scale_embedding"] else 1.0
        for part in ("ffn_dim", "attention_heads"):
            encoder = values[f"encoder_{part}"]
            if values.get(f"decoder_{part}", encoder) != encoder:
                raise CommandError(f"decoder_{part} differs from encoder_{part}: not supported")
        return section


FAMILY = Marian(
    model_type="marian",
    architecture="MarianMTModel",
    keys={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "intermediate_size": "encoder_ffn_dim",
        "num_hidden_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "hidden_dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "initializer_range": "init_std",
        "max_position_embeddings": "max_position_embeddings",
        "tie_word_embeddings": "tie_word_embeddings",
        "decoder_start_token_id": "decoder_start_token_id",
    },
    fixed=WITH_BIASES
    | {"architecture": "encoder_decoder", "norm": "layernorm", "norm_position": "post"}
    | {"position_embedding": "sinusoidal", "attention_multiplier": None, "qk_norm": False}
    | {"embedding_norm": False, "logits_scaling": 1.0, "norm_eps": 1e-5},
    required={"share_encoder_decoder_embeddings": True},
    defaults={
        "max_position_embeddings": 1024,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "init_std": 0.02,
        "scale_embedding": False,
        "activation_function": "gelu",
        "tie_word_embeddings": True,
        "decoder_layers": 12,
        "decoder_start_token_id": 58100,
    },
    renames=(
        (r"^model\.embed_tokens", "model.shared"),
        (r"input_layernorm", "self_attn_layer_norm"),
        (r"cross_attn_layernorm", "encoder_attn_layer_norm"),
        (r"post_attention_layernorm", "final_layer_norm"),
        (r"cross_attn", "encoder_attn"),
        (r"o_proj", "out_proj"),
        (r"mlp\.up_proj", "fc1"),
        (r"mlp\.down_proj", "fc2"),
    ),
    prefix="model.",
    activation_key="activation_function",
)

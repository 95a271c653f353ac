"""Llama: RMSNorm, SwiGLU, RoPE, grouped heads; all projections of attention have biases or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.rope import (
    ROPE_DEFAULTS,
    ROPE_FIXED,
    ROPE_KEYS,
    RopeFamily,
    output_bias_mismatches,
)
from megalite.config import ModelConfig


class Llama(RopeFamily):
    """Llama, whose class requires that the number of heads divides the hidden size."""

    def mismatches(self, model: ModelConfig) -> list[str]:
        wrong = []
        if model.hidden_size % model.num_attention_heads:
            wrong.append(f"hidden_size {model.hidden_size}")
        return wrong + output_bias_mismatches(model)

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        section = super().extra_section(values)
        return section | {"attention_output_bias": values["attention_bias"]}


FAMILY = Llama(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=ROPE_KEYS | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    fixed=ROPE_FIXED | {"qk_norm": False, "sliding_window": None},
    required={"hidden_act": "silu"},
    defaults=ROPE_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    preferred=True,
)

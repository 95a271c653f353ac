"""Qwen 3: Qwen 2 with norms of queries and keys; all projections have biases or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.families.qwen2 import LAYERS_FIXED, Qwen
from megalite.checkpoint.huggingface.rope import (
    ROPE_DEFAULTS,
    ROPE_KEYS,
    output_bias_mismatches,
)
from megalite.config import ModelConfig


class Qwen3(Qwen):
    """Qwen 3, with one key for the biases of all attention projections."""

    def mismatches(self, model: ModelConfig) -> list[str]:
        return output_bias_mismatches(model)

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        section = super().extra_section(values)
        return section | {"attention_output_bias": values["attention_bias"]}


FAMILY = Qwen3(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=ROPE_KEYS | {"attention_bias": "attention_bias"},
    fixed=LAYERS_FIXED | {"qk_norm": True, "mlp_bias": False},
    required={"hidden_act": "silu"},
    defaults=ROPE_DEFAULTS | {"attention_bias": False, "head_dim": 128},
)

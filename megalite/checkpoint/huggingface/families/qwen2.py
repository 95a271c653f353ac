"""Qwen 2 and 2.5: Llama with biases of query, key and value, and optionally a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.family import WITHOUT_BIASES
from megalite.checkpoint.huggingface.rope import ROPE_DEFAULTS, ROPE_FIXED, ROPE_KEYS, RopeFamily
from megalite.config import ModelConfig
from megalite.errors import CommandError


class Qwen(RopeFamily):
    """A family whose sliding window has a switch and a first layer."""

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        config = super().extra_config(model)
        config["use_sliding_window"] = model.sliding_window is not None
        return config | {"sliding_window": model.sliding_window, "max_window_layers": 0}

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        section = super().extra_section(values)
        if not values.get("use_sliding_window"):
            return section
        kinds = set(values.get("layer_types", ()))
        if kinds != {"sliding_attention"} and (kinds or values.get("max_window_layers") != 0):
            raise CommandError("use_sliding_window in some layers and not in others: not known")
        return section | {"sliding_window": values.get("sliding_window")}


FAMILY = Qwen(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=ROPE_KEYS,
    fixed=ROPE_FIXED | WITHOUT_BIASES | {"attention_bias": True, "qk_norm": False},
    required={"hidden_act": "silu"},
    defaults=ROPE_DEFAULTS,
)

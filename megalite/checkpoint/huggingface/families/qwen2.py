"""Qwen 2 and 2.5: Llama with biases of query, key and value, and sliding windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from megalite import arch
from megalite.checkpoint.huggingface.family import WITHOUT_BIASES
from megalite.checkpoint.huggingface.rope import ROPE_DEFAULTS, ROPE_FIXED, ROPE_KEYS, RopeFamily
from megalite.config import LayerType, ModelConfig
from megalite.errors import CommandError

LAYERS_FIXED = {key: value for key, value in ROPE_FIXED.items() if key != "layer_types"}
_FIRST_SLIDING_LAYER = 28  # max_window_layers of transformers' Qwen2Config and Qwen3Config


class Qwen(RopeFamily):
    """A family with a switch for its sliding window, and its first layer or a list of types."""

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        config = super().extra_config(model)
        config["use_sliding_window"] = model.sliding_window is not None
        config |= {"sliding_window": model.sliding_window, "max_window_layers": 0}
        if model.layer_types:
            config["layer_types"] = arch.layer_types(model, model.num_hidden_layers)
        return config

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        section = super().extra_section(values)
        window = values.get("sliding_window")
        layers = values["num_hidden_layers"]
        if not values.get("use_sliding_window") or window is None:
            return section
        full = min(layers, values.get("max_window_layers", _FIRST_SLIDING_LAYER))
        default = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        kinds = values.get("layer_types", default)
        for kind in kinds:
            if kind not in get_args(LayerType):
                names = ", ".join(get_args(LayerType))
                raise CommandError(f"layer_types {kind!r}: only {names} are supported")
        if set(kinds) == {"full_attention"}:
            return section
        if set(kinds) == {"sliding_attention"}:
            return section | {"sliding_window": window}
        return section | {"sliding_window": window, "layer_types": kinds}


FAMILY = Qwen(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=ROPE_KEYS,
    fixed=LAYERS_FIXED | WITHOUT_BIASES | {"attention_bias": True, "qk_norm": False},
    required={"hidden_act": "silu"},
    defaults=ROPE_DEFAULTS,
)

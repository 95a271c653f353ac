"""Families with rotary position embeddings (RoPE), and the RoPE keys of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalite.checkpoint.huggingface.family import COMMON_KEYS, PLAIN, Family
from megalite.config import ModelConfig
from megalite.errors import CommandError

# Keys of each kind of RoPE scaling.
_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": (
        *("factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings"),
        *("beta_fast", "beta_slow", "attention_factor"),
    ),
}
ROPE_KEYS = {name: name for name in COMMON_KEYS} | {"norm_eps": "rms_norm_eps"}
ROPE_FIXED = {
    **{k: v for k, v in PLAIN.items() if k not in ("rope_scaling", "sliding_window", "qk_norm")},
    "architecture": "decoder",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "hidden_dropout": 0.0,
}
ROPE_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class RopeFamily(Family):
    """A family with RoPE, which may have grouped heads of any width."""

    optional: tuple[str, ...] = ("num_key_value_heads", "head_dim")
    prefix: str = "model."

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        config: dict[str, Any] = {"rope_theta": model.rope_theta}
        scaling = model.rope_scaling
        if scaling is not None:
            values = {key: getattr(scaling, key) for key in _SCALING_KEYS[scaling.rope_type]}
            values = {key: value for key, value in values.items() if value is not None}
            config["rope_scaling"] = {"rope_type": scaling.rope_type, **values}
        return config | super().extra_config(model)

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return _read_rope(values) | super().extra_section(values)


def output_bias_mismatches(model: ModelConfig) -> list[str]:
    """Return the output projection's bias if the other projections of the attention differ."""
    if model.attention_bias == model.attention_output_bias:
        return []
    return [f"attention_output_bias {model.attention_output_bias}"]


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE keys of the model section for a config.json of transformers 4 or 5.

    Version 5 writes `rope_parameters`, version 4 `rope_theta` and `rope_scaling`.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(key) or {}, dict):
            raise CommandError(f"{key} is {values[key]!r:.40}; set it to an object with rope_type")
    section = {**(values.get("rope_parameters") or {}), **(values.get("rope_scaling") or {})}
    kind = section.pop("rope_type", section.pop("type", "default"))
    section.pop("type", None)
    theta = section.pop("rope_theta", values.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in _SCALING_KEYS:
        raise CommandError(f"rope_type {kind!r}: only {', '.join(_SCALING_KEYS)} are supported")
    unknown = {key: value for key, value in section.items() if key not in _SCALING_KEYS[kind]}
    if unknown.pop("truncate", True) is not True or any(v is not None for v in unknown.values()):
        raise CommandError(f"rope_scaling {kind} with {', '.join(sorted(unknown))}: not supported")
    section = {key: section[key] for key in _SCALING_KEYS[kind] if section.get(key) is not None}
    if kind == "yarn":
        section.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **section}}

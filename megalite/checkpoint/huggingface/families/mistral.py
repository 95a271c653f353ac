"""Mistral: Llama without biases, and with a sliding window in every layer."""

from __future__ import annotations

from megalite.checkpoint.huggingface.family import WITHOUT_BIASES
from megalite.checkpoint.huggingface.rope import ROPE_DEFAULTS, ROPE_FIXED, ROPE_KEYS, RopeFamily

FAMILY = RopeFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=ROPE_KEYS | {"sliding_window": "sliding_window"},
    fixed=ROPE_FIXED | WITHOUT_BIASES | {"qk_norm": False},
    required={"hidden_act": "silu"},
    defaults=ROPE_DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8},
    nullable=("sliding_window",),  # null means no window, a missing key the default
)

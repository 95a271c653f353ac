"""Model families of Hugging Face: how their config.json and tensors correspond to ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalite.config import ModelConfig
from megalite.errors import CommandError

# Hugging Face's names of our activations.
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
_SYNONYMS = {"gelu_pytorch_tanh": "gelu_tanh"}  # accepted on import, never exported
# Keys of the model section that have the same name in many families.
COMMON_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *("initializer_range", "attention_dropout"),
)
# Values of the model section that switch a feature off.
PLAIN = {
    "norm_position": "pre",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "qk_norm": False,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "sliding_window": None,
    "layer_types": None,
    "rope_scaling": None,
    "num_decoder_layers": None,
}
WITH_BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
WITHOUT_BIASES = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class Family:
    """A model type of Hugging Face. Subclasses convert values that have no one-to-one key.

    Attributes:
        model_type: the family's name in config.json.
        architecture: the class of transformers that loads an exported folder.
        keys: the config.json key of each key of the model section.
        fixed: values of the model section that all models of the family have.
        required: the only values that MegaLite supports for these keys of config.json.
        defaults: values for keys that config.json lacks.
        renames: patterns and replacements, applied in order, that turn a canonical tensor's name
            into the family's.
        transposed: pattern of the tensors that are stored as [in, out].
        fused: pattern of the tensors that stack several of ours, in the order of `parts`.
        parts: names of the projections in a fused tensor.
        prefix: prefix of tensor names, which a folder of the bare model lacks.
        activation_key: config.json key of the activation, or None.
        optional: config.json keys that may be missing although they have no default.
        nullable: config.json keys for which null differs from a missing key.
        redundant: pattern of further tensors that a folder may have and that are ignored.
        preferred: whether to export as this family if several fit.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    required: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    transposed: str = "$."
    fused: str = "$."
    parts: tuple[str, ...] = ()
    prefix: str = ""
    activation_key: str | None = None
    optional: Collection[str] = ()
    nullable: Collection[str] = ()
    redundant: str = "$."
    preferred: bool = False

    def rename(self, name: str, model: ModelConfig) -> str:
        """Return the family's name of a canonical tensor."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return other names that folders use for the family's tensor `name`."""
        return ()

    def copies(self, model: ModelConfig) -> dict[str, str]:
        """Return the canonical tensors to export again under a second name, by that name."""
        return {}

    def buffers(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of tensors of zeros that the family's class requires."""
        return {}

    def mismatches(self, model: ModelConfig) -> list[str]:
        """Return a model's values that the family does not support and `fixed` does not cover."""
        return []

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        """Return the values of config.json that `keys` and `required` do not cover."""
        if self.activation_key is None:
            return {}
        return {self.activation_key: ACTIVATIONS[model.activation]}

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the model section that `keys` and `fixed` do not cover.

        Args:
            values: the content of config.json, with the defaults.
        Raises:
            CommandError: the model section has no counterpart of a value.
        """
        if self.activation_key is None:
            return {}
        names = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | _SYNONYMS
        return {"activation": translate_value(names, self.activation_key, values)}

    def adjust_section(self, model: ModelConfig, stored: Collection[str]) -> ModelConfig:
        """Return the model section, corrected by the names of the folder's tensors."""
        return model


def translate_value(names: Mapping[str, str], key: str, values: Mapping[str, Any]) -> str:
    """Return our name of the value of a key.

    Raises:
        CommandError: the value is not in `names`.
    """
    if values[key] not in names:
        raise CommandError(f"{key} {values[key]!r}: only {', '.join(names)} are supported")
    return names[values[key]]


def attention_mismatches(model: ModelConfig) -> list[str]:
    """Return unsupported values for a family whose equal heads add up to the hidden size."""
    wrong = key_value_mismatches(model)
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        wrong.append(f"head_dim {model.head_dim}")
    if model.activation not in ACTIVATIONS:
        wrong.append(f"activation {model.activation!r}")
    return wrong


def key_value_mismatches(model: ModelConfig) -> list[str]:
    """Return the number of key/value heads if the model has grouped-query attention."""
    if model.num_key_value_heads == model.num_attention_heads:
        return []
    return [f"num_key_value_heads {model.num_key_value_heads}"]

"""A family of Hugging Face's models: how its config.json and its tensors correspond to ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalite.config import ModelConfig
from megalite.errors import CommandError

# Our activations and Hugging Face's names of them.
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
_SYNONYMS = {"gelu_pytorch_tanh": "gelu_tanh"}  # further names that are read
# Keys of the model section that many families call the same.
COMMON_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *("initializer_range", "attention_dropout"),
)
# Values of the model section that mean the absence of a part.
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
    """A model type of Hugging Face. A subclass maps values that are not one key for one key.

    Attributes:
        model_type: its name in config.json.
        architecture: the class of transformers that loads an exported folder.
        keys: our key, and the family's key of the same value.
        fixed: values of our model section that all models of the family have.
        required: values that its config.json must have if it has the key.
        defaults: values of keys that its config.json lacks.
        renames: patterns and replacements that make the family's name of a canonical tensor's name,
            applied in order.
        transposed: pattern of the tensors that are stored as [in, out].
        fused: pattern of the tensors that hold several of ours, stacked in the order of `parts`.
        parts: names of the projections in a fused tensor.
        prefix: prefix of names that a folder of the bare model lacks.
        activation_key: its key of the activation, or None.
        optional: its keys that config.json may lack without a default.
        nullable: its keys whose null differs from a missing key.
        redundant: pattern of further tensors that a folder may hold and that are not read.
        preferred: if true, a model that fits several families is exported as this one.
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
        """Return other names under which folders store the tensor that the family calls `name`."""
        return ()

    def copies(self, model: ModelConfig) -> dict[str, str]:
        """Return further names under which an export stores tensors: name, canonical name."""
        return {}

    def buffers(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of tensors of zeros that the family's class expects."""
        return {}

    def mismatches(self, model: ModelConfig) -> list[str]:
        """Return values of a model that the family lacks, in addition to those against `fixed`."""
        return []

    def extra_config(self, model: ModelConfig) -> dict[str, Any]:
        """Return values of config.json that are not in `keys` and `required`."""
        if self.activation_key is None:
            return {}
        return {self.activation_key: ACTIVATIONS[model.activation]}

    def extra_section(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values of the model section that are not in `keys` and `fixed`.

        Args:
            values: of config.json, with the defaults.
        Raises:
            CommandError: a value that has no counterpart in the model section.
        """
        if self.activation_key is None:
            return {}
        names = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | _SYNONYMS
        return {"activation": known_value(names, self.activation_key, values)}

    def adjust_section(self, model: ModelConfig, stored: Collection[str]) -> ModelConfig:
        """Return the model section that fits the names of the tensors a folder has."""
        return model


def known_value(names: Mapping[str, str], key: str, values: Mapping[str, Any]) -> str:
    """Return our name of the value of a key.

    Raises:
        CommandError: it has no name here.
    """
    if values[key] not in names:
        raise CommandError(f"{key} {values[key]!r}: only {', '.join(names)} are known")
    return names[values[key]]


def attention_mismatches(model: ModelConfig) -> list[str]:
    """Return values that a family lacks whose heads are all equal and fill the hidden size."""
    wrong = key_value_mismatches(model)
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        wrong.append(f"head_dim {model.head_dim}")
    if model.activation not in ACTIVATIONS:
        wrong.append(f"activation {model.activation!r}")
    return wrong


def key_value_mismatches(model: ModelConfig) -> list[str]:
    """Return the number of key/value heads if the model has grouped heads."""
    if model.num_key_value_heads == model.num_attention_heads:
        return []
    return [f"num_key_value_heads {model.num_key_value_heads}"]

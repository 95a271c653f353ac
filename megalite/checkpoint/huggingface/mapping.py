"""A model section as Hugging Face's config.json, and the other way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megalite.checkpoint.huggingface.families import FAMILIES, Family
from megalite.config import ModelConfig
from megalite.errors import CommandError

_ROPE_KEYS = {
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
_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
_GATES = {"relu": "relu", "gelu": "gelu", "geglu_tanh": "gated-gelu", "swiglu": "gated-silu"}


def family_of(model: ModelConfig) -> Family:
    """The family a model can be exported as.

    Raises:
        CommandError: none; with what stands in the way of the nearest.
    """
    if model.num_labels:
        raise CommandError(
            "this is a classifier, whose texts and head Hugging Face's classes read in other ways: "
            "launcher/eval.py --predictions tells the labels of new texts"
        )
    nearest: list[tuple[int, str]] = []
    for family in FAMILIES:
        ours = {key: getattr(model, key) for key in family.ours}
        wrong = [f"{k} {v!r}" for k, v in ours.items() if v != family.ours[k]]
        wrong += _odd(family, model)
        if not wrong:
            return family
        if model.architecture == family.ours["architecture"]:
            nearest.append((len(wrong), f"{family.model_type} has no {', '.join(wrong)}"))
    raise CommandError(
        f"Hugging Face has no model like this one: the nearest, {min(nearest)[1]}; it can be "
        "trained, evaluated and generated from here"
    )


def _odd(family: Family, model: ModelConfig) -> list[str]:
    """What a family's fixed values do not tell of a model that is none of it."""
    kind, found = family.model_type, list[str]()
    if kind in ("gpt2", "bert", "t5", "marian"):
        if model.num_key_value_heads != model.num_attention_heads:
            found.append(f"num_key_value_heads {model.num_key_value_heads}")
        if kind != "t5" and model.head_dim * model.num_attention_heads != model.hidden_size:
            found.append(f"head_dim {model.head_dim}")
        if model.activation not in (_GATES if kind == "t5" else _ACTIVATIONS):
            found.append(f"activation {model.activation!r}")
    if kind == "llama" and model.hidden_size % model.num_attention_heads:
        found.append(f"hidden_size {model.hidden_size}")  # which its class refuses
    if kind in ("llama", "qwen3") and model.attention_bias != model.attention_output_bias:
        found.append(f"attention_output_bias {model.attention_output_bias}")
    root = math.sqrt(model.hidden_size)
    if kind == "t5":
        if not math.isclose(model.logits_scaling, root if model.tie_word_embeddings else 1.0):
            found.append(f"logits_scaling {model.logits_scaling}")
        if model.attention_dropout != model.hidden_dropout:
            found.append(f"attention_dropout {model.attention_dropout}")
    if kind == "marian" and not (
        model.embedding_multiplier == 1 or math.isclose(model.embedding_multiplier, root)
    ):
        found.append(f"embedding_multiplier {model.embedding_multiplier}")
    return found


def to_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Hugging Face's config.json of a model."""
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(model, ours) for ours, theirs in family.keys.items()},
        **family.theirs,
    }
    kind = family.model_type
    if family.ours.get("position_embedding") == "rope":
        config["rope_theta"], scaling = model.rope_theta, model.rope_scaling
        if scaling is not None:
            values = {key: getattr(scaling, key) for key in _ROPE_KEYS[scaling.rope_type]}
            values = {key: value for key, value in values.items() if value is not None}
            config["rope_scaling"] = {"rope_type": scaling.rope_type, **values}
    if kind.startswith("qwen"):
        config["use_sliding_window"] = model.sliding_window is not None
        config |= {"sliding_window": model.sliding_window, "max_window_layers": 0}
    if family.activation:
        config[family.activation] = _ACTIVATIONS[model.activation]
    if kind == "gpt2":
        config["embd_pdrop"] = model.hidden_dropout
    if kind == "t5":
        config |= {"feed_forward_proj": _GATES[model.activation], "is_encoder_decoder": True}
        config |= {"tie_word_embeddings": model.tie_word_embeddings, "pad_token_id": 0}
    if kind == "marian":
        config["scale_embedding"] = model.embedding_multiplier != 1
        config["is_encoder_decoder"] = True
        config["pad_token_id"] = model.decoder_start_token_id
        config["decoder_ffn_dim"] = model.intermediate_size
        config["decoder_attention_heads"] = model.num_attention_heads
    if kind in ("t5", "marian"):
        layers = model.num_decoder_layers or model.num_hidden_layers
        config[family.keys["num_decoder_layers"]] = layers
    return config


def from_config(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the model section that means the same.

    Raises:
        CommandError: a model type or a value that has no counterpart here; all of them at once.
    """
    kind = config.get("model_type")
    family = next((f for f in FAMILIES if f.model_type == kind), None)
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise CommandError(f"model_type {kind!r} is not one of those known here: {known}")
    told = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    faults = [
        f"{key} {told[key]!r}: only {value!r} is known"
        for key, value in family.theirs.items()
        if key in told and told[key] != value
    ]
    missing = {theirs for theirs in family.keys.values() if theirs not in told}
    missing -= {"n_inner", "num_key_value_heads", "head_dim", "num_decoder_layers"}
    faults += [f"{key} is missing" for key in sorted(missing - {"sliding_window"})]
    if faults:
        raise CommandError("; ".join(faults))
    model = {**family.ours, **{ours: told.get(theirs) for ours, theirs in family.keys.items()}}
    if "sliding_window" in config and config["sliding_window"] is None:
        model["sliding_window"] = None
    model |= _rest_of_model(family, told)
    return family, {key: value for key, value in model.items() if value is not None}


def _rest_of_model(family: Family, told: Mapping[str, Any]) -> dict[str, Any]:
    """What is not one key for one key."""
    kind, found = family.model_type, dict[str, Any]()
    if family.ours.get("position_embedding") == "rope":
        found |= _rope(told)
    if kind == "llama" or kind == "qwen3":
        found["attention_output_bias"] = told["attention_bias"]
    if kind.startswith("qwen"):
        kinds = set(told.get("layer_types", ()))
        if told.get("use_sliding_window"):
            if kinds != {"sliding_attention"} and (kinds or told.get("max_window_layers") != 0):
                raise CommandError("use_sliding_window in some layers and not in others: not known")
            found["sliding_window"] = told.get("sliding_window")
    if family.activation:
        theirs = {**{v: k for k, v in _ACTIVATIONS.items()}, "gelu_pytorch_tanh": "gelu_tanh"}
        found["activation"] = _known(theirs, family.activation, told)
    if kind == "gpt2" and told.get("n_inner") is None:
        found["intermediate_size"] = 4 * told["n_embd"]
    if kind in ("t5", "marian"):
        root = math.sqrt(told["d_model"])
    if kind == "t5":
        found["activation"] = _known({v: k for k, v in _GATES.items()}, "feed_forward_proj", told)
        tied = told.get("tie_word_embeddings", True)
        # transformers 5 always writes a tied head, and whether it is scaled in a key of its own
        scaled = told.get("scale_decoder_outputs", tied)
        found |= {"tie_word_embeddings": tied, "logits_scaling": root if scaled else 1.0}
        found |= {"attention_dropout": told["dropout_rate"], "max_position_embeddings": 512}
    if kind == "marian":
        found["embedding_multiplier"] = root if told["scale_embedding"] else 1.0
        for part in ("ffn_dim", "attention_heads"):
            whole = told[f"encoder_{part}"]
            if told.get(f"decoder_{part}", whole) != whole:
                raise CommandError(f"decoder_{part} differs from encoder_{part}: not known")
    return found


def _known(names: Mapping[str, str], key: str, told: Mapping[str, Any]) -> str:
    if told[key] not in names:
        raise CommandError(f"{key} {told[key]!r}: only {', '.join(names)} are known")
    return names[told[key]]


def _rope(told: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE as transformers 5 writes it (rope_parameters) or as 4 did (rope_theta, rope_scaling)."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(told.get(key) or {}, dict):
            raise CommandError(f"{key} is {told[key]!r:.40}; give an object with its rope_type")
    section = {**(told.get("rope_parameters") or {}), **(told.get("rope_scaling") or {})}
    kind = section.pop("rope_type", section.pop("type", "default"))
    section.pop("type", None)
    theta = section.pop("rope_theta", told.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in _ROPE_KEYS:
        raise CommandError(f"rope_type {kind!r}: only {', '.join(_ROPE_KEYS)} are known")
    odd = {key: value for key, value in section.items() if key not in _ROPE_KEYS[kind]}
    if odd.pop("truncate", True) is not True or any(v is not None for v in odd.values()):
        raise CommandError(f"rope_scaling {kind} with {', '.join(sorted(odd))}: not known")
    section = {key: section[key] for key in _ROPE_KEYS[kind] if section.get(key) is not None}
    if kind == "yarn":
        section.setdefault("original_max_position_embeddings", told["max_position_embeddings"])
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **section}}

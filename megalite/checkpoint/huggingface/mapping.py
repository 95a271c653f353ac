"""Conversion between a model section and Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite import registry
from megalite.checkpoint.huggingface.families import FAMILIES, all_families, find_family
from megalite.checkpoint.huggingface.family import Family
from megalite.config import ModelConfig
from megalite.errors import CommandError


def family_of(model: ModelConfig) -> Family:
    """Return the family that a model can be exported as.

    Raises:
        CommandError: no family fits. The message says what the nearest family does not support.
    """
    if model.num_labels:
        raise CommandError(
            "this is a classifier, and Hugging Face's classifiers have other heads and inputs: use "
            "megalite eval --predictions to write the labels of new texts"
        )
    model = _without_uniform_list(model)
    nearest: list[tuple[int, str]] = []
    for family in all_families():
        values = {key: getattr(model, key) for key in family.fixed}
        wrong = [f"{key} {value!r}" for key, value in values.items() if value != family.fixed[key]]
        wrong += family.mismatches(model)
        if not wrong:
            return family
        if model.architecture == family.fixed["architecture"]:
            nearest.append((len(wrong), f"{family.model_type} has no {', '.join(wrong)}"))
    raise CommandError(
        f"Hugging Face has no model like this one: the nearest, {min(nearest)[1]}; use it in "
        "MegaLite, which trains, evaluates and generates with it"
    )


def to_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the content of a model's config.json."""
    model = _without_uniform_list(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{theirs: getattr(model, ours) for ours, theirs in family.keys.items()},
        **family.required,
        **family.extra_config(model),
    }


def _without_uniform_list(model: ModelConfig) -> ModelConfig:
    """Return the model, without the list of layer types if all are equal."""
    is_uniform = len(set(model.layer_types or ())) == 1
    return model.model_copy(update={"layer_types": None}) if is_uniform else model


def from_config(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Return the family of a config.json, and the equivalent model section.

    Raises:
        CommandError: the model type or a value is not supported. The message lists all values.
    """
    kind = config.get("model_type")
    family = find_family(kind) if isinstance(kind, str) else None
    if family is None:
        names = ", ".join(sorted((*FAMILIES, *registry.families.names)))
        raise CommandError(f"model_type {kind!r} is not supported: use one of {names}")
    stated = {k: v for k, v in config.items() if v is not None or k in family.nullable}
    values = {**family.defaults, **stated}
    faults = [
        f"{key} {values[key]!r}: only {value!r} is supported"
        for key, value in family.required.items()
        if key in values and values[key] != value
    ]
    missing = {key for key in family.keys.values() if key not in values}
    faults += [f"{key} is missing" for key in sorted(missing - {*family.optional})]
    if faults:
        raise CommandError("; ".join(faults))
    model = {**family.fixed, **{ours: values.get(theirs) for ours, theirs in family.keys.items()}}
    model |= family.extra_section(values)
    return family, {key: value for key, value in model.items() if value is not None}

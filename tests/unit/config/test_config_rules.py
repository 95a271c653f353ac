# covers: megalite/config/rules.py
"""Rules between the fields of a run file."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megalite.config import RunConfig, parse_config
from megalite.errors import ConfigError
from tests.helpers.runs import BASE


def change(**keys: Any) -> dict[str, Any]:
    """Return BASE with each `section__key=value` applied."""
    raw = copy.deepcopy(BASE)
    for key, value in keys.items():
        *sections, name = key.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return raw


def faults(**keys: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(change(**keys))
    return [fault.removeprefix("the run file: ") for fault in caught.value.faults]


@pytest.mark.parametrize(
    "keys",
    [
        {"model__head_dim": 10},  # wider or narrower than hidden_size / heads
        {"model__hidden_size": 30, "model__head_dim": 8},
        {"model__num_attention_heads": 32, "model__position_embedding": "learned"},
        {"model__num_key_value_heads": 1},
        {"schedule": {"warmup_steps": 1000}},  # a short trial of a long run
        {"schedule": {"name": "wsd", "warmup_steps": 20, "decay_steps": 80}},
        {"data__train": [{"path": "a", "weight": 3}, {"path": "b", "weight": 0.5}]},
        {"name": "7b-v1.2_x"},
        {"training__precision": "bf16"},
        {"training__precision": "fp32", "deepspeed": {"zero_optimization": {"stage": 0}}},
        {"logging": {"samples": {"prompts": ["é"]}, "wandb": {"project": "p"}}},
        {"checkpoint": {"background": False}, "parallel": {"tensor": 4, "sequence": False}},
    ],
)
def test_rules_accept_valid_combinations(keys: dict[str, Any]) -> None:
    assert isinstance(parse_config(change(**keys)), RunConfig)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"model__hidden_size": 34},
            "model.hidden_size: 34 is not a multiple of num_attention_heads 4; try 32 or 36, or "
            "set model.head_dim",
        ),
        (
            {"model__architecture": "encoder", "objective": {"mask_token_id": 3},
             "logging__samples": {"prompts": ["a"]}},
            "logging.samples: an encoder generates no text; remove it",
        ),
        (
            {"finetune": {"task": "classification", "data": {"path": "a", "max_length": 64}},
             "data__train": [], "logging__samples": {"prompts": ["a"]}},
            "logging.samples: a classifier generates no text; remove it",
        ),
        (
            {"model__head_dim": 9},
            "model.head_dim: rope needs an even head width, got 9; make it even",
        ),
        (
            {"model__num_key_value_heads": 3},
            "model.num_key_value_heads: 3 does not divide num_attention_heads 4; try 1, 2, 4",
        ),
        (
            {"parallel__tensor": 3},
            "parallel.tensor: 3 does not divide the key/value heads (4) and the MLP (64); try 1 "
            "or 2 or 4",
        ),
        (
            {"data__sequence_length": 65},
            "data.sequence_length: 65 is over model.max_position_embeddings 64; lower the first "
            "or raise the second",
        ),
        (
            {"model__position_embedding": "sinusoidal", "model__hidden_size": 33,
             "model__num_attention_heads": 3},
            "model.hidden_size: sinusoidal positions need an even hidden_size, got 33; make it "
            "even",
        ),
        (
            {"checkpoint": {"every": 10, "keep_every": 25}},
            "checkpoint.keep_every: 25, but the run is saved every 10 steps; try 20 or 30",
        ),
        (
            {"checkpoint": {"every": 0, "keep_every": 25}},
            "checkpoint.keep_every: 25, but the run is saved only at the end; remove it, or set "
            "checkpoint.every",
        ),
        (
            {"training__profile": [5, 3]},
            "training.profile: [5, 3] is not a range of steps of the run; set it to a first and a "
            "last step, up to training.steps 100",
        ),
        (
            {"training__profile": [99, 101]},
            "training.profile: [99, 101] is not a range of steps of the run; set it to a first "
            "and a last step, up to training.steps 100",
        ),
        (
            {"checkpoint": {"keep_best": True}},
            "checkpoint.keep_best: needs a validation score, but data.valid is empty; name "
            "held-out shards in it, or set keep_best to false",
        ),
        (
            {"data__train": [{"path": "a", "weight": 1}, {"path": "b"}]},
            'data.train: 1 of 2 sources have a weight, but not "b"; set weight for all or for none',
        ),
        (
            {"training__global_batch_size": 9},
            "training.global_batch_size: 9 is not a multiple of micro_batch_size 2; try 8 or 10",
        ),
        (
            {"data__sequence_length": 62, "parallel": {"tensor": 4, "sequence": True}},
            "data.sequence_length: parallel.sequence splits 62 tokens over the ranks, but "
            "parallel.tensor 4 does not divide them; try 60 or 64, or set parallel.sequence to "
            "false",
        ),
        (
            {"schedule": {"name": "wsd", "warmup_steps": 30, "decay_steps": 71}},
            "schedule.decay_steps: warmup_steps 30 + decay_steps 71 is over training.steps 100; "
            "shorten one, or remove decay_steps",
        ),
        (
            {"schedule": {"name": "constant", "decay_steps": 5}},
            "schedule.decay_steps: a constant schedule has no decay; remove it or change "
            "schedule.name",
        ),
        (
            {"training__precision": "fp16", "deepspeed": {"zero_optimization": {"stage": 0}}},
            "training.precision: fp16 with ZeRO stage 0 has no fp32 master weights; set "
            "deepspeed.zero_optimization.stage to 1",
        ),
        (
            {"logging": {"directory": "a\0b"}},
            'logging.directory: "a\\u0000b" contains unprintable characters; remove them',
        ),
    ],
)  # fmt: skip
def test_broken_rule_states_values_and_remedy(keys: dict[str, Any], message: str) -> None:
    assert faults(**keys) == [message]


@pytest.mark.parametrize("weight", [0, -1.0, "1", True])
def test_weights_are_positive_numbers(weight: Any) -> None:
    [fault] = faults(data__train=[{"path": "a", "weight": weight}])
    assert fault.startswith("data.train[0].weight: expected a number")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a b", "x" * 101, "-x", "é"])
def test_name_that_is_not_a_folder_name_is_refused(name: str) -> None:
    [fault] = faults(name=name)
    assert fault.startswith("name: ")


def test_finetune_section_may_be_null() -> None:
    assert isinstance(parse_config(change(finetune=None)), RunConfig)


def test_misspelt_architecture_is_answered_with_the_nearest_one() -> None:
    [fault] = faults(model__architecture="decodr")
    names = "decoder, encoder, encoder_decoder"
    expected = f'expected one of {names}, got "decodr"; did you mean "decoder"?'
    assert fault == f"model.architecture: {expected}"


ENCODER = {"model__architecture": "encoder", "objective": {"mask_token_id": 3}}


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        (
            {"model__num_decoder_layers": 2},
            "model.num_decoder_layers",
            'architecture "encoder_decoder"; remove it',
        ),
        (ENCODER | {"model__sliding_window": 8}, "model.sliding_window", 'architecture "decoder"'),
        ({"model__type_vocab_size": 2}, "model.type_vocab_size", '"encoder"; remove it'),
        (
            {"model__rope_scaling": {"rope_type": "linear", "factor": 2.0}}
            | {"model__position_embedding": "learned"},
            "model.rope_scaling",
            'position_embedding "rope"; remove it',
        ),
        (
            {"model__rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "model.rope_scaling.original_max_position_embeddings",
            "yarn needs the original context length; set it, in tokens",
        ),
        ({"model__architecture": "encoder"}, "objective.mask_token_id", "got null"),
        (
            {"model__architecture": "encoder", "objective": {"mask_token_id": 10**6}},
            "objective.mask_token_id",
            "1000000",
        ),
        ({"objective": {"name": "masked"}}, "objective.name", 'set it to "causal"'),
        (
            {"model__architecture": "encoder_decoder", "data__mask_documents": True},
            "data.mask_documents",
            'objective "span_corruption" cannot separate documents',
        ),
        (
            {"model__architecture": "encoder_decoder", "parallel": {"tensor": 2, "sequence": True}},
            "data.sequence_length",
            "encoder tokens (of 64) over the ranks, but parallel.tensor 2 does not divide them",
        ),
    ],
)
def test_key_that_does_not_apply_to_the_architecture_is_refused(
    keys: dict[str, Any], key: str, message: str
) -> None:
    [fault] = faults(**keys)
    assert fault.startswith(f"{key}: ")
    assert message in fault


def test_objective_follows_the_architecture() -> None:
    for kind, name in (("decoder", "causal"), ("encoder_decoder", "span_corruption")):
        assert parse_config(change(model__architecture=kind)).objective.name == name
    assert parse_config(change(**ENCODER)).objective.name == "masked"

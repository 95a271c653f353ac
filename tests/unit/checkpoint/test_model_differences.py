# covers: megalite/checkpoint/differences.py megalite/checkpoint/stored.py
"""Differences between a run's model and the one it starts from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite import arch
from megalite.checkpoint import GrownVocabulary, compare_models
from megalite.config import ModelConfig
from megalite.errors import CommandError
from tests.helpers.models import model_config

SOURCE = Path("there")
LINEAR = {"rope_type": "linear", "factor": 2.0}


def compare(changes: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    theirs = model_config(**(before or {}))
    return compare_models(model_config(**((before or {}) | changes)), theirs, SOURCE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 5e5),
        ("rope_scaling", LINEAR),
        ("norm_eps", 1e-6),
        ("sliding_window", 16),
        ("max_position_embeddings", 16),
        ("vocab_size", 70),
    ],
)
def test_change_that_keeps_shapes_is_logged_and_returned(
    key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="megalite"):
        changes = compare({key: value})
    assert list(changes) == [f"model.{key}"]
    assert len(caplog.records) == 1
    assert f"model.{key}: " in caplog.text
    before = model_config().model_dump(mode="json")[key]
    assert changes[f"model.{key}"]["before"] == before
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_adapters_with_a_grown_vocabulary_are_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="megalite"):
        compare_models(model_config(vocab_size=70), model_config(), SOURCE)
        assert not caplog.records
        compare_models(model_config(vocab_size=70), model_config(), SOURCE, adapters=True)
    assert "finetune.adapter does not train the embedding" in caplog.text


def test_values_for_training_only_are_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="megalite"):
        assert compare({"hidden_dropout": 0.1, "initializer_range": 0.3}) == {}
    assert not caplog.records


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 48},
        {"vocab_size": 60},
        {"activation": "geglu"},
        {"tie_word_embeddings": True},
        {"qk_norm": True},
        {"norm_position": "post"},
    ],
)
def test_other_model_is_refused_with_the_section_to_paste(changes: dict[str, Any]) -> None:
    with pytest.raises(CommandError, match="there holds another model: ") as caught:
        compare(changes)
    key, value = next(iter(changes.items()))
    assert f"model.{key} is {value!r}" in str(caught.value)
    assert '"model": {"' in str(caught.value)
    assert ("can only grow" in str(caught.value)) == (key == "vocab_size")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("before", "changes", "warns"),
    [
        ({}, {"max_position_embeddings": 64}, True),
        ({}, {"max_position_embeddings": 64, "rope_theta": 5e5}, True),
        ({}, {"max_position_embeddings": 64, "rope_scaling": LINEAR}, False),
        ({}, {"max_position_embeddings": 128, "rope_scaling": LINEAR}, True),
        ({}, {"max_position_embeddings": 128, "rope_scaling": YARN}, False),
        ({}, {"max_position_embeddings": 16}, False),
        ({"rope_scaling": LINEAR}, {"max_position_embeddings": 64}, True),
        (
            {"rope_scaling": LINEAR},
            {"max_position_embeddings": 64, "rope_scaling": LINEAR | {"factor": 4.0}},
            False,
        ),
        ({"position_embedding": "sinusoidal"}, {"max_position_embeddings": 64}, True),
        ({"position_embedding": "none"}, {"max_position_embeddings": 64}, False),
    ],
)
def test_positions_beyond_training_are_warned_about(
    before: dict[str, Any],
    changes: dict[str, Any],
    warns: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="megalite"):
        compare(changes, before)
    assert ("trained on positions up to 32" in caplog.text) == warns
    if warns and not before:
        assert "model.rope_scaling" in caplog.text


@pytest.mark.parametrize("length", [16, 64])
def test_learned_positions_cannot_change(length: int) -> None:
    with pytest.raises(CommandError, match=r"learned table of 32 positions.*max_length"):
        compare({"max_position_embeddings": length}, {"position_embedding": "learned"})


class _RandomTensors:
    """Source of a model's tensors with random values."""

    def __init__(self, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tensors = {
            name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in arch.tensors(model).items()
        }

    def read(self, tensor: str, _state: str, target: torch.Tensor, box: Any) -> None:
        target.copy_(self.tensors[tensor][box])


def test_new_rows_are_the_mean_of_the_old_ones() -> None:
    """Weights and biases, in any box of rows. Other tensors do not change."""
    model = model_config(architecture="encoder", norm="layernorm")
    stored = _RandomTensors(model)
    after = arch.tensors(model.model_copy(update={"vocab_size": 70}))
    for name, tensor in after.items():
        old = stored.tensors[name]
        expected = old
        if tensor.split is arch.Split.VOCABULARY:
            mean = old.double().mean(dim=0, keepdim=True).float()
            expected = torch.cat((old, mean.expand(9, *old.shape[1:])))
        assert expected.shape == tensor.shape
        for first, last in ((0, len(expected)), (0, 1), (len(expected) // 2, len(expected))):
            rows, *rest = (slice(0, size) for size in tensor.shape)
            rows = slice(first, last)
            value = torch.full((last - first, *tensor.shape[1:]), torch.nan)
            GrownVocabulary(stored, model).read(name, "weight", value, (rows, *rest))
            assert torch.equal(value, expected[first:last]), name
    assert {"lm_head.bias", "lm_head.weight", "model.embed_tokens.weight"} <= after.keys()

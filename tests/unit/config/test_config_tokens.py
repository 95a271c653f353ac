# covers: megalite/config/schema.py
"""`training.tokens`: the length of a run in tokens, which is converted to steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import load_config, parse_config
from megalite.errors import ConfigError
from tests.helpers.runs import BASE, merge_sections


def with_tokens(tokens: Any, **training: Any) -> dict[str, Any]:
    """Return a run file of 8 x 64 tokens a step whose length is `tokens`."""
    raw = merge_sections(BASE, {"training": {"tokens": tokens} | training})
    if "steps" not in training:
        del raw["training"]["steps"]
    return raw


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        (512, 1),
        (513, 2),
        (51_200, 100),
        (1, 1),
        (5.12e5, 1000),
        (2e10, 39062500),
        (15e12, 29296875000),
    ],
)
def test_tokens_become_whole_steps(tokens: Any, steps: int) -> None:
    config = parse_config(with_tokens(tokens))
    assert config.training.steps == steps
    assert config.training.tokens is None
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "20B", True])
def test_invalid_number_of_tokens_is_one_fault(tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"training.tokens") as caught:
        parse_config(with_tokens(tokens))
    assert len(caught.value.faults) == 1


def test_invalid_batch_size_is_the_only_fault() -> None:
    with pytest.raises(ConfigError, match=r"training.global_batch_size") as caught:
        parse_config(with_tokens(512, global_batch_size=0))
    assert len(caught.value.faults) == 1


def test_tokens_and_steps_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"51200 tokens, but training.steps is also set, to 7"):
        parse_config(with_tokens(51_200, steps=7))


def test_run_without_a_length_is_refused() -> None:
    raw = merge_sections(BASE, {})
    del raw["training"]["steps"]
    with pytest.raises(ConfigError, match=r"training.steps"):
        parse_config(raw)


def test_later_length_replaces_the_earlier_one(tmp_path: Path) -> None:
    """A later length is in a file that extends another, or on the command line."""
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    child = {"extends": "base.json", "training": {"tokens": 5120}}
    (tmp_path / "child.json").write_text(json.dumps(child))
    assert load_config(tmp_path / "child.json").training.steps == 10
    assert load_config(tmp_path / "child.json", ["training.steps=3"]).training.steps == 3
    assert load_config(tmp_path / "base.json", ["training.tokens=1024"]).training.steps == 2


def test_tokens_are_refused_in_fine_tuning() -> None:
    raw = with_tokens(512)
    raw["finetune"] = {"task": "classification", "data": {"train": "a.csv", "text_column": "t"}}
    with pytest.raises(ConfigError, match=r"training.tokens: only applies to pretraining"):
        parse_config(raw)

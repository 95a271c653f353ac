# covers: megalite/api.py
"""`Model.loss` is the loss that Hugging Face's transformers computes for a text."""

from __future__ import annotations

from pathlib import Path

import pytest

import megalite
from megalite.checkpoint.huggingface import export
from megalite.config import ModelConfig
from megalite.errors import CommandError
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import model_section
from tests.helpers.tokenizers import json_folder
from tests.unit.huggingface.test_huggingface_families import InMemory, random_model

transformers = pytest.importorskip("transformers")


def make_folder(folder: Path, family: str, around: str | None = None) -> Path:
    """Write a random model with a byte tokenizer as a Hugging Face folder."""
    config = ModelConfig.model_validate(model_section(family, 1) | {"vocab_size": 300})
    tokenizer = load_tokenizer(json_folder(folder / "tokenizer", around=around))
    export(InMemory(random_model(config), config), config, tokenizer, folder / family)
    return folder / family


@pytest.mark.parametrize(("family", "around"), [("llama", "<s> $A"), ("gpt2", None)])
def test_loss_of_a_text_equals_that_of_transformers(
    tmp_path: Path, family: str, around: str | None
) -> None:
    folder = make_folder(tmp_path, family, around)
    text = "a text of 23 bytes, é"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss
    assert megalite.load(folder).loss(text) == pytest.approx(float(theirs), rel=1e-5)


def test_loss_of_a_text_needs_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is no decoder, and only a decoder has a loss"):
        megalite.load(make_folder(tmp_path, "bert")).loss("a text")


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 1), ("a" * 66, 66)])
def test_loss_of_a_text_refuses_too_few_or_too_many_tokens(
    tmp_path: Path, text: str, tokens: int
) -> None:
    model = megalite.load(make_folder(tmp_path, "llama"))
    assert model.loss("a" * 65) > 0
    with pytest.raises(CommandError, match=f"the text has {tokens} tokens; give 2 to 65"):
        model.loss(text)
    with pytest.raises(CommandError, match="is not UTF-8"):
        model.loss("\ud800")


def test_turns_are_rendered_by_the_chat_template(tmp_path: Path) -> None:
    model = megalite.load(make_folder(tmp_path, "llama"))
    turns = [{"role": "user", "content": "2 plus 3?"}]
    answers = [model.generate(turns, 6, temperature=0) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0] != model.generate("2 plus 3?", 6, temperature=0)
    with pytest.raises(CommandError, match="temperature is -1"):
        model.generate("a", temperature=-1)

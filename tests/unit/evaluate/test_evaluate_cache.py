# covers: megalite/model/cache.py
# covers: megalite/evaluate/loading.py
"""Text with the cache and without it, alone and next to others, and as transformers writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config import ModelConfig
from megalite.errors import CommandError
from megalite.evaluate import LoadedModel, UncachedDecoder, generate, open_model, stream_texts
from megalite.evaluate.generate import Sampling, sample_ids
from megalite.tokenizers.tokenizer import load_tokenizer
from tests.helpers.families import FAMILIES, model_section
from tests.unit.huggingface.test_huggingface_families import exported, random_model

WRITERS = [family for family in FAMILIES if family != "bert"]


def opened(family: str, number: int = 2, **changes: Any) -> LoadedModel:
    config = ModelConfig.model_validate(model_section(family, number) | changes)
    tokenizer, device = load_tokenizer("bytes"), torch.device("cpu")
    model = random_model(config)
    return LoadedModel(
        Path("none"), config, config, None, model, tokenizer, Path("none"), "", device
    )


def plain(model: LoadedModel, source: list[int]) -> UncachedDecoder:
    """Score every token from the whole text before it."""
    if model.config.architecture == "decoder":
        return UncachedDecoder(lambda ids: model.model.logits(ids, last_only=True))
    first = model.config.decoder_start_token_id
    inputs = {"input_ids": torch.tensor([source])}

    def answer(ids: torch.Tensor) -> torch.Tensor:
        written = torch.cat((torch.tensor([[first]]), ids[:, len(source) :]), dim=1)
        return model.model.logits(inputs | {"decoder_input_ids": written}, last_only=True)

    return UncachedDecoder(answer)


@pytest.mark.parametrize("family", WRITERS)
def test_the_cache_changes_no_token(family: str) -> None:
    model = opened(family)
    prompts = [[5, 9, 2], [7], [3, 3, 8, 1, 40, 11]]
    alone = [
        generate(plain(model, prompt), prompt, max_new_tokens=50, temperature=0)
        for prompt in prompts
    ]
    assert len(set(map(tuple, alone))) > 1
    for prompt, expected in zip(prompts, alone, strict=True):
        assert generate(model.decoder(), prompt, max_new_tokens=50, temperature=0) == expected
    together = list(sample_ids(model.decoder(), prompts, 50, (), Sampling(0.0)))
    assert [list(row) for row in zip(*together, strict=True)] == alone
    drawn = list(sample_ids(model.decoder(), prompts, 30, (), Sampling(1.0, seed=4)))
    first = generate(model.decoder(), prompts[0], max_new_tokens=30, temperature=1.0, seed=4)
    assert [row[0] for row in drawn] == first


def test_beyond_the_window_the_last_tokens_are_read() -> None:
    model = opened("gpt2", max_position_embeddings=12)
    for prompt in ([5, 9], list(range(20))):
        reference = UncachedDecoder(model.last_logits)
        expected = generate(reference, prompt[-12:], max_new_tokens=30, temperature=0)
        assert generate(model.decoder(), prompt, max_new_tokens=30, temperature=0) == expected


def test_an_encoder_writes_nothing() -> None:
    with pytest.raises(CommandError, match="names hidden tokens and writes no text"):
        opened("bert").decoder()


def test_the_repetition_penalty_is_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    exported("llama", 0, tmp_path / "out")
    model = open_model(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = [5, 9, 2]
    for penalty in (1.0, 1.3):
        settings = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": penalty}
        wanted = theirs.generate(torch.tensor([prompt]), eos_token_id=None, **settings)
        found = generate(
            model.decoder(), prompt, max_new_tokens=40, temperature=0, repetition_penalty=penalty
        )
        assert found == wanted[0, len(prompt) :].tolist()


def test_texts_come_in_pieces_with_their_prompts_number() -> None:
    model = opened("llama", vocab_size=258)
    texts = ["", ""]
    for number, piece in stream_texts(
        model.decoder(), model.tokenizer, ["ab", "xyz"], max_new_tokens=20, sampling=Sampling(0.0)
    ):
        texts[number] += piece
    for text, prompt in zip(texts, ("ab", "xyz"), strict=True):
        ids = model.tokenizer.encode(prompt)
        expected = generate(plain(model, ids), ids, max_new_tokens=20, temperature=0, eos_id=257)
        assert text == model.tokenizer.decode(expected)

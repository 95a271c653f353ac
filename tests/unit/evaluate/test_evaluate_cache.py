# covers: megalite/model/cache.py
# covers: megalite/evaluate/loading.py
"""Generated text is the same with and without cache or batch, and as in transformers."""

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
    """Return a decoder that computes the whole text for each token."""
    if model.config.architecture == "decoder":
        return UncachedDecoder(lambda ids: model.model.logits(ids, last_only=True))
    first = model.config.decoder_start_token_id
    inputs = {"input_ids": torch.tensor([source])}

    def answer(ids: torch.Tensor) -> torch.Tensor:
        written = torch.cat((torch.tensor([[first]]), ids[:, len(source) :]), dim=1)
        return model.model.logits(inputs | {"decoder_input_ids": written}, last_only=True)

    return UncachedDecoder(answer)


@pytest.mark.parametrize("family", WRITERS)
def test_cached_decoder_gives_the_text_of_the_uncached_decoder(family: str) -> None:
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


def test_cached_decoder_reads_the_last_tokens_beyond_the_window() -> None:
    model = opened("gpt2", max_position_embeddings=12)
    for prompt in ([5, 9], list(range(20))):
        reference = UncachedDecoder(model.last_logits)
        expected = generate(reference, prompt[-12:], max_new_tokens=30, temperature=0)
        assert generate(model.decoder(), prompt, max_new_tokens=30, temperature=0) == expected


def test_decoder_of_an_encoder_is_refused() -> None:
    with pytest.raises(CommandError, match="is an encoder, which does not generate text"):
        opened("bert").decoder()


def test_repetition_penalty_equals_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    exported("llama", 0, tmp_path / "out")
    model = open_model(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = [5, 9, 2]
    for penalty in (1.0, 1.3):
        settings = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": penalty}
        expected = theirs.generate(torch.tensor([prompt]), eos_token_id=None, **settings)
        ids = generate(
            model.decoder(), prompt, max_new_tokens=40, temperature=0, repetition_penalty=penalty
        )
        assert ids == expected[0, len(prompt) :].tolist()


def test_stream_texts_yields_pieces_with_the_number_of_the_prompt() -> None:
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

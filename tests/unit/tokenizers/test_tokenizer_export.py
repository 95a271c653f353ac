# covers: megalite/tokenizers/export.py
"""An exported tokenizer gives the same ids, and decodes them to the same text."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as HuggingFace

from megalite.tokenizers.tokenizer import PROBES, SentencePieceTokenizer, load_tokenizer

CORPUS = [
    "def read(path): return open(path).read()  # all of it",
    "The quick brown fox jumps over the lazy dog, 12 times.",
    "大规模模型的训练",
    "naïve café, Ω",
] * 40


def trained(**options: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


KINDS: dict[str, dict[str, Any]] = {
    "bpe": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "bpe as Llama's": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "unigram as T5's": {"model_type": "unigram"},
    "with user-defined symbols": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>", "    ", "fox"],
    },
}


def texts() -> list[str]:
    """Return the probes, and random sequences of their characters."""
    chosen = random.Random(1)
    alphabet = "".join(PROBES) + "   \n\t" + "".join(CORPUS[:4])
    return [*PROBES, "", *("".join(chosen.choices(alphabet, k=60)) for _ in range(60))]


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_sentencepiece_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(**KINDS[kind])
    tokenizer.export(tmp_path)
    theirs = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts():
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == tokenizer.decode(ids), text
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (
        *(tokenizer.bos_id, tokenizer.eos_id),
        tokenizer.vocab_size,
    )


def test_export_of_bytes_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.export(tmp_path)
    theirs = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts():
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (256, 257, 258)

# covers: megalite/evaluate/generate.py
"""Sampling from simple logits, and text whose characters consist of several tokens."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import pytest
import sentencepiece
import torch

from megalite.errors import CommandError, MegaLiteError
from megalite.evaluate import Sampling, generate, stream_text
from megalite.evaluate.generate import LogitsFn
from megalite.tokenizers.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

GREEDY = Sampling(temperature=0)


def fixed(scores: Sequence[float]) -> LogitsFn:
    """Return a function that gives the same logits for every input."""
    return lambda ids: torch.tensor([scores]).expand(ids.shape[0], -1)


def recite(ids: Sequence[int], prompt_length: int, vocab_size: int) -> LogitsFn:
    """Return a model that generates `ids` after its prompt, one by one."""

    def logits(seen: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(1, vocab_size)
        scores[0, ids[seen.shape[1] - prompt_length]] = 1.0
        return scores

    return logits


def pieces_of(tokenizer: Tokenizer, text: str, stop: Sequence[str] = ()) -> list[str]:
    prompt, ids = "x = ", [*tokenizer.encode(text), tokenizer.eos_id or 0]
    logits_fn = recite(ids, len(tokenizer.encode(prompt)), tokenizer.vocab_size)
    stream = stream_text(
        logits_fn, tokenizer, prompt, max_new_tokens=len(ids), sampling=GREEDY, stop=stop
    )
    return list(stream)


def frequencies(scores: Sequence[float], draws: int = 4000, **settings: float) -> list[float]:
    ids = generate(fixed(scores), [0], max_new_tokens=draws, **settings)
    counts = Counter(ids)
    return [counts[id] / draws for id in range(len(scores))]


@pytest.fixture(scope="module")
def small_model() -> SentencePieceTokenizer:
    """Return a tokenizer of 256 bytes and some 40 pieces, in which emojis become bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def read(path): return open(path).read()  # all"] * 50),
        model_writer=model,
        vocab_size=310,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def test_temperature_0_takes_the_likeliest_id_after_the_text_so_far() -> None:
    seen: list[list[int]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return torch.nn.functional.one_hot((ids[:, -1] + 1) % 5, 5).float()

    assert generate(logits, [2, 3], max_new_tokens=4, temperature=0) == [4, 0, 1, 2]
    assert seen == [[2, 3], [2, 3, 4], [2, 3, 4, 0], [2, 3, 4, 0, 1]]


def test_eos_ends_the_text_and_is_not_part_of_it() -> None:
    logits = recite([5, 6, 1, 7], 1, 8)
    assert generate(logits, [0], max_new_tokens=4, temperature=0, eos_id=1) == [5, 6]
    assert generate(logits, [0], max_new_tokens=4, temperature=0) == [5, 6, 1, 7]
    assert generate(logits, [0], max_new_tokens=0) == []


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    scores = [0.0, 1.0, 2.0, -float("inf")]
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(torch.tensor(scores) / temperature, 0).tolist()
        shares = frequencies(scores, temperature=temperature)
        assert shares == pytest.approx(expected, abs=0.03)  # 4 standard deviations
        assert shares[3] == 0


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    assert frequencies(scores, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert frequencies(scores, top_k=99)[0] > 0
    # 0.4 + 0.3 is the first sum that reaches 0.65
    assert frequencies(scores, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)
    assert frequencies(scores, top_p=0.39, draws=50) == [0, 1, 0, 0]
    assert frequencies(scores, top_p=1.0)[0] > 0
    # top_p after top_k: among 4/7 and 3/7, the first reaches 0.5
    assert frequencies(scores, top_k=2, top_p=0.5, draws=50) == [0, 1, 0, 0]


def test_temperature_that_is_tiny_is_greedy() -> None:
    assert frequencies([1.0, 900.0, 2.0], temperature=1e-30, draws=20) == [0, 1, 0]


def test_sampling_follows_the_seed() -> None:
    logits = fixed([0.0] * 50)
    first = generate(logits, [0], max_new_tokens=30, seed=1)
    assert generate(logits, [0], max_new_tokens=30, seed=1) == first
    assert generate(logits, [0], max_new_tokens=30, seed=2) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_sampling_refuses_numbers_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        generate(fixed([0.0, 1.0]), [0], **{"max_new_tokens": 1, **settings})


def test_generate_refuses_an_empty_prompt_and_non_finite_logits() -> None:
    with pytest.raises(CommandError, match="prompt has no tokens"):
        generate(fixed([0.0]), [], max_new_tokens=1)
    with pytest.raises(MegaLiteError, match="not finite"):
        generate(fixed([0.0, float("nan")]), [0], max_new_tokens=1, temperature=0)


def test_empty_prompt_becomes_the_id_that_ends_a_document() -> None:
    tokenizer = load_tokenizer("bytes")
    seen: list[list[int]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return torch.nn.functional.one_hot(torch.tensor([ord("a")]), 258).float()

    text = "".join(stream_text(logits, tokenizer, "", max_new_tokens=3, sampling=GREEDY))
    assert text == "aaa"
    assert seen[0] == [tokenizer.eos_id]


TEXTS = (
    "plain words",
    "  two  spaces\n\tand a tab",
    "大规模，naïve 😀",
    "👩\u200d👩\u200d👧 end",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_yielded_as_whole_characters(text: str) -> None:
    pieces = pieces_of(load_tokenizer("bytes"), text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(text)  # one piece per character, each as early as possible


@pytest.mark.parametrize("text", TEXTS)
def test_byte_pieces_of_sentencepiece_are_yielded_as_whole_characters(
    small_model: SentencePieceTokenizer, text: str
) -> None:
    pieces = pieces_of(small_model, text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_of_no_character_are_yielded_as_replacement_characters() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = [ord("a"), 0xE5, ord("b"), 0xE5, 0xA4]
    logits = recite(ids, 1, tokenizer.vocab_size)
    stream = stream_text(logits, tokenizer, "x", max_new_tokens=5, sampling=GREEDY)
    assert "".join(stream) == "a\ufffdb\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("return 1\n\ndef g", ["\ndef"], "return 1\n"),
        ("abcabd rest", ["abd"], "abc"),
        ("aab", ["ab"], "a"),
        ("one two three", ["three", "two"], "one "),
        ("one two", ["two!"], "one two"),
        ("stop", ["stop"], ""),
        ("好的。停", ["停"], "好的。"),
    ],
)
def test_stop_string_ends_the_text_across_tokens(
    small_model: SentencePieceTokenizer, text: str, stop: list[str], expected: str
) -> None:
    for tokenizer in (load_tokenizer("bytes"), small_model):
        assert "".join(pieces_of(tokenizer, text, stop)) == expected


def test_stop_string_ends_the_computation() -> None:
    tokenizer = load_tokenizer("bytes")
    calls = 0

    def logits(ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.nn.functional.one_hot(torch.tensor([ord("a")]), 258).float()

    stream = stream_text(logits, tokenizer, "x", max_new_tokens=50, sampling=GREEDY, stop=["aaa"])
    assert "".join(stream) == ""
    assert calls == 3


def test_stop_string_that_is_empty_is_refused_before_the_computation() -> None:
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(CommandError, match="empty stop string"):
        stream_text(fixed([]), tokenizer, "x", max_new_tokens=1, sampling=GREEDY, stop=[""])


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"top_p": 1e-300}])
def test_sampling_with_extreme_settings_chooses_the_likeliest(extreme: dict[str, float]) -> None:
    scores = torch.tensor([[0.5, 2.0, 1.0]])
    assert generate(lambda _: scores, [0], max_new_tokens=3, **extreme) == [1, 1, 1]

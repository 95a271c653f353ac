# covers: megalite/data/corruption.py megalite/config/objective.py
"""Masking and span corruption: proportions, shapes, and independence of the layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalite.config import RunConfig, parse_config, source_length, spans, target_length
from megalite.data import set_corruption
from megalite.data.corruption import SpanCorruption, TokenMasking, WordBoundaries
from megalite.errors import DataError

L, VOCABULARY, MASK, EOS = 200, 500, 499, 7


def config(architecture: str, path: str = "x", **objective: Any) -> RunConfig:
    model = {
        "architecture": architecture,
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": L,
        "decoder_start_token_id": 3,
    }
    if architecture == "encoder":
        objective = {"mask_token_id": MASK} | objective
    return parse_config(
        {
            "name": "objective",
            "model": model,
            "data": {"train": [{"path": path}], "sequence_length": L},
            "objective": objective,
            "optimizer": {"lr": 1.0},
            "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def windows(count: int, seed: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(10, 400, (count, L + 1))
    mask = np.ones((count, L), np.bool_)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask}


def test_masking_has_the_proportions_of_bert() -> None:
    arrays, samples = windows(400), np.arange(400)
    arrays["input_ids"][:, 50] = EOS
    masked = TokenMasking(config("encoder"), None, frozenset({EOS}))(arrays, samples)
    ids, chosen = arrays["input_ids"], masked["loss_mask"]
    assert np.array_equal(masked["labels"], ids)
    assert np.array_equal(masked["input_ids"][~chosen], ids[~chosen])
    assert not chosen[:, 50].any()
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    inputs = masked["input_ids"][chosen]
    assert (inputs == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs == ids[chosen]).mean() == pytest.approx(0.1, abs=0.02)


def test_masking_depends_on_the_sample_only() -> None:
    masked, arrays = TokenMasking(config("encoder"), None, frozenset()), windows(4)
    first = masked(arrays, np.array([3, 8, 9, 2**40]))
    for row, sample in enumerate((3, 8, 9, 2**40)):
        alone = {name: array[row : row + 1] for name, array in arrays.items()}
        again = masked(alone, np.array([sample]))["input_ids"][0]
        assert np.array_equal(again, first["input_ids"][row])
    later = masked(arrays, np.array([4, 9, 10, 2**40 + 1]))
    assert all((first["loss_mask"][row] != later["loss_mask"][row]).any() for row in range(4))


def test_masking_chooses_at_least_one_token_of_a_window() -> None:
    masked = TokenMasking(config("encoder", mask_probability=1e-9), None, frozenset())
    assert (masked(windows(20), np.arange(20))["loss_mask"].sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("pieces", "ids", "numbers"),
    [
        (["\u2581a", "b", ".", "\u2581", "1"], [0, 1, 1, 2, 0, 3, 4], [0, 0, 0, 1, 2, 3, 4]),
        (["un", "##do", "##ing", ".", "it"], [0, 1, 2, 4, 3], [0, 0, 0, 1, 2]),
        (["a", " ", "b"], [0, 2, 1, 2, 0], [0, 0, 1, 2, 2]),
    ],
)
def test_words_begin_at_white_space_and_punctuation(
    pieces: list[str], ids: list[int], numbers: list[int]
) -> None:
    assert WordBoundaries(pieces).word_numbers(np.array([ids]))[0].tolist() == numbers


def test_whole_words_are_masked_together() -> None:
    words = WordBoundaries([("\u2581" if id % 3 == 0 else "") + "a" for id in range(VOCABULARY)])
    arrays = windows(300)
    masked = TokenMasking(config("encoder", whole_words=True), words, frozenset())(
        arrays, np.arange(300)
    )
    numbers = words.word_numbers(arrays["input_ids"])
    for row in range(300):
        kinds = {(n, bool(h)) for n, h in zip(numbers[row], masked["loss_mask"][row], strict=True)}
        assert len(kinds) == len(set(numbers[row].tolist()))
    assert masked["loss_mask"].mean() == pytest.approx(0.15, abs=0.01)


def test_spans_are_replaced_by_sentinels_and_become_targets() -> None:
    run = config("encoder_decoder")
    noise, count = spans(run)
    assert (noise, count) == (30, 10)
    arrays = windows(50)
    spanned = SpanCorruption(run)(arrays, np.arange(50))
    assert spanned["input_ids"].shape == (50, source_length(run)) == (50, L - noise + count)
    assert spanned["labels"].shape == (50, target_length(run)) == (50, noise + count + 1)
    assert (spanned["decoder_input_ids"][:, 0] == 3).all()
    assert np.array_equal(spanned["decoder_input_ids"][:, 1:], spanned["labels"][:, :-1])
    starts = set()
    for row in range(50):
        source, target = spanned["input_ids"][row].tolist(), spanned["labels"][row].tolist()
        pieces: dict[int, list[int]] = {}
        for id in target:
            if id > VOCABULARY - 2 - count:
                pieces[id] = []
            else:
                pieces[list(pieces)[-1]].append(id)
        assert list(pieces) == [VOCABULARY - 1 - n for n in range(count + 1)]
        restored = [id for token in source for id in pieces.get(token, [token])]
        assert restored == arrays["input_ids"][row].tolist()
        starts.add(source.index(VOCABULARY - 1))
    assert len(starts) > 10


def test_whole_words_need_a_tokenizer() -> None:
    nothing: Any = SimpleNamespace(tokenizer_folder=None)
    with pytest.raises(DataError, match=r"objective.whole_words: .*tokenizer"):
        set_corruption(nothing, config("encoder", whole_words=True))

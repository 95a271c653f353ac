# covers: megalite/model/attention.py
"""Attention compared with its formula on four words, and the tokens that masks allow."""

from __future__ import annotations

import math

import pytest
import torch

from megalite.model.attention import attend, attention_mask


def test_attend_equals_the_example_of_the_docs() -> None:
    """docs/models.md explains this example. Its numbers are computed here without the model."""
    words = ["The", "quick", "brown", "fox"]
    # d = 2
    q = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]
    k = [[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]]
    v = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [4.0, 2.0]]
    expected = []
    for row in range(len(words)):
        scores = [sum(a * b for a, b in zip(q[row], key, strict=True)) / math.sqrt(2) for key in k]
        powers = [math.exp(score) for score in scores]
        weights = [power / sum(powers) for power in powers]
        expected.append(
            [sum(w * value[i] for w, value in zip(weights, v, strict=True)) for i in (0, 1)]
        )
    q_1T1H = torch.tensor(q)[None, :, None, :]
    k_11TH, v_11TH = torch.tensor(k)[None, None], torch.tensor(v)[None, None]
    result = attend(q_1T1H, k_11TH, v_11TH, None, dropout=0.0, causal=False, scale=None)
    torch.testing.assert_close(result[0], torch.tensor(expected))
    assert [round(x, 3) for x in expected[3]] == [1.196, 0.696]
    # with a causal mask the first word attends only to itself
    causal = attend(q_1T1H, k_11TH, v_11TH, None, dropout=0.0, causal=True, scale=None)
    torch.testing.assert_close(causal[0, 0], torch.tensor(v[0]))


def seen(total: int, queries: int | None = None, **options: object) -> list[list[int]] | None:
    settings = {"causal": True, "window": None, "document_ids": None, "keys": None} | options
    mask = attention_mask(queries or total, total, device=torch.device("cpu"), **settings)  # type: ignore[arg-type]
    return None if mask is None else mask[0, 0].int().tolist()


def test_attention_mask_allows_the_tokens_of_window_document_and_keys() -> None:
    assert seen(4) is None
    assert seen(4, 1) is None
    assert seen(4, causal=False) is None
    assert seen(4, window=4) is None
    assert seen(4, window=2) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert seen(4, 1, window=2) == [[0, 0, 1, 1]]
    assert seen(4, 2) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    documents = torch.tensor([[0, 0, 1, 1]])
    assert seen(4, document_ids=documents) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert seen(4, document_ids=documents, causal=False)[0] == [1, 1, 0, 0]  # type: ignore[index]
    keys = torch.tensor([[False, True, True]])
    assert seen(3, keys=keys) == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert seen(3, 1, keys=keys) == [[0, 1, 1]]


@pytest.mark.parametrize("queries", [1, 3])
def test_attend_ignores_padding(queries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, queries, 2, 4, generator=generator)
    k, v = torch.randn(2, 1, 2, 6, 4, generator=generator)
    keys = torch.tensor([[False, False, True, True, True, True]])
    settings = {"causal": True, "window": None, "document_ids": None}
    mask = attention_mask(queries, 6, keys=keys, device=q.device, **settings)  # type: ignore[arg-type]
    padded = attend(q, k, v, mask, dropout=0.0, causal=True, scale=None)
    bare = attention_mask(queries, 4, keys=None, device=q.device, **settings)  # type: ignore[arg-type]
    several = queries > 1
    alone = attend(q, k[:, :, 2:], v[:, :, 2:], bare, dropout=0.0, causal=several, scale=None)
    torch.testing.assert_close(padded, alone)

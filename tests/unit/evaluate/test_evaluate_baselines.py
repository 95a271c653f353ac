# covers: megalite/evaluate/baselines.py megalite/evaluate/table.py
# covers: megalite/evaluate/tasks/classification.py
"""Baselines of a classification: the most frequent label, and a bag of words."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from megalite.evaluate import baselines
from megalite.evaluate.baselines import measure_baselines
from megalite.evaluate.table import table
from megalite.evaluate.tasks import classification
from megalite.formats.examples import ExampleSplit, SplitInfo

INFO = SplitInfo(examples=0, tokens=0, cut=0, bad_rows=0, counts={}, sha256={})


def split(texts: list[list[int]], labels: list[int]) -> ExampleSplit:
    tokens = np.array([token for text in texts for token in text], np.int32)
    bounds = np.cumsum([0, *map(len, texts)])
    rows = np.arange(len(texts))
    return ExampleSplit("x", INFO, tokens, bounds, rows, None, np.array(labels, np.int64))


def drawn(seed: int, count: int, labels: int = 3, hints: int = 2) -> ExampleSplit:
    """Return texts of common tokens, and of `hints` tokens that depend on their label."""
    draw = random.Random(seed)
    labels_of_texts = [
        draw.choices(range(labels), [labels - n for n in range(labels)])[0] for _ in range(count)
    ]
    texts = [
        [draw.randrange(40) for _ in range(draw.randint(1, 12))]
        + [
            100 + 5 * (label if draw.random() < 0.8 else draw.randrange(labels)) + draw.randrange(5)
            for _ in range(hints)
        ]
        for label in labels_of_texts
    ]
    return split(texts, labels_of_texts)


def features(text: list[int]) -> set[Any]:
    return {*text, *pairwise(text)}


def plain_bayes(train: ExampleSplit, test: ExampleSplit, smoothing: float) -> list[int]:
    """Return the predictions of naive Bayes with dictionaries, without buckets."""
    assert train.labels is not None
    counts, totals = Counter(train.labels.tolist()), Counter[int]()
    seen: dict[int, Counter[Any]] = {label: Counter() for label in counts}
    for n, label in enumerate(train.labels.tolist()):
        seen[label].update(features(train.ids(n).tolist()))
    vocabulary = set().union(*seen.values())
    totals.update({c: sum(seen[c].values()) + smoothing * len(vocabulary) for c in counts})  # type: ignore[arg-type]
    predictions = []
    for n in range(len(test)):
        text = features(test.ids(n).tolist()) & vocabulary
        predictions.append(
            max(
                sorted(counts),
                key=lambda c: (
                    math.log(counts[c] / len(train))
                    + sum(math.log((seen[c][f] + smoothing) / totals[c]) for f in text)
                ),
            )
        )
    return predictions


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_bag_of_words_equals_naive_bayes(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_SMOOTHINGS", (smoothing,))
    train, test = drawn(1, 300), drawn(2, 120)
    metrics = measure_baselines(train, test, 3)
    assert test.labels is not None
    expected = np.array(plain_bayes(train, test, smoothing)) == test.labels
    assert metrics["bag_of_words"]["accuracy"] == pytest.approx(expected.mean(), abs=1e-12)
    assert metrics["bag_of_words"]["accuracy"] > metrics["majority"]["accuracy"] + 0.2
    assert metrics["majority"]["accuracy"] == np.mean(test.labels == 0)


def test_bag_of_words_does_not_depend_on_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = drawn(1, 300), drawn(2, 120)
    whole = measure_baselines(train, test, 3)
    assert measure_baselines(train, test, 3) == whole
    monkeypatch.setattr(baselines, "_CHUNK", 1)
    assert measure_baselines(train, test, 3) == whole


def test_bag_of_words_reads_some_parts_of_a_large_split(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = drawn(1, 3000), drawn(2, 120)
    whole = measure_baselines(train, test, 3)
    monkeypatch.setattr(baselines, "_CHUNK", 100)
    monkeypatch.setattr(baselines, "_MAX_TOKENS", len(train.tokens) // 3)
    parts = measure_baselines(train, test, 3)
    assert parts["majority"] == whole["majority"]
    assert parts["bag_of_words"]["accuracy"] > whole["bag_of_words"]["accuracy"] - 0.1


@pytest.mark.parametrize("bound", ["_MAX_TOKENS", "_MAX_SCORES"])
def test_bag_of_words_scores_a_part_of_a_large_held_out_split(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank scores while the others wait, so its time must be bounded."""
    train, test = drawn(1, 3000), drawn(2, 3000)
    assert test.labels is not None
    # rows are often sorted by label, so the parts must be spread evenly
    order = np.argsort(test.labels, kind="stable")
    test = split([test.ids(n).tolist() for n in order], test.labels[order].tolist())
    whole = measure_baselines(train, test, 3)
    assert "examples" not in whole["bag_of_words"]
    most = len(test.tokens) // 6
    labels, scored = 3, list[int]()
    monkeypatch.setattr(baselines, bound, most * (labels if bound == "_MAX_SCORES" else 1))
    guess = baselines._Bayes._guess

    def counted(self: Any, pieces: Any, N: int, *rest: Any) -> Any:
        scored.append(N)
        return guess(self, pieces, N, *rest)

    monkeypatch.setattr(baselines._Bayes, "_guess", counted)
    metrics = measure_baselines(train, test, labels)
    assert metrics["majority"] == whole["majority"]
    bag = metrics["bag_of_words"]
    assert 300 < bag["examples"] < 700  # about a sixth of 3000
    assert sum(scored[len(baselines._SMOOTHINGS) :]) == bag["examples"]
    assert bag["accuracy"] == pytest.approx(whole["bag_of_words"]["accuracy"], abs=0.1)


def test_baselines_are_scored_as_a_classifier() -> None:
    import torch

    from megalite.evaluate.metrics import classification_metrics

    train, test = split([[1], [1], [2]], [0, 0, 2]), split([[1], [2], [3], [2]], [0, 2, 1, 1])
    scores = torch.eye(3)[torch.tensor([0, 2, 0, 2])]  # the predictions of the bag of words
    expected = classification_metrics(scores, torch.tensor([0, 2, 1, 1]), ["a", "b", "c"])
    metrics = measure_baselines(train, test, 3)
    for key in ("accuracy", "f1"):
        assert metrics["bag_of_words"][key] == pytest.approx(expected[key])
    assert metrics["majority"] == {"accuracy": 0.25, "f1": pytest.approx(0.4 / 3)}


def test_baselines_never_choose_a_label_without_training_examples() -> None:
    train, test = split([[1], [2]], [0, 1]), split([[9], [1]], [2, 0])
    metrics = measure_baselines(train, test, 4)
    assert metrics["bag_of_words"]["accuracy"] == metrics["majority"]["accuracy"] == 0.5


def test_bag_of_words_has_bounded_memory_for_many_labels() -> None:
    train = drawn(1, 3000, labels=1000, hints=6)
    metrics = measure_baselines(train, train, 1000)
    assert metrics["bag_of_words"]["accuracy"] > 0.5
    bayes = baselines._Bayes(train, np.bincount(train.labels, minlength=1000))  # type: ignore[arg-type]
    assert bayes._counts_CF.size <= 1 << 25


def test_comparison_logs_model_and_baselines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    scores = {"majority": {"accuracy": 0.5}, "bag_of_words": {"accuracy": 0.75}}
    monkeypatch.setattr(classification, "baselines", lambda *_: scores)
    splits: Any = {"train": None, "test": None}
    compare = classification.Comparison(splits, 9)
    assert compare("test", {"accuracy": 0.75}, 3) == scores
    line = "test: accuracy 0.7500; a bag of words has 0.7500, the most frequent label 0.5000"
    assert line in caplog.text
    compare("test", {"accuracy": 0.8}, 9)
    assert "no better" not in caplog.text
    compare("test", {"accuracy": 0.75}, 9)
    assert "the model is no better than a bag of words on test: start from a" in caplog.text
    caplog.clear()
    # with a valid split, the test split is measured once, at the end
    compare = classification.Comparison(splits | {"valid": None}, 9)
    compare("test", {"accuracy": 0.7}, 3)
    assert "no better than a bag of words on test" in caplog.text
    shown = table({"accuracy": 0.8, "baselines": scores, "tasks": None})
    assert [line.split() for line in shown.splitlines()] == [
        ["accuracy", "0.8000"],
        ["majority", "accuracy", "0.5000"],
        ["bag_of_words", "accuracy", "0.7500"],
    ]


def test_baselines_accept_an_empty_example() -> None:
    metrics = measure_baselines(split([[], [1], []], [0, 1, 1]), split([[], [1]], [1, 1]), 2)
    assert metrics["bag_of_words"] == {"accuracy": 1.0, "f1": 0.5}

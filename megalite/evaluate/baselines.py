"""Scores that a classifier must beat to be useful: the most frequent label, and a bag of words.

The bag is a multinomial naive Bayes model over the tokens of an example and pairs of neighbours,
each counted once an example. It reads the tokens that the model reads, the training split once.

N examples   C labels   F buckets of tokens and pairs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from megalite.formats.examples import ExampleSplit

_Ints: TypeAlias = npt.NDArray[np.int64]
_Baselines: TypeAlias = "dict[str, dict[str, float]]"

_BUCKETS = 1 << 20
_CELLS = 1 << 25  # counts of all labels, at most: 128 MiB
_CHUNK = 1 << 20  # tokens that are read at once
_SMOOTHINGS = (0.03, 0.1, 0.3, 1.0)
_CHOOSERS = 5000  # training examples, at most, that the smoothing is chosen on,
_CHOICES = 1 << 20  # and at most so many times the labels
_MOST = 1 << 25  # tokens of a split that are read, in parts that are spread evenly
_GUESSES = 1 << 29  # held-out tokens times labels that are scored: under a minute on one core
_PARTS = 32  # of a held-out split of which not all is read


def measure_baselines(train: ExampleSplit, held_out: ExampleSplit, num_labels: int) -> _Baselines:
    """Return accuracy and macro F1 on `held_out` of what `train` alone says; the same each time.

    Time is bounded, because one rank measures while the others wait.

    Returns:
        `majority`: the label that is most frequent in `train`, the first of several.
        `bag_of_words`: naive Bayes, whose smoothing is chosen on a part of `train`. For a large
            `held_out` it is measured on a part, and `examples` is how many examples that part has.
    """
    labels_N = _labels(held_out)
    counts_C = np.bincount(_known(_labels(train)), minlength=num_labels)
    rows, guesses = _Bayes(train, counts_C).predict(held_out)
    bag = _scores(labels_N[rows], guesses, num_labels)
    if len(rows) < len(labels_N):
        bag["examples"] = len(rows)
    most_frequent = np.full(len(labels_N), counts_C.argmax())
    return {"majority": _scores(labels_N, most_frequent, num_labels), "bag_of_words": bag}


class _Bayes:
    """The bag of words, learned from a split with labels."""

    def __init__(self, train: ExampleSplit, counts_C: _Ints) -> None:
        self._C = C = len(counts_C)
        self._F = F = min(_BUCKETS, 1 << (_CELLS // C).bit_length() - 1)
        self._prior_C = np.log(np.maximum(counts_C, 1e-9) / counts_C.sum())
        labels_N = _labels(train)
        every = max(10, -(-len(train) // min(_CHOOSERS, max(1, _CHOICES // C))))
        seen_CF = np.zeros((C, F), np.float32)
        chosen_CF = np.zeros((C, F), np.float32)
        left: list[tuple[_Ints, _Ints]] = []
        step = -(-len(train.tokens) // _MOST)
        for part in _parts(train, _CHUNK, step=max(1, step)):
            rows, features = _features(train, *part, F)
            aside = rows % every == every - 1
            _count(seen_CF, labels_N[rows], features)
            _count(chosen_CF, labels_N[rows[aside]], features[aside])
            left.append((rows[aside] // every, features[aside]))
        known_N = labels_N[every - 1 :: every]
        fit_CF = seen_CF - chosen_CF
        right = [
            np.count_nonzero(self._guess(left, len(known_N), fit_CF, smoothing) == known_N)
            for smoothing in _SMOOTHINGS
        ]
        self._seen_CF = seen_CF
        self._smoothing = _SMOOTHINGS[int(np.argmax(right))]

    def predict(self, split: ExampleSplit) -> tuple[_Ints, _Ints]:
        """Return examples and the likeliest label of each: all, or evenly spread parts."""
        most = min(_MOST, _GUESSES // self._C)
        step = -(-len(split.tokens) // most)
        chunk = _CHUNK if step <= 1 else min(_CHUNK, max(1, most // _PARTS))
        chosen = list[_Ints]()
        guesses = list[_Ints]()
        for first, last in _parts(split, chunk, step=max(1, step)):
            rows, features = _features(split, first, last, self._F)
            piece = [(rows - first, features)]
            guesses.append(self._guess(piece, last - first, self._seen_CF, self._smoothing))
            chosen.append(np.arange(first, last))
        return np.concatenate(chosen), np.concatenate(guesses)

    def _guess(self, pieces: Any, N: int, seen_CF: npt.NDArray[Any], smoothing: float) -> _Ints:
        known_F: npt.NDArray[np.bool_] = np.asarray(seen_CF.any(axis=0))
        totals_C = seen_CF.sum(axis=1, dtype=np.float64) + smoothing * np.count_nonzero(known_F)
        scores_CN = np.tile(self._prior_C[:, None], N)
        for rows, features in pieces:
            known = known_F[features]
            rows = rows[known]
            features = features[known]
            for label in range(self._C):
                chances = np.log((seen_CF[label, features] + smoothing) / totals_C[label])
                scores_CN[label] += np.bincount(rows, chances, minlength=N)
        return scores_CN.argmax(axis=0)


def _count(into_CF: npt.NDArray[np.float32], labels: _Ints, features: _Ints) -> None:
    for label in np.unique(_known(labels)).tolist():
        into_CF[label] += np.bincount(features[labels == label], minlength=into_CF.shape[1])


def _parts(split: ExampleSplit, chunk: int, *, step: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of examples that have about `chunk` tokens, or that are one.

    Args:
        step: yield one of so many parts.
    """
    bounds = np.asarray(split.bounds)
    last = 0
    part = -1
    while last < len(split):
        first = last
        part = part + 1
        last = int(np.searchsorted(bounds, bounds[first] + chunk, side="right")) - 1
        last = min(max(last, first + 1), len(split))
        if part % step == 0:
            yield first, last


def _features(split: ExampleSplit, first: int, last: int, F: int) -> tuple[_Ints, _Ints]:
    """Return examples and the buckets of their tokens and pairs, each once an example."""
    bounds = np.asarray(split.bounds)
    tokens = np.asarray(split.tokens[bounds[first] : bounds[last]], np.uint64) + np.uint64(1)
    rows = np.repeat(np.arange(first, last), np.diff(bounds[first : last + 1]))
    inside = rows[1:] == rows[:-1]
    pairs = ((tokens[:-1] << np.uint64(32)) + tokens[1:])[inside]
    hashed = _mix(np.concatenate((tokens, pairs))) % np.uint64(F)
    both = np.concatenate((rows, rows[1:][inside])) * F + hashed.astype(np.int64)
    both.sort()  # which is faster than np.unique
    both = both[np.concatenate(([True], both[1:] != both[:-1]))]
    return both // F, both % F


def _mix(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread keys over all 64 bits (the finalizer of SplitMix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = keys ^ (keys >> np.uint64(31))
    return mixed


def _labels(split: ExampleSplit) -> _Ints:
    assert split.labels is not None
    return np.asarray(split.labels)


def _known(labels: _Ints) -> _Ints:
    known: _Ints = labels[labels >= 0]
    return known


def _scores(labels_N: _Ints, found_N: _Ints, C: int) -> dict[str, float]:
    """Return accuracy, and the plain mean of all labels' F1 (0 for a label without examples)."""
    confusion_CC = np.bincount(labels_N * C + found_N, minlength=C * C).reshape(C, C)
    right_C = confusion_CC.diagonal()
    f1_C = 2 * right_C / np.maximum(confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1), 1)
    return {"accuracy": float(right_C.sum() / len(labels_N)), "f1": float(f1_C.mean())}

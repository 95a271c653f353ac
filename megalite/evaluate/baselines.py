"""Baselines that a useful classifier must beat: the most frequent label, and a bag of words.

The bag of words is a multinomial naive Bayes model. Its features are the tokens of an example and
the pairs of neighbouring tokens, each counted once per example. The tokens are those of the model.
The training split is read once.

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
_MAX_COUNTS = 1 << 25  # counts of all labels and buckets: 128 MiB
_CHUNK = 1 << 20  # tokens that are read at a time
_SMOOTHINGS = (0.03, 0.1, 0.3, 1.0)
_MAX_TUNING = 5000  # training examples for the choice of the smoothing
_MAX_TUNING_SCORES = 1 << 20  # such examples x labels
_MAX_TOKENS = 1 << 25  # tokens that are read of a split, in evenly spread parts
_MAX_SCORES = 1 << 29  # held-out tokens x labels that are scored: under a minute on one core
_PARTS = 32  # minimum parts of a held-out split that is not read whole


def measure_baselines(train: ExampleSplit, held_out: ExampleSplit, num_labels: int) -> _Baselines:
    """Return accuracy and macro F1 of the baselines on `held_out`, deterministically.

    The time is bounded, because one rank measures while the others wait.

    Returns:
        `majority`: the most frequent label of `train`; the first one if there are several.
        `bag_of_words`: naive Bayes, whose smoothing is tuned on a part of `train`. A large
            `held_out` is measured in part; `examples` is then the number of examples in that part.
    """
    labels_N = _labels(held_out)
    counts_C = np.bincount(_present(_labels(train)), minlength=num_labels)
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
        self._F = F = min(_BUCKETS, 1 << (_MAX_COUNTS // C).bit_length() - 1)
        self._prior_C = np.log(np.maximum(counts_C, 1e-9) / counts_C.sum())
        labels_N = _labels(train)
        every = max(10, -(-len(train) // min(_MAX_TUNING, max(1, _MAX_TUNING_SCORES // C))))
        counts_CF = np.zeros((C, F), np.float32)
        tuning_CF = np.zeros((C, F), np.float32)
        tuning: list[tuple[_Ints, _Ints]] = []
        step = -(-len(train.tokens) // _MAX_TOKENS)
        for part in _parts(train, _CHUNK, step=max(1, step)):
            rows, features = _features(train, *part, F)
            tunes = rows % every == every - 1
            _count(counts_CF, labels_N[rows], features)
            _count(tuning_CF, labels_N[rows[tunes]], features[tunes])
            tuning.append((rows[tunes] // every, features[tunes]))
        tuning_N = labels_N[every - 1 :: every]
        fit_CF = counts_CF - tuning_CF
        correct = [
            np.count_nonzero(self._guess(tuning, len(tuning_N), fit_CF, smoothing) == tuning_N)
            for smoothing in _SMOOTHINGS
        ]
        self._counts_CF = counts_CF
        self._smoothing = _SMOOTHINGS[int(np.argmax(correct))]

    def predict(self, split: ExampleSplit) -> tuple[_Ints, _Ints]:
        """Return the indices and likeliest labels of all examples, or of evenly spread parts."""
        max_tokens = min(_MAX_TOKENS, _MAX_SCORES // self._C)
        step = -(-len(split.tokens) // max_tokens)
        chunk = _CHUNK if step <= 1 else min(_CHUNK, max(1, max_tokens // _PARTS))
        chosen = list[_Ints]()
        guesses = list[_Ints]()
        for first, last in _parts(split, chunk, step=max(1, step)):
            rows, features = _features(split, first, last, self._F)
            piece = [(rows - first, features)]
            guesses.append(self._guess(piece, last - first, self._counts_CF, self._smoothing))
            chosen.append(np.arange(first, last))
        return np.concatenate(chosen), np.concatenate(guesses)

    def _guess(self, pieces: Any, N: int, counts_CF: npt.NDArray[Any], smoothing: float) -> _Ints:
        present_F: npt.NDArray[np.bool_] = np.asarray(counts_CF.any(axis=0))
        totals_C = counts_CF.sum(axis=1, dtype=np.float64)
        totals_C += smoothing * np.count_nonzero(present_F)
        scores_CN = np.tile(self._prior_C[:, None], N)
        for rows, features in pieces:
            present = present_F[features]
            rows = rows[present]
            features = features[present]
            for label in range(self._C):
                log_p = np.log((counts_CF[label, features] + smoothing) / totals_C[label])
                scores_CN[label] += np.bincount(rows, log_p, minlength=N)
        return scores_CN.argmax(axis=0)


def _count(into_CF: npt.NDArray[np.float32], labels: _Ints, features: _Ints) -> None:
    for label in np.unique(_present(labels)).tolist():
        into_CF[label] += np.bincount(features[labels == label], minlength=into_CF.shape[1])


def _parts(split: ExampleSplit, chunk: int, *, step: int = 1) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of parts with about `chunk` tokens, but at least one example.

    Args:
        step: yield only every `step`-th part.
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
    """Return (example, bucket) of all tokens and pairs as two arrays, each once per example."""
    bounds = np.asarray(split.bounds)
    tokens = np.asarray(split.tokens[bounds[first] : bounds[last]], np.uint64) + np.uint64(1)
    rows = np.repeat(np.arange(first, last), np.diff(bounds[first : last + 1]))
    inside = rows[1:] == rows[:-1]
    pairs = ((tokens[:-1] << np.uint64(32)) + tokens[1:])[inside]
    hashed = _mix(np.concatenate((tokens, pairs))) % np.uint64(F)
    both = np.concatenate((rows, rows[1:][inside])) * F + hashed.astype(np.int64)
    both.sort()  # faster than np.unique
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


def _present(labels: _Ints) -> _Ints:
    """Return the labels without those that are missing."""
    present: _Ints = labels[labels >= 0]
    return present


def _scores(labels_N: _Ints, predicted_N: _Ints, C: int) -> dict[str, float]:
    """Return accuracy, and the unweighted mean of F1 (0 for a label without examples)."""
    confusion_CC = np.bincount(labels_N * C + predicted_N, minlength=C * C).reshape(C, C)
    correct_C = confusion_CC.diagonal()
    f1_C = 2 * correct_C / np.maximum(confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1), 1)
    return {"accuracy": float(correct_C.sum() / len(labels_N)), "f1": float(f1_C.mean())}

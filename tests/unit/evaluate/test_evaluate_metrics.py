# covers: megalite/evaluate/metrics.py
"""Metrics of a classifier, compared with explicit computations and with scikit-learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.errors import DataError, MegaLiteError
from megalite.evaluate.metrics import (
    classification_metrics,
    confusion_picture,
    predictions_rows,
)


def scored(rows: int, labels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random scores that are mostly correct, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    truth_N = torch.randint(labels, (rows,), generator=generator)
    scores_NC = torch.randn(rows, labels, generator=generator)
    scores_NC[torch.arange(rows), truth_N] += 1.5
    return scores_NC, truth_N


def test_metrics_of_two_labels_equal_explicit_computations() -> None:
    chances_NC = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.55, 0.45], [0.1, 0.9]])
    metrics = classification_metrics(chances_NC.log(), torch.tensor([0, 1, 1, 0, 1]), ["no", "yes"])
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["confusion"] == [[2, 0], [1, 2]]
    right = [0.9, 0.2, 0.7, 0.55, 0.9]
    assert metrics["loss"] == pytest.approx(-sum(map(math.log, right)) / 5)
    assert metrics["accuracy"] == metrics["f1_micro"] == pytest.approx(4 / 5)
    no = {"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "count": 2}
    yes = {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "count": 3}
    assert metrics["per_class"]["no"] == pytest.approx(no)
    assert metrics["per_class"]["yes"] == pytest.approx(yes)
    assert (metrics["precision"], metrics["recall"]) == pytest.approx((5 / 6, 5 / 6))
    # bins: two of 0.9 right, 0.8 wrong, 0.7 right, 0.55 right
    expected = (2 * 0.1 + 0.8 + 0.3 + 0.45) / 5
    assert metrics["calibration"] == pytest.approx(expected, abs=1e-6)


def test_metrics_of_logits_and_log_probabilities_are_equal() -> None:
    logits_NC, truth_N = scored(40, 5)
    names = list("abcde")
    first = classification_metrics(logits_NC, truth_N, names)
    second = classification_metrics(logits_NC.log_softmax(-1), truth_N, names)
    assert first.pop("per_class") == second.pop("per_class")
    assert first.pop("confusion") == second.pop("confusion")
    assert first == pytest.approx(second, abs=1e-6)


def test_metrics_count_labels_without_rows_in_the_means() -> None:
    scores_NC = torch.eye(3)[[0, 0, 1, 1]] * 5
    metrics = classification_metrics(scores_NC, torch.tensor([0, 0, 0, 1]), ["a", "b", "never"])
    assert metrics["per_class"]["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}
    means = metrics["precision"], metrics["recall"], metrics["f1"]
    assert means == pytest.approx(((1 + 1 / 2) / 3, (2 / 3 + 1) / 3, (4 / 5 + 2 / 3) / 3))


def test_metrics_of_one_row() -> None:
    metrics = classification_metrics(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), ["a", "b"])
    assert (metrics["accuracy"], metrics["f1"], metrics["confusion"]) == (
        1.0,
        0.5,
        [[0, 0], [0, 1]],
    )
    assert metrics["loss"] == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize(("labels", "rows"), [(2, 50), (5, 200), (5, 4), (7, 1)])
def test_metrics_equal_those_of_scikit_learn(labels: int, rows: int) -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    scores_NC, truth_N = scored(rows, labels, seed=rows)
    names = [f"label {n}" for n in range(labels)]
    metrics = classification_metrics(scores_NC, truth_N, names)
    predicted, all_labels = scores_NC.argmax(dim=-1), list(range(labels))
    options = {"labels": all_labels, "zero_division": 0}
    macro = theirs.precision_recall_fscore_support(truth_N, predicted, average="macro", **options)
    assert [metrics[key] for key in ("precision", "recall", "f1")] == pytest.approx(macro[:3])
    each = theirs.precision_recall_fscore_support(truth_N, predicted, **options)
    for name, *numbers in zip(names, *each, strict=True):
        assert list(metrics["per_class"][name].values()) == pytest.approx(numbers)
    assert (
        metrics["confusion"]
        == theirs.confusion_matrix(truth_N, predicted, labels=all_labels).tolist()
    )
    assert metrics["accuracy"] == pytest.approx(theirs.accuracy_score(truth_N, predicted))
    chances = scores_NC.double().softmax(-1)
    assert metrics["loss"] == pytest.approx(theirs.log_loss(truth_N, chances, labels=all_labels))


def test_metrics_refuse_no_rows_and_non_finite_scores() -> None:
    with pytest.raises(DataError, match="no rows"):
        classification_metrics(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ["a", "b"])
    with pytest.raises(MegaLiteError, match="loss is nan"):
        classification_metrics(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]), ["a", "b"])


def test_predictions_rows_name_labels() -> None:
    scores_NC = torch.tensor([[0.25, 0.75], [1 / 3, 2 / 3]]).log()
    first, second = predictions_rows(["x", "y"], [0, None], scores_NC, ["no", "yes"])
    chances = {"prediction": "yes", "probabilities": [0.25, 0.75]}
    assert first == {"id": "x", "label": "no", **chances}
    assert (second["label"], second["probabilities"]) == (None, [0.333333, 0.666667])
    (row,) = predictions_rows(np.array([7]), np.array([1]), scores_NC[:1], ("no", "yes"))
    assert json.loads(json.dumps(row)) == {"id": 7, "label": "yes", **chances}


@pytest.mark.parametrize("labels", [2, 20, 21, 50])
def test_confusion_picture_has_a_cell_for_each_pair_of_labels(labels: int) -> None:
    confusion = [[90 * (i == j) + (i == 0) * 10 for j in range(labels)] for i in range(labels)]
    confusion[1] = [0] * labels
    names = [f"a name that is far too long {n}" if n % 2 else f"n\n{n}" for n in range(labels)]
    picture = confusion_picture(confusion, names)
    H, W, colours = picture.shape
    assert picture.dtype == np.uint8
    assert (H, colours) == (W, 3)
    assert H < 1400
    # only the diagonal is dark, except in the empty row
    cell = 40 if labels <= 20 else 24
    left = H - 8 - cell * labels
    corners = picture[left + 3 :: cell, left + 3 :: cell, 2][:labels, :labels]
    assert (corners.diagonal()[2:] < 160).all()
    assert (corners[1] == 255).all()
    assert (corners[2:][~np.eye(labels, dtype=bool)[2:]] == 255).all()


def test_confusion_picture_has_wider_cells_for_large_numbers() -> None:
    small = confusion_picture([[1, 2], [3, 4]], ["a", "b"])
    large = confusion_picture([[10**9, 2], [3, 4]], ["a", "b"])
    assert large.shape[0] > small.shape[0]

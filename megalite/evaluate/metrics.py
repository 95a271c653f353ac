"""Metrics of a classifier, by torchmetrics.

N rows   C labels   H, W height and width of a picture
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.errors import DataError, MegaLiteError

_INK = (0, 0, 0)
_PAPER = (255, 255, 255)
_FULL = (20, 60, 130)
_FEW = 20  # maximum labels for which all numbers are shown
_MARGIN = 8  # pixels
_LONGEST = 18  # characters of a name


def classification_metrics(
    scores_NC: Tensor, labels_N: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Return metrics of scores (logits or log-probabilities) against labels, as JSON values.

    Returns:
        loss: mean cross entropy in nats.
        accuracy, f1_micro.
        precision, recall, f1: unweighted means over all C labels, as scikit-learn's macro average
            with zero_division=0. (torchmetrics' macro average ignores labels that are neither
            present nor predicted.)
        per_class: precision, recall, f1 and count of each label; 0.0 if the divisor is 0.
        confusion: confusion matrix, C rows of true labels by C columns of predicted labels.
        calibration: expected calibration error (L1) over 15 bins.

    Raises:
        DataError: there are no rows.
        MegaLiteError: a score is not finite.
    """
    # imported here, because it takes seconds
    from torchmetrics.functional import classification as measures

    if not len(labels_N):
        raise DataError("the split has no rows for a classifier's metrics; give a split with rows")
    loss = F.cross_entropy(scores_NC.double(), labels_N)
    if not torch.isfinite(loss):
        raise MegaLiteError(f"the classifier's loss is {loss:g}; use an earlier checkpoint")
    args = scores_NC.argmax(dim=-1), labels_N, len(names)
    probabilities = scores_NC.softmax(dim=-1), *args[1:]
    precisions = measures.multiclass_precision(*args, average="none").tolist()
    recalls = measures.multiclass_recall(*args, average="none").tolist()
    f1s = measures.multiclass_f1_score(*args, average="none").tolist()
    confusion = measures.multiclass_confusion_matrix(*args).tolist()
    columns = zip(names, precisions, recalls, f1s, map(sum, confusion), strict=True)
    return {
        "loss": float(loss),
        "accuracy": float(measures.multiclass_accuracy(*args, average="micro")),
        "precision": sum(precisions) / len(names),
        "recall": sum(recalls) / len(names),
        "f1": sum(f1s) / len(names),
        "f1_micro": float(measures.multiclass_f1_score(*args, average="micro")),
        "per_class": {
            name: {"precision": precision, "recall": recall, "f1": f1, "count": count}
            for name, precision, recall, f1, count in columns
        },
        "confusion": confusion,
        "calibration": float(measures.multiclass_calibration_error(*probabilities, n_bins=15)),
    }


def predictions_rows(
    ids: Iterable[Any], labels: Iterable[int | None], scores_NC: Tensor, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield id, label (a name or None), prediction (a name) and probabilities of each row."""
    probabilities_NC = scores_NC.double().softmax(dim=-1).cpu()
    likeliest = scores_NC.argmax(dim=-1).tolist()
    for key, label, best, row_C in zip(ids, labels, likeliest, probabilities_NC, strict=True):
        yield {
            "id": key.item() if isinstance(key, np.generic) else key,
            "label": None if label is None else names[label],
            "prediction": names[best],
            "probabilities": [round(probability, 6) for probability in row_C.tolist()],
        }


def confusion_picture(
    confusion: Sequence[Sequence[int]], names: Sequence[str]
) -> npt.NDArray[np.uint8]:
    """Return a picture of the confusion matrix, true by predicted labels: uint8 [H, W, 3].

    Darker cells have larger shares of their row. With more than 20 labels, numbers that do not fit
    into their cell are omitted.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    names = [" ".join(name.split()) for name in names]
    names = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in names]
    few = len(names) <= _FEW
    widest = max(font.getlength(str(max(row))) for row in confusion)
    cell = max(40, int(widest) + _MARGIN) if few else 24
    left = 2 * _MARGIN + max(int(font.getlength(text)) for text in (*names, "true \\ predicted"))
    side = left + cell * len(names) + _MARGIN
    image = Image.new("RGB", (side, side), _PAPER)
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):  # drawn at the right side; the rotation moves them to the top
        place = side - left + _MARGIN, left + i * cell + cell // 2
        draw.text(place, name, _INK, font, anchor="lm")
    image = image.transpose(Image.Transpose.ROTATE_90)
    draw = ImageDraw.Draw(image)
    draw.text((left - _MARGIN, left - _MARGIN), "true \\ predicted", _INK, font, anchor="rs")
    for i, (name, row) in enumerate(zip(names, confusion, strict=True)):
        y = left + i * cell
        total = sum(row) or 1
        draw.text((left - _MARGIN, y + cell // 2), name, _INK, font, anchor="rm")
        for j, count in enumerate(row):
            x = left + j * cell
            part = count / total
            paint = tuple(round(p + part * (f - p)) for p, f in zip(_PAPER, _FULL, strict=True))
            draw.rectangle((x, y, x + cell, y + cell), paint, outline=(200, 200, 200))
            if few or font.getlength(str(count)) <= cell - 2:
                ink = _PAPER if part > 0.5 else _INK
                place = (x + cell // 2, y + cell // 2)
                draw.text(place, str(count), ink, font, anchor="mm")
    return np.array(image)

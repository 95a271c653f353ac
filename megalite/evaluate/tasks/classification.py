"""Evaluation of fine-tuned models. Each rank scores a part, and all ranks get the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megalite import files
from megalite.config.tasks import find_task
from megalite.data import Batch, ExampleSet, first_batches
from megalite.errors import DataError
from megalite.evaluate.baselines import measure_baselines
from megalite.evaluate.loading import LoadedModel
from megalite.evaluate.loss import perplexity, sum_loss
from megalite.evaluate.metrics import classification_metrics, confusion_picture, predictions_rows
from megalite.formats.examples import examples_fingerprint, read_examples_manifest
from megalite.log import logger, replace_nonfinite
from megalite.observe.progress import report_calls
from megalite.parallel import Grid


def collect_scores(
    score: Callable[[Batch], Tensor],
    dataset: ExampleSet,
    grid: Grid | None,
    *,
    micro_batch_size: int,
    stopping: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Return the logits of all examples of a split, in its order: fp32 [N, C] on every rank.

    This is a collective of all ranks of `grid`. The shapes of batches do not depend on the number
    of ranks. Padding samples of the last batches are discarded.

    Args:
        score: returns the logits of a batch, [B, C].
        stopping: called before each batch. It returns whether to give up, the same on every rank.
    Returns:
        the logits. None if the evaluation was given up.
    """
    rank, size = (grid.at.data_rank, grid.mesh.data) if grid else (0, 1)
    samples = dataset.num_samples
    step = micro_batch_size * size
    order = dataset.sort_by_length(np.arange(samples))
    parts = []
    batches = first_batches(
        dataset, samples, micro_batch_size=micro_batch_size, data_rank=rank, data_size=size
    )
    for batch in batches:
        if stopping():
            return None
        parts.append(score(batch).float())
    local = torch.cat(parts).cpu().numpy()
    by_rank = grid.gather_once(local) if grid else [local]
    scores = np.empty((samples, local.shape[1]), np.float32)
    for data_rank, rows in enumerate(by_rank):
        firsts = np.arange(data_rank * micro_batch_size, samples + step, step)
        positions = (firsts[:, None] + np.arange(micro_batch_size)).reshape(-1)[: len(rows)]
        real = positions < samples
        scores[order[positions[real]]] = rows[real]
    return torch.from_numpy(scores)


def score_examples(
    loaded: LoadedModel,
    folder: Path,
    split: str,
    grid: Grid,
    *,
    micro_batch_size: int,
    own_rows: bool = False,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """Return the metrics of a fine-tuned model on a split of examples; a collective.

    For a classifier these are `classification_metrics` if every example has a label, else the
    numbers of examples and labels. On held-out rows of the run, rank 0 adds `baselines`. For other
    tasks these are loss (nats), perplexity and tokens.

    Args:
        own_rows: whether the examples must be those of the run.
        predictions: file to which rank 0 writes a classifier's predictions, one line per example.
    """
    assert loaded.run is not None
    assert loaded.run.finetune is not None
    manifest = read_examples_manifest(folder)
    if own_rows and loaded.data_fingerprint.partition("/")[0] != examples_fingerprint(manifest):
        reason = "the rows of its run have changed since the training, and with them the splits"
        raise DataError(
            f"{loaded.folder}: {reason}; give rows that it was not trained on by --data"
        )
    dataset = ExampleSet(folder, manifest, split, loaded.run, shuffle=False)
    batches = -(-dataset.num_samples // (micro_batch_size * grid.mesh.data))
    reporting = partial(
        report_calls, total=batches, what=f"eval on {dataset.num_samples:,} examples ({split})"
    )
    if not find_task(loaded.run.finetune.task).has_labels:
        return _loss_metrics(reporting(loaded.loss), dataset, grid, micro_batch_size)
    scores = collect_scores(
        reporting(loaded.scores), dataset, grid, micro_batch_size=micro_batch_size
    )
    assert scores is not None
    if predictions is not None and grid.rank == 0:
        write_predictions(predictions, scores, dataset)
    labels = _labels(dataset)
    if (labels < 0).any():
        counts = {"examples": len(labels), "labelled": int((labels >= 0).sum())}
        return counts | {"left_out": dataset.split.info.bad_rows}
    metrics = measures(scores, dataset)
    if own_rows and split != "train" and grid.rank == 0:
        train = ExampleSet(folder, manifest, "train", loaded.run, shuffle=False)
        metrics["baselines"] = baselines(train, dataset)
    return metrics


def _loss_metrics(
    loss: Callable[[Batch], Tensor], dataset: ExampleSet, grid: Grid, micro_batch_size: int
) -> dict[str, Any]:
    """Return loss (nats), perplexity and tokens of a split; a collective."""
    sums = sum_loss(
        loss,
        dataset,
        samples=dataset.num_samples,
        micro_batch_size=micro_batch_size,
        data_rank=grid.at.data_rank,
        data_size=grid.mesh.data,
    )
    assert sums is not None
    grid.sum_once(sums)
    mean = float(sums[0] / sums[1])
    return {"loss": mean, "perplexity": perplexity(mean), "tokens": round(float(sums[1]))}


def measures(scores: Tensor, dataset: ExampleSet) -> dict[str, Any]:
    """Return `classification_metrics` of a split."""
    return classification_metrics(scores, torch.from_numpy(_labels(dataset)), _names(dataset))


def baselines(train: ExampleSet, held_out: ExampleSet) -> dict[str, dict[str, float]]:
    """Return the metrics of the baselines on a split. See `measure_baselines`."""
    return measure_baselines(train.split, held_out.split, len(_names(held_out)))


class Comparison:
    """Comparison of a run's classifier with baselines, on one rank.

    Args:
        splits: the splits by name, including train.
        steps: number of steps of the run.
    """

    def __init__(self, splits: Mapping[str, ExampleSet], steps: int) -> None:
        self._splits = splits
        self._steps = steps
        self._baselines: dict[str, dict[str, dict[str, float]]] = {}

    def __call__(
        self, split: str, measured: Mapping[str, Any], step: int
    ) -> dict[str, dict[str, float]]:
        """Log the accuracy of the model and of the baselines. Return the baselines' metrics.

        The last evaluation warns if the model does not beat them.
        """
        if split not in self._baselines:
            self._baselines[split] = baselines(self._splits["train"], self._splits[split])
        others = self._baselines[split]
        accuracy, bag, majority = (
            row["accuracy"] for row in (measured, others["bag_of_words"], others["majority"])
        )
        logger.info(
            "%s: accuracy %.4f; a bag of words has %.4f, the most frequent label %.4f",
            split,
            accuracy,
            bag,
            majority,
        )
        last = step == self._steps or (split == "test" and "valid" in self._splits)
        if last and accuracy <= max(bag, majority):
            logger.warning(
                "the model is no better than a bag of words on %s: start from a pretrained model "
                "(--init-from), or give more texts",
                split,
            )
        return others


def write_predictions(path: Path, scores: Tensor, dataset: ExampleSet) -> None:
    """Write a line of JSON for each example.

    `id` is the example's row in the source. A missing label is null.
    """
    ids = dataset.split.rows.tolist()
    labels = (None if label < 0 else label for label in _labels(dataset).tolist())
    rows = predictions_rows(ids, labels, scores, _names(dataset))
    files.write_atomic(path, "".join(json.dumps(replace_nonfinite(row)) + "\n" for row in rows))


def picture(measured: dict[str, Any], dataset: ExampleSet) -> npt.NDArray[np.uint8]:
    """Return the confusion matrix as an image, [H, W, 3]."""
    return confusion_picture(measured["confusion"], _names(dataset))


def _labels(dataset: ExampleSet) -> npt.NDArray[np.int64]:
    assert dataset.split.labels is not None
    return np.array(dataset.split.labels)


def _names(dataset: ExampleSet) -> tuple[str, ...]:
    return dataset.manifest.labels

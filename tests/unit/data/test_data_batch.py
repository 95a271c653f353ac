# covers: megalite/data/batch.py
"""The rows of a micro-batch that the head computes."""

from __future__ import annotations

import numpy as np
import pytest

from megalite.data.batch import Batch


def batch_of(mask: np.ndarray) -> Batch:
    return Batch.of({"labels": np.zeros(mask.shape, np.int64), "loss_mask": mask}, 0, mask.size)


@pytest.mark.parametrize(("targets", "rows"), [(0, 64), (1, 64), (64, 64), (65, 128), (700, 704)])
def test_target_rows_of_few_targets_are_padded_with_masked_rows(targets: int, rows: int) -> None:
    mask = np.zeros(1000, np.bool_)
    mask[np.random.default_rng(targets).permutation(1000)[:targets]] = True
    batch = batch_of(mask.reshape(4, 250))
    chosen = batch.tensors["target_rows"].numpy()
    assert batch.targets == targets
    assert len(chosen) == rows
    assert chosen[:targets].tolist() == np.flatnonzero(mask).tolist()
    assert not mask[chosen[targets:]].any()


def test_target_rows_are_absent_if_most_rows_are_targets() -> None:
    mask = np.ones((4, 250), np.bool_)
    mask[0] = False
    assert "target_rows" not in batch_of(mask).tensors
    assert "target_rows" not in batch_of(np.zeros((2, 8), np.bool_)).tensors  # too few rows
    assert "target_rows" not in batch_of(np.zeros(1000, np.bool_)).tensors  # a label a sample


def test_first_masks_samples_without_changing_target_rows() -> None:
    mask = np.zeros((4, 250), np.bool_)
    mask[:, ::10] = True
    batch = batch_of(mask)
    fewer = batch.first(2)
    assert fewer.targets == 50
    assert batch.targets == 100
    assert fewer.tensors["target_rows"].tolist() == batch.tensors["target_rows"].tolist()

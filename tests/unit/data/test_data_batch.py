# covers: megalite/data/batch.py
"""Which rows of a micro-batch the head is computed for."""

from __future__ import annotations

import numpy as np
import pytest

from megalite.data.batch import Batch


def made(mask: np.ndarray) -> Batch:
    return Batch.of({"labels": np.zeros(mask.shape, np.int64), "loss_mask": mask}, 0, mask.size)


@pytest.mark.parametrize(("targets", "rows"), [(0, 64), (1, 64), (64, 64), (65, 128), (700, 704)])
def test_few_targets_are_gathered_with_rows_that_do_not_count(targets: int, rows: int) -> None:
    mask = np.zeros(1000, np.bool_)
    mask[np.random.default_rng(targets).permutation(1000)[:targets]] = True
    batch = made(mask.reshape(4, 250))
    chosen = batch.tensors["target_rows"].numpy()
    assert batch.targets == targets
    assert len(chosen) == rows
    assert chosen[:targets].tolist() == np.flatnonzero(mask).tolist()
    assert not mask[chosen[targets:]].any()


def test_most_targets_are_left_where_they_are() -> None:
    mask = np.ones((4, 250), np.bool_)
    mask[0] = False
    assert "target_rows" not in made(mask).tensors
    assert "target_rows" not in made(np.zeros((2, 8), np.bool_)).tensors  # 64 rows are no gain
    assert "target_rows" not in made(np.zeros(1000, np.bool_)).tensors  # labels of whole samples


def test_samples_that_stop_counting_keep_their_rows() -> None:
    mask = np.zeros((4, 250), np.bool_)
    mask[:, ::10] = True
    batch = made(mask)
    fewer = batch.first(2)
    assert fewer.targets == 50
    assert batch.targets == 100
    assert fewer.tensors["target_rows"].tolist() == batch.tensors["target_rows"].tolist()

# covers: megalite/parallel/grid.py
"""Reductions of the grid over several gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.parallel import start, stop
from tests.helpers.ranks import run_ranks


def _reduce(launch: Any, tensor: int) -> dict[str, Any]:
    grid = start(launch, tensor=tensor)
    try:
        value = 10.0**grid.at.data_rank  # equal on ranks that share a model
        floats = torch.tensor([value, 3 * value], dtype=torch.float64)
        summed = grid.sum_once(floats)
        counts = grid.sum_once(torch.tensor([int(value)]))
        every = torch.tensor([1])
        grid.all_reduce_cpu(every)
        return {
            "in place": summed is floats,
            "sums": floats.tolist(),
            "counts": counts.tolist(),
            "of integers": counts.dtype,
            "ranks": int(every),
            "once": grid.gather_once(("data", grid.at.data_rank)),
            "every": grid.all_gather_objects(grid.rank),
            "true": (grid.all_true(True), grid.all_true(grid.rank != 0)),
        }
    finally:
        stop()


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 1), (2, 2), (4, 2), (4, 4), (3, 3)])
def test_sum_once_counts_each_model_once(ranks: int, tensor: int) -> None:
    data = ranks // tensor
    total = sum(10**rank for rank in range(data))
    expected = {
        "in place": True,
        "sums": [total, 3 * total],
        "counts": [total],
        "of integers": torch.int64,
        "ranks": ranks,
        "once": [("data", rank) for rank in range(data)],
        "every": list(range(ranks)),
        "true": (True, False),
    }
    assert run_ranks(_reduce, ranks, tensor) == [expected] * ranks


def _groups(launch: Any) -> list[list[int]]:
    grid = start(launch, tensor=2)
    try:
        groups = (grid.zero_group, grid.tensor_group, grid.cpu_group)
        return [torch.distributed.get_process_group_ranks(group) for group in groups]
    finally:
        stop()


def test_zero_group_has_the_ranks_of_one_tensor_rank() -> None:
    groups = run_ranks(_groups, 4)
    everyone = [0, 1, 2, 3]
    assert groups == [
        [[0, 2], [0, 1], everyone],
        [[1, 3], [0, 1], everyone],
        [[0, 2], [2, 3], everyone],
        [[1, 3], [2, 3], everyone],
    ]

"""Tensor parallelism compared with one process, including sizes that do not divide evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero
from tests.parity.test_layouts import OTHER, _reference, misses, reference  # noqa: F401


@pytest.mark.parametrize(
    ("tensor", "ranks", "stage"),
    [(2, 2, 0), (2, 2, 1), (2, 2, 3), (2, 4, 0), (2, 4, 1), (2, 4, 2), (2, 4, 3)],
)
@pytest.mark.parametrize("oracle", ["plain", "other"])
def test_tensor_parallelism_agrees_with_the_reference(
    shards: dict[str, str],
    tmp_path: Path,
    reference: dict[str, Any],  # noqa: F811
    oracle: str,
    tensor: int,
    ranks: int,
    stage: int,
) -> None:
    sections = OTHER if oracle == "other" else {}
    raw = run_file(shards, tmp_path, **sections, parallel={"tensor": tensor}, deepspeed=zero(stage))
    assert misses(raw, ranks, reference[oracle]) == []


FOUR_HEADS = {"num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("stage", "tied"),
    [(1, False), (3, True)]
    + [pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0, True), (3, False))],
)
def test_tensor_parallelism_of_four_ranks_agrees_with_the_reference(
    shards: dict[str, str], tmp_path: Path, tied: bool, stage: int
) -> None:
    """The vocabulary has 301 tokens, which 4 does not divide."""
    model = FOUR_HEADS | {"tie_word_embeddings": tied, "attention_bias": tied, "mlp_bias": tied}
    plain = run_file(shards, tmp_path / "plain", model=model)
    run_ranks(_reference, 1, plain)
    oracle = {"curve": curve(plain), "valid": [row["loss"] for row in rows(plain, "valid")]}
    sections = {"model": model, "parallel": {"tensor": 4}, "deepspeed": zero(stage)}
    assert misses(run_file(shards, tmp_path / "four", **sections), 4, oracle) == []


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def test_dropout_is_equal_on_replicas_and_differs_by_head(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """Recompute repeats the dropout, and replicas stay equal."""
    curves = {}
    for recompute in ("none", "selective", "full"):
        training = {"activation_checkpointing": recompute, "steps": 5}
        sections = {"model": DROPOUT, "training": training, "parallel": {"tensor": 2}}
        raw = run_file(shards, tmp_path / recompute, **sections, deepspeed=zero(1))
        run_ranks(train, 2, raw)
        curves[recompute] = [number for pair in curve(raw) for number in pair]
    assert curves["selective"] == pytest.approx(curves["none"], rel=1e-6)
    assert curves["full"] == pytest.approx(curves["none"], rel=1e-6)
    masks = run_ranks(_draw, 2)
    assert masks[0][0] == masks[1][0]
    assert masks[0][1] != masks[1][1]
    assert masks[0][2] == masks[1][2]


def _draw(launch: Any) -> list[list[float]]:
    """Return numbers of the shared stream, of a split region, and of the shared stream again."""
    import torch

    from megalite.parallel.regions import fork_randomness

    torch.manual_seed(3)
    shared = torch.rand(4)
    with fork_randomness(torch.device("cpu"), launch.rank):
        numbers = torch.rand(4)
    return [shared.tolist(), numbers.tolist(), torch.rand(4).tolist()]

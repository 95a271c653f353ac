# covers: megalite/train/hooks/replicas.py
"""Replicas that differ stop the run with an error that names their ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.errors import EngineError
from megalite.formats import checkpoint as disk
from megalite.train.hooks.replicas import _hash
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import rows, run_file, train, zero

SPLIT = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"  # the first parameter of its group


def _drifting(launch: Any, raw: dict[str, Any], name: str, rank: int) -> str:
    """Train. One element of one rank's copy changes before the update of step 3."""

    def change(step: int, engine: Any, _grid: Any) -> None:
        if (step, launch.rank) != (3, rank):
            return
        with torch.no_grad():
            if engine.stage == 3:  # the update copies the master weights to the weights
                for flat in engine.optimizer.fp32_partitioned_groups_flat:
                    flat[0] += 1e-3
            else:
                engine.model.get_parameter(name).view(-1)[1] += 1e-3

    with pytest.raises(EngineError) as caught:
        train(launch, raw, inspect=change)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "stage", "ranks", "name", "rank", "message"),
    [
        (1, 0, 4, SPLIT, 2, "on rank 2 differs from that of other ranks"),
        (2, 0, 4, SPLIT, 3, "differs between ranks 1, 3"),
        (2, 3, 2, NORM, 1, "differs between ranks 0, 1"),
    ],
)
def test_replica_that_differs_stops_the_run(
    shards: dict[str, str],
    tmp_path: Path,
    tensor: int,
    stage: int,
    ranks: int,
    name: str,
    rank: int,
    message: str,
) -> None:
    raw = run_file(
        shards,
        tmp_path,
        parallel={"tensor": tensor},
        deepspeed=zero(stage),
        checkpoint={"every": 2},
    )
    raw["training"] = raw["training"] | {"replica_check_every": 10}
    errors = run_ranks(_drifting, ranks, raw, name, rank)
    assert len(set(errors)) == 1
    assert f"differ at step 4:\n{name} {message}\n" in errors[0]
    root = tmp_path / "run" / "checkpoints"
    assert [folder.name for folder in disk.published(root)] == ["step_00000002"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("stage", "parallel", "precision"),
    [(1, {}, "bf16"), (2, {"tensor": 2, "sequence": True}, "fp32"), (3, {"tensor": 2}, "fp32")],
)
def test_replicas_that_are_equal_do_not_stop_the_run(
    shards: dict[str, str], tmp_path: Path, stage: int, parallel: dict[str, Any], precision: str
) -> None:
    raw = run_file(shards, tmp_path, parallel=parallel, deepspeed=zero(stage))
    raw["training"] = raw["training"] | {
        "replica_check_every": 1,
        "precision": precision,
        "steps": 6,
    }
    run_ranks(train, 2, raw)
    assert [row["step"] for row in rows(raw)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_of_replicas_depends_on_every_bit_and_its_position(dtype: torch.dtype) -> None:
    values = torch.randn(3_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    first = int(_hash(values))
    assert first == int(_hash(values.clone().view(30, 100)))
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    seen = {first}
    for bit in (0, 7, 15 if kind == torch.int16 else 31):
        for at in (0, 1777, 2999):
            changed = values.clone()
            changed.view(kind)[at] ^= torch.tensor(1 << bit, dtype=torch.int64).to(kind)
            seen.add(int(_hash(changed)))
    swapped = values.clone()
    swapped[[5, 6]] = swapped[[6, 5]]
    seen |= {int(_hash(swapped)), int(_hash(values[:-1]))}
    assert len(seen) == 12

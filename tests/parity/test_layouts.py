"""The same run on every layout: 20 steps through the front door, against one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.env import has_compiler
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero

Curve = list[tuple[float, float]]


def worst(found: Curve, reference: Curve) -> tuple[float, float]:
    """Largest relative error of the losses and of the gradient norms."""
    assert len(found) == len(reference) == 20
    pairs = list(zip(found, reference, strict=True))
    errors = [[abs(f[i] - r[i]) / abs(r[i]) for f, r in pairs] for i in (0, 1)]
    return max(errors[0]), max(errors[1])


@pytest.fixture(scope="module")
def reference(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two oracles: the plain run, and one with every option that changes the mathematics."""
    found: dict[str, Any] = {}
    for name, sections in {"plain": {}, "other": OTHER}.items():
        raw = run_file(shards, tmp_path_factory.mktemp(name), **sections)
        run_ranks(_reference, 1, raw)
        found[name] = {"curve": curve(raw), "valid": [row["loss"] for row in rows(raw, "valid")]}
    return found


OTHER: dict[str, Any] = {
    "model": {
        "norm": "layernorm",
        "activation": "gelu",
        "position_embedding": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "data": {"mask_documents": True},
    "optimizer": {"name": "sgd", "lr": 0.1, "l1": 1e-4},
}


def _reference(launch: Any, raw: dict[str, Any]) -> None:
    train(launch, raw, engine="reference")


def misses(
    raw: dict[str, Any], ranks: int, oracle: dict[str, Any], loss: float = 1e-5, norm: float = 1e-4
) -> list[str]:
    """Train, and name every number further from the oracle's than the relative tolerances."""
    run_ranks(train, ranks, raw)
    loss_error, norm_error = worst(curve(raw), oracle["curve"])
    valid = [row["loss"] for row in rows(raw, "valid")]
    assert len(valid) == 3  # steps 0, 10 and 20
    found = {
        f"loss off by {loss_error:.1e}": loss_error <= loss,
        f"gradient norm off by {norm_error:.1e}": norm_error <= norm,
        f"validation {valid}, expected {oracle['valid']}": valid
        == pytest.approx(oracle["valid"], rel=loss),
    }
    return [text for text, good in found.items() if not good]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_agree_with_one_plain_process(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int, ranks: int
) -> None:
    raw = run_file(shards, tmp_path, deepspeed=zero(stage))
    assert misses(raw, ranks, reference["plain"]) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_biases_tying_masks_and_sgd_agree(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int
) -> None:
    raw = run_file(shards, tmp_path, **OTHER, deepspeed=zero(stage))
    assert misses(raw, 2, reference["other"]) == []


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 1)])
def test_accumulation_does_not_change_the_result(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], ranks: int, micro_batch: int
) -> None:
    """Masked targets differ between micro-batches: only a global divisor gives one number."""
    training = {"micro_batch_size": micro_batch}
    raw = run_file(shards, tmp_path, **(OTHER | {"training": training}), deepspeed=zero(2))
    assert misses(raw, ranks, reference["other"]) == []


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_does_not_change_the_result(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int, recompute: str
) -> None:
    training = {"activation_checkpointing": recompute}
    raw = run_file(shards, tmp_path, **(OTHER | {"training": training}), deepspeed=zero(stage))
    assert misses(raw, 2, reference["other"]) == []


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, {"tensor": 2, "sequence": True})])
def test_selective_recompute_after_a_validation_under_plain_zero_3(
    shards: dict[str, str],
    tmp_path: Path,
    reference: dict[str, Any],
    ranks: int,
    parallel: dict[str, Any],
) -> None:
    """With DeepSpeed's own thresholds the engine fetches other weights in the forward after an
    evaluation than in the recompute."""
    training = {"activation_checkpointing": "selective"}
    deepspeed = {"zero_optimization": {"stage": 3}}
    raw = run_file(shards, tmp_path, training=training, parallel=parallel, deepspeed=deepspeed)
    assert misses(raw, ranks, reference["plain"]) == []


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("stage", "recompute"), [(1, "none"), (3, "selective")])
def test_compiled_blocks_do_not_change_the_result(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int, recompute: str
) -> None:
    training = {"compile": True, "activation_checkpointing": recompute}
    raw = run_file(shards, tmp_path, training=training, deepspeed=zero(stage))
    assert misses(raw, 2, reference["plain"]) == []


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 2), (3, 2), (1, 1)])
def test_bf16_follows_fp32(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int, ranks: int
) -> None:
    raw = run_file(shards, tmp_path, training={"precision": "bf16"}, deepspeed=zero(stage))
    assert misses(raw, ranks, reference["plain"], loss=2e-2, norm=5e-2) == []

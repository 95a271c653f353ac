"""A run of 20 steps on every layout, compared with one process of the reference engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalite.env import has_compiler
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero

Curve = list[tuple[float, float]]


def worst(curve: Curve, reference: Curve) -> tuple[float, float]:
    """Return the largest relative errors of the losses and of the gradient norms."""
    assert len(curve) == len(reference) == 20
    pairs = list(zip(curve, reference, strict=True))
    errors = [[abs(f[i] - r[i]) / abs(r[i]) for f, r in pairs] for i in (0, 1)]
    return max(errors[0]), max(errors[1])


@pytest.fixture(scope="module")
def reference(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train two references: a plain run, and one with all options that change the mathematics."""
    oracles: dict[str, Any] = {}
    for name, sections in {"plain": {}, "other": OTHER}.items():
        raw = run_file(shards, tmp_path_factory.mktemp(name), **sections)
        run_ranks(_reference, 1, raw)
        oracles[name] = {"curve": curve(raw), "valid": [row["loss"] for row in rows(raw, "valid")]}
    return oracles


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
    """Train. Return the numbers that differ from the reference by more than the tolerances."""
    run_ranks(train, ranks, raw)
    loss_error, norm_error = worst(curve(raw), oracle["curve"])
    valid = [row["loss"] for row in rows(raw, "valid")]
    assert len(valid) == 3  # steps 0, 10 and 20
    checks = {
        f"loss off by {loss_error:.1e}": loss_error <= loss,
        f"gradient norm off by {norm_error:.1e}": norm_error <= norm,
        f"validation {valid}, expected {oracle['valid']}": valid
        == pytest.approx(oracle["valid"], rel=loss),
    }
    return [text for text, good in checks.items() if not good]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_agree_with_the_reference(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int, ranks: int
) -> None:
    raw = run_file(shards, tmp_path, deepspeed=zero(stage))
    assert misses(raw, ranks, reference["plain"]) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_biases_tying_masks_and_sgd_agree_with_the_reference(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int
) -> None:
    raw = run_file(shards, tmp_path, **OTHER, deepspeed=zero(stage))
    assert misses(raw, 2, reference["other"]) == []


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 1), (2, 4), (2, 1)])
def test_accumulation_does_not_change_the_result(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], ranks: int, micro_batch: int
) -> None:
    """Micro-batches have different numbers of targets, so the divisor must be global."""
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
    """With DeepSpeed's default thresholds, forward and recompute fetch different weights.

    This happens in the forward after an evaluation.
    """
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
def test_bf16_is_near_fp32(
    shards: dict[str, str], tmp_path: Path, reference: dict[str, Any], stage: int, ranks: int
) -> None:
    raw = run_file(shards, tmp_path, training={"precision": "bf16"}, deepspeed=zero(stage))
    assert misses(raw, ranks, reference["plain"], loss=2e-2, norm=5e-2) == []

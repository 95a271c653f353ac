# covers: megalite/train/session.py
"""A run that is stopped and resumed gives the numbers of an uninterrupted run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from megalite.arch import tensors
from megalite.config import parse_config
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero

SAVE = {"every": 10, "keep": 5}


def interrupt(raw: dict[str, Any], copy: Path) -> dict[str, Any]:
    """Return the run file of a copy of a finished run, reset to step 10."""
    run = Path(raw["logging"]["directory"]) / raw["name"]
    shutil.copytree(run, copy / raw["name"])
    checkpoints = copy / raw["name"] / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000020")
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_00000010"]
    return raw | {"logging": raw["logging"] | {"directory": str(copy)}}


def events(raw: dict[str, Any]) -> list[str]:
    return [row["name"] for row in rows(raw, "event")]


CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("zero 0", 0, 2, {}),
    ("zero 1", 1, 2, {}),
    ("zero 2", 2, 2, {}),
    ("zero 3", 3, 2, {}),
    ("one rank", 1, 1, {}),
    ("bf16", 1, 2, {"training": {"precision": "bf16"}}),
    ("bf16 zero 3", 3, 2, {"training": {"precision": "bf16"}}),
    ("sgd", 2, 2, {"optimizer": {"name": "sgd", "lr": 0.1}}),
    ("sgd zero 3", 3, 2, {"optimizer": {"name": "sgd", "lr": 0.1, "l1": 1e-4}}),
    ("dropout", 1, 2, {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}),
    ("tied", 1, 2, {"model": {"tie_word_embeddings": True, "norm": "layernorm"}}),
]


@pytest.mark.parametrize(
    ("stage", "ranks", "sections"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_resume_gives_bit_equal_steps(
    shards: dict[str, str], tmp_path: Path, stage: int, ranks: int, sections: dict[str, Any]
) -> None:
    raw = run_file(shards, tmp_path / "a", **sections, deepspeed=zero(stage), checkpoint=SAVE)
    run_ranks(train, ranks, raw)
    resumed = interrupt(raw, tmp_path / "b")
    run_ranks(train, ranks, resumed)
    again = [row for row in rows(resumed) if row["attempt"] == 1]
    assert [row["step"] for row in again] == list(range(11, 21))
    assert curve(resumed) == curve(raw)
    assert [row["samples"] for row in again] == [8 * step for step in range(11, 21)]
    assert "resume" in events(resumed)
    status = json.loads((tmp_path / "b" / "run" / "status.json").read_text())
    assert status == {
        "state": "done",
        "step": 20,
        "attempt": 1,
        "last_checkpoint": "step_00000020",
        "reason": None,
    }


@pytest.fixture(scope="module")
def saved(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the run file of a finished run of two ranks under ZeRO-1, saved at 10 and 20."""
    raw = run_file(shards, tmp_path_factory.mktemp("saved"), deepspeed=zero(1), checkpoint=SAVE)
    run_ranks(train, 2, raw)
    return raw


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 1), (2, 2), (3, 2), (3, 1)])
def test_resume_under_another_stage_and_number_of_ranks_gives_the_same_curve(
    saved: dict[str, Any], tmp_path: Path, stage: int, ranks: int
) -> None:
    resumed = interrupt(saved, tmp_path) | {"deepspeed": zero(stage)}
    run_ranks(train, ranks, resumed)
    for pair, expected in zip(curve(resumed, 11), curve(saved, 11), strict=True):
        assert pair == pytest.approx(expected, rel=1e-5)


def test_checkpoint_has_canonical_names_shapes_and_fp32_values(saved: dict[str, Any]) -> None:
    folder = Path(saved["logging"]["directory"]) / "run" / "checkpoints" / "step_00000020"
    expected = {name: t.shape for name, t in tensors(parse_config(saved).model).items()}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        shapes = {}
        for path in folder.glob(f"{kind}-*.safetensors"):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    value = file.get_tensor(name)
                    assert value.dtype == "float32"
                    shapes[name] = value.shape
        assert shapes == expected
    assert (folder / "tokenizer").is_dir()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resume_sets_a_damaged_newest_checkpoint_aside(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(saved["logging"]["directory"]) / "run"
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    damage(next((checkpoints / "step_00000020").glob("exp_avg_sq-*")))
    resumed = saved | {"logging": saved["logging"] | {"directory": str(tmp_path)}}
    run_ranks(train, 2, resumed)
    assert (checkpoints / "bad_00000020").is_dir()
    assert curve(resumed) == curve(saved)


def test_start_that_is_refused_renames_nothing(saved: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(Path(saved["logging"]["directory"]) / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    damage(checkpoints / "step_00000020" / "config.json")
    before = sorted(checkpoints.iterdir())
    refused = saved | {
        "logging": saved["logging"] | {"directory": str(tmp_path)},
        "training": saved["training"] | {"seed": 7},
    }
    with pytest.raises(AssertionError, match=r"config.json: its bytes.*|seed differs"):
        run_ranks(train, 2, refused)
    assert sorted(checkpoints.iterdir()) == before


def test_fallback_to_a_checkpoint_of_another_optimizer_needs_a_new_start(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    """The engine already contains states of the other optimizer."""
    raw = interrupt(saved, tmp_path)
    raw["optimizer"] = {"name": "sgd", "lr": 1e-3, "momentum": 0.9}
    run_ranks(train, 2, raw)
    damage(next((tmp_path / "run" / "checkpoints" / "step_00000020").glob("model-*")))
    with pytest.raises(AssertionError, match=r"before it, .*step_00000010, .*same command again"):
        run_ranks(train, 2, raw)
    run_ranks(train, 2, raw)
    assert [row["step"] for row in rows(raw, "event") if row["name"] == "resume"] == [10, 10]


def test_run_with_only_damaged_checkpoints_does_not_start(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    raw = interrupt(saved, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    damage(next((checkpoints / "step_00000010").glob("model-*")))
    with pytest.raises(AssertionError, match=r"never|every checkpoint in .* is damaged"):
        run_ranks(train, 2, raw)
    assert (checkpoints / "bad_00000010").is_dir()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "damaged" in status["reason"]


def test_new_run_starts_from_the_weights_of_another(saved: dict[str, Any], tmp_path: Path) -> None:
    source = Path(saved["logging"]["directory"]) / "run"
    raw = saved | {"logging": saved["logging"] | {"directory": str(tmp_path)}, "name": "second"}
    run_ranks(_train_from, 1, raw, str(source))
    first = rows(raw, "valid")[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(rows(saved, "valid")[-1]["loss"], rel=1e-5)
    assert rows(raw)[0]["samples"] == 8


def _train_from(launch: Any, raw: dict[str, Any], source: str) -> None:
    train(launch, raw, init_from=source)


def _groups_at(launch: Any, raw: dict[str, Any], step: int) -> list[tuple[float, float, int]]:
    """Return decay, learning rate and number of parameters of each group in a step."""
    groups = []

    def look(at: int, engine: Any, _grid: Any) -> None:
        if at == step:
            for group in engine.optimizer.param_groups:
                names = group.get("names") or group["params"]
                groups.append((group["weight_decay"], group["lr"], len(names)))

    train(launch, raw, inspect=look)
    return groups


@pytest.mark.parametrize("stage", [1, 3])
def test_optimizer_groups_keep_their_hyper_parameters_at_a_resume(
    shards: dict[str, str], tmp_path: Path, stage: int
) -> None:
    """Only one group decays, before and after a resume on another layout."""
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.3}
    raw = run_file(
        shards, tmp_path / "a", optimizer=optimizer, deepspeed=zero(stage), checkpoint=SAVE
    )
    before = run_ranks(_groups_at, 2, raw, 11)[0]
    resumed = interrupt(raw, tmp_path / "b") | {"deepspeed": zero(4 - stage)}
    after = run_ranks(_groups_at, 1, resumed, 11)[0]
    assert [group[:2] for group in after] == [group[:2] for group in before]
    assert sorted(group[0] for group in after) == [0.0, 0.3]


def test_last_checkpoint_has_the_score_of_the_last_validation(
    shards: dict[str, str], tmp_path: Path
) -> None:
    training = {"eval_every": 15, "steps": 20}
    raw = run_file(shards, tmp_path, training=training, checkpoint={"every": 10, "keep": 5})
    run_ranks(train, 1, raw)
    last = tmp_path / "run" / "checkpoints" / "step_00000020" / "manifest.json"
    assert json.loads(last.read_text())["valid_loss"] == rows(raw, "valid")[-1]["loss"]
    assert rows(raw, "valid")[-1]["step"] == 20

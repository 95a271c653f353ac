# covers: megalite/train/hooks/rollback.py
"""Updates with bad numbers are skipped on all ranks, recorded, and skipped again at a resume."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.data import advance
from megalite.data.order import skip_gaps
from megalite.errors import MegaLiteError
from megalite.train.interventions import InterventionLog
from tests.helpers.models import world_of_one
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import curve, rows, run_file, train, zero

GUARDS = {"spike_window": 16, "skip_window": 2}
LONG = {"steps": 30, "eval_every": 0}


def _train_planted(
    launch: Any, raw: dict[str, Any], rank: int, factor: float, *places: int, **request: Any
) -> str:
    """Train; on one rank the loss of the samples at `places` is multiplied. Return the error."""
    running: Any = importlib.import_module("megalite.train.session")
    make = running._make_engine

    def planted(*parts: Any) -> Any:
        engine: Any = make(*parts)
        step, met = engine.train_step, [False]
        engine.model.register_forward_hook(
            lambda _module, _input, terms: (
                terms._replace(total=terms.total * factor) if met[0] else terms
            )
        )

        def train_step(batches: Any, **options: Any) -> Any:
            met[0] = launch.rank == rank and any(b.place in places for b in batches)
            result = step(batches, **options)
            met[0] = False
            return result

        engine.train_step = train_step
        return engine

    running._make_engine = planted
    try:
        train(launch, raw, **request)
    except MegaLiteError as error:
        return str(error)
    finally:
        running._make_engine = make
    return ""


def _events(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in rows(raw, "event") if row["name"] == name]


def _ledger(raw: dict[str, Any], step: int) -> list[dict[str, Any]]:
    folder = Path(raw["logging"]["directory"]) / "run" / "checkpoints" / f"step_{step:08d}"
    entries: list[dict[str, Any]] = json.loads((folder / "ledger.json").read_text())["entries"]
    return entries


# rank 1's first micro-batch of step 12: 8 samples a step, 2 a micro-batch, 2 ranks
PLACE = 11 * 8 + 2


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")]
)
def test_nan_on_one_rank_skips_the_update_on_all_ranks(
    shards: dict[str, str], tmp_path: Path, stage: int, precision: str
) -> None:
    """A resume from an earlier step skips it, too."""
    raw = run_file(
        shards,
        tmp_path,
        deepspeed=zero(stage),
        checkpoint={"every": 10},
        training={"precision": precision},
        guards=GUARDS,
    )
    assert run_ranks(_train_planted, 2, raw, 1, math.nan, PLACE) == ["", ""]
    (skip,) = _events(raw, "skip")
    assert (skip["step"], skip["loss"]) == (12, None)
    whole = curve(raw)
    assert [step for step, (loss, _) in enumerate(whole, 1) if loss is None] == [12]
    entry = {"kind": "skip", "step": 12, "samples": 88, "reason": "loss nan, gradient norm nan"}
    (saved,) = _ledger(raw, 20)
    assert len(saved.pop("order")) == 16
    assert saved | {"reason": saved["reason"].replace("inf", "nan")} == entry
    # the resume from step 10 skips the update, although there is no bad number now
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    run_ranks(train, 2, raw)
    again = curve(raw, first=11)
    assert again[2:] == whole[12:]
    assert _events(raw, "skip")[-1]["reason"].startswith("as in an earlier start: ")


def test_nan_in_the_reference_engine_skips_the_update(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, deepspeed=zero(0), guards=GUARDS)
    assert run_ranks(
        partial(_train_planted, engine="reference"), 1, raw, 0, math.nan, PLACE - 2
    ) == [""]
    assert [row["step"] for row in _events(raw, "skip")] == [12]


def test_too_many_skips_in_a_row_end_the_run(shards: dict[str, str], tmp_path: Path) -> None:
    raw = run_file(shards, tmp_path, guards=GUARDS | {"max_skips": 3}, checkpoint={"every": 5})
    places = [PLACE + 8 * row for row in range(9)]
    errors = run_ranks(_train_planted, 2, raw, 1, math.inf, *places)
    assert all("step 15: " in error and "guards.max_skips" in error for error in errors)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("failed", "step_00000010")


@pytest.mark.parametrize("policy", ["off", "log", "skip"])
def test_spike_is_handled_by_the_policy(
    shards: dict[str, str], tmp_path: Path, policy: str
) -> None:
    raw = run_file(shards, tmp_path, training=LONG, guards=GUARDS | {"spike": policy})
    assert run_ranks(_train_planted, 2, raw, 1, 50.0, 24 * 8 + 2) == ["", ""]
    name = {"off": None, "log": "spike", "skip": "skip"}[policy]
    names = [r["name"] for r in rows(raw, "event") if r["name"] in ("spike", "skip", "rollback")]
    assert names == ([name] if name else [])
    if name:
        (event,) = _events(raw, name)
        assert event["step"] == 25
        assert "the loss jumped to" in event["reason"]


@pytest.mark.parametrize("stage", [1, 3])
def test_rollback_omits_the_data_around_the_spike(
    shards: dict[str, str], tmp_path: Path, stage: int
) -> None:
    """The run goes back to step 20, and trains on later data instead."""
    guards = GUARDS | {"spike": "rollback"}
    raw = run_file(
        shards,
        tmp_path,
        training=LONG,
        guards=guards,
        deepspeed=zero(stage),
        checkpoint={"every": 10, "background": True},
    )
    assert run_ranks(_train_planted, 2, raw, 1, 50.0, 24 * 8 + 2) == ["", ""]
    (back,) = _events(raw, "rollback")
    assert (back["step"], back["to"], back["gap"]) == (25, 20, [23 * 8, 25 * 8])
    trained = {row["step"]: row for row in rows(raw)}
    assert [trained[step]["samples"] for step in (23, 24, 30)] == [23 * 8, 26 * 8, 32 * 8]
    assert all(row["loss"] < 10 for row in trained.values())
    whole = curve(raw)
    # a resume from before the spike gives the same numbers, although there is no spike now
    for step in (20, 30):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    run_ranks(train, 2, raw)
    assert curve(raw, first=11) == whole[10:]
    assert [e["kind"] for e in _ledger(raw, 30)] == ["rollback"]


def test_gaps_of_an_old_data_order_have_no_effect_in_a_new_one(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """With other data, positions start again at 0."""
    guards = GUARDS | {"spike": "rollback"}
    raw = run_file(
        shards, tmp_path, training=LONG, guards=guards, checkpoint={"every": 10, "keep": 9}
    )
    assert run_ranks(_train_planted, 1, raw, 0, 50.0, 24 * 8) == [""]
    (back,) = _events(raw, "rollback")
    assert back["gap"] == [23 * 8, 25 * 8]
    raw["training"] |= {"steps": 58}
    raw["data"] |= {"seed": 5}
    # a spike in the new order goes back to the old checkpoint, at the position of the new order
    places = [(step - 31) * 8 for step in (45,)]
    changed = partial(_train_planted, allow_change=("seed",))
    assert run_ranks(changed, 1, raw, 0, 50.0, *places) == [""]
    again = _events(raw, "rollback")[-1]
    assert (again["step"], again["to"], again["gap"]) == (45, 40, [13 * 8, 15 * 8])
    trained = {row["step"]: row["samples"] for row in rows(raw) if row["step"] > 30}
    gap = {step: (step - 30) * 8 + 16 * (step > 43) for step in range(31, 59)}
    assert trained == gap
    # a resume from the last checkpoint of the old order repeats the gap of the new order
    root = tmp_path / "run" / "checkpoints"
    for path in root.glob("step_000000[45]*"):
        shutil.rmtree(path)
    run_ranks(_allow, 1, raw)
    assert {row["step"]: row["samples"] for row in rows(raw) if row["step"] > 30} == gap
    # a resume in the old order has the gap of the old order
    for path in root.glob("step_000000[345]*"):
        shutil.rmtree(path)
    raw["training"] |= {"steps": 26}
    del raw["data"]["seed"]
    run_ranks(train, 1, raw)
    assert rows(raw)[-1]["samples"] == 28 * 8


def _allow(launch: Any, raw: dict[str, Any]) -> None:
    train(launch, raw, allow_change=("seed",))


def test_spike_without_a_checkpoint_skips_the_update(
    shards: dict[str, str], tmp_path: Path
) -> None:
    raw = run_file(shards, tmp_path, training=LONG, guards=GUARDS | {"spike": "rollback"})
    assert run_ranks(_train_planted, 2, raw, 0, 50.0, 24 * 8) == ["", ""]
    assert [row["step"] for row in _events(raw, "skip")] == [25]
    assert [row["step"] for row in rows(raw)] == [*range(1, 31)]


def test_intervention_log_that_was_cut_by_a_crash_continues(tmp_path: Path) -> None:
    """The incomplete line is ignored, and later entries start on a new line."""
    entry = {"kind": "skip", "step": 3, "samples": 16, "reason": "loss nan"}
    path = tmp_path / "interventions.jsonl"
    path.write_text(json.dumps({"kind": "start"}) + "\n" + '{"kind": "ski')
    origin = tmp_path / "step_00000002"
    origin.mkdir()
    with world_of_one() as grid:
        ledger = InterventionLog(tmp_path, grid, 16)
        ledger.begin(origin)
        ledger.add(entry)
        ledger.begin(origin)
        assert ledger.entries == [entry]
        assert ledger.skipped(3, 16) == entry
        assert ledger.skipped(3, 24) is None
        for gap in ([40, 56], [8, 24], [24, 32]):
            ledger.add({"kind": "rollback", "step": 9, "samples": 64, "to": 1, "gap": gap})
        assert ledger.gaps == ((8, 32), (40, 56))
        ledger.begin(None)
        assert ledger.entries == []
        assert path.read_text().endswith(json.dumps({"kind": "start"}) + "\n")


def test_gaps_of_the_data_order_are_skipped_at_any_batch_size() -> None:
    gaps = ((10, 14), (20, 21))
    whole = [place for place in range(100) if not any(a <= place < b for a, b in gaps)]
    for size in (1, 3, 8):
        place, seen = 0, list[int]()
        for _ in range(24 // size):
            seen += skip_gaps(place + np.arange(size), place, gaps).tolist()
            place = advance(place, size, gaps)
        assert seen == whole[: len(seen)]
        assert advance(place, 1, gaps) == whole[len(seen)] + 1


def test_too_many_rollbacks_end_the_run(shards: dict[str, str], tmp_path: Path) -> None:
    """The second spike is in the data after the gap of the first."""
    guards = GUARDS | {"spike": "rollback", "max_rollbacks": 1}
    raw = run_file(shards, tmp_path, training=LONG, guards=guards, checkpoint={"every": 10})
    errors = run_ranks(_train_planted, 2, raw, 0, 50.0, 24 * 8, 26 * 8)
    assert all("after 1 rollbacks (guards.max_rollbacks)" in error for error in errors)
    assert [row["step"] for row in _events(raw, "rollback")] == [25]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("failed", "step_00000020")

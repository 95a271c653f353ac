# covers: megalite/plan/search.py megalite/plan/tables.py megalite/plan/command.py
"""The search for layouts: which ones fit, their order, and the rank of the current layout."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import RunConfig, load_config, merged, parse_config
from megalite.plan.devices import DEVICES
from megalite.plan.forecast import forecast
from megalite.plan.search import rank, run_file, search
from megalite.plan.seconds import Cluster
from megalite.plan.tables import describe_ranking

ROOT = Path(__file__).resolve().parents[3]
H100 = DEVICES["h100-80gb"]


def shipped(name: str, *sets: str) -> Any:
    return load_config(ROOT / "configs" / f"{name}.json", sets)


def load_changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    return parse_config(merged(run.model_dump(mode="json"), changes))


def test_search_ranks_the_layouts_that_fit(tmp_path: Path) -> None:
    cluster = Cluster(DEVICES["a100-40gb"], 1, 8)
    run = shipped("1b", "model.num_key_value_heads=2")
    ranking = rank(run, cluster)
    candidates = ranking.candidates
    assert all(one.forecast.fits for one in candidates)
    rates = [round(one.forecast.tokens_per_second) for one in candidates]
    assert rates == sorted(rates, reverse=True)
    assert len({json.dumps(one.changes) for one in candidates}) == len(candidates)
    source, file = tmp_path / "in" / "mine.json", tmp_path / "out" / "best.json"
    for path in (source, file):
        path.parent.mkdir()
    source.write_text(json.dumps({"extends": str(ROOT / "configs" / "1b.json"), "name": "mine"}))
    changes = {"model": {"num_key_value_heads": 2}, "training": {"steps": 7}}
    file.write_text(json.dumps(run_file(candidates[0], file, source, changes)))
    again = load_config(file)
    assert (again.name, again.training.steps) == ("mine", 7)
    assert forecast(again, cluster).tokens_per_second == candidates[0].forecast.tokens_per_second
    assert ranking.fitting >= len(candidates) == 50


def test_search_includes_the_current_layout() -> None:
    for sizes in ((120, 15), (8 * 150, 150)):
        names = ("global_batch_size", "micro_batch_size")
        current = [f"training.{name}={size}" for name, size in zip(names, sizes, strict=True)]
        run, cluster = shipped("125m", *current), Cluster(H100, 1, 8)
        candidates = search(run, cluster, limit=1000)
        plans = [one.forecast.plan for one in candidates]
        assert sizes[1] in {plan.micro_batch_size for plan in plans}
        assert {8, 16}.isdisjoint({p.micro_batch_size for p in plans if p.data_parallel == 8})
        assert candidates[0].forecast.tokens_per_second >= forecast(run, cluster).tokens_per_second


def test_ranking_explains_the_rank_of_the_current_layout() -> None:
    cluster = Cluster(H100, 4, 8)
    slow = shipped("7b", "parallel.tensor=8", "training.activation_checkpointing=full")
    ranking = rank(slow, cluster)
    assert ranking.current is not None
    assert ranking.current_rank is not None
    assert 50 < ranking.current_rank <= ranking.fitting
    current = forecast(slow, cluster)
    assert ranking.current.forecast == current
    *rows, place, reason = describe_ranking(ranking, 3).splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["1", "2", "3", "yours"]
    assert place == f"your layout: rank {ranking.current_rank} of {ranking.fitting} that fit"
    more = current.seconds.total - ranking.candidates[0].forecast.seconds.total
    assert reason.startswith(f"compared with rank 1, its step takes {more:+.3g} s: compute +")
    best = rank(load_changed(slow, ranking.candidates[0].changes), cluster)
    assert best.current_rank == 1
    assert "compared with rank 1" not in describe_ranking(best)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["deepspeed.zero_optimization.stage=1"], "your layout does not fit: "),
        (["training.micro_batch_size=32"], "your layout cannot be planned: training.global_batch"),
    ],
)
def test_ranking_explains_why_the_current_layout_has_no_rank(sets: list[str], said: str) -> None:
    ranking = rank(shipped("70b", *sets), Cluster(H100, 8, 8), limit=1)
    assert ranking.current_rank is None
    assert said in describe_ranking(ranking)


def test_search_ranks_slow_layouts_too() -> None:
    """Rates near one token per second are compared in all digits."""
    slow = dataclasses.replace(H100, bf16=1e9, memory=1 << 50, fp32=1e9)
    candidates = search(shipped("1b"), Cluster(slow, 1, 8))
    rates = [one.forecast.tokens_per_second for one in candidates]
    assert max(rates) < 10
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(rates))


def test_search_may_find_no_layout() -> None:
    assert search(shipped("70b"), Cluster(DEVICES["rtx-4090"], 1, 1)) == []


@pytest.mark.parametrize(("name", "nodes"), [("7b", 4), ("13b", 4), ("70b", 8)])
def test_shipped_layouts_are_within_3_points_of_the_best(name: str, nodes: int) -> None:
    run, cluster = shipped(name), Cluster(H100, nodes, 8)
    best, current = search(run, cluster, limit=1)[0].forecast, forecast(run, cluster)
    assert current.fits
    assert current.mfu > best.mfu - 0.03

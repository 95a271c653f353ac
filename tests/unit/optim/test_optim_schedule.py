# covers: megalite/optim/schedule.py
"""The learning rate at steps whose value can be worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from megalite.optim import learning_rate
from tests.helpers.models import run_config


def rates(steps: list[int], *, total: int = 100, **schedule: Any) -> list[float]:
    config = run_config(schedule=schedule, optimizer={"lr": 8.0}, training={"steps": total})
    return [learning_rate(config, step) for step in steps]


def approx(*values: float) -> Any:
    return pytest.approx(values, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_from_a_first_step_above_zero(name: str) -> None:
    found = rates([1, 2, 5, 9, 10], name=name, warmup_steps=10)
    assert tuple(found) == approx(0.8, 1.6, 4.0, 7.2, 8.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_no_warmup_starts_near_the_peak(name: str) -> None:
    assert rates([1], name=name, warmup_steps=0)[0] == pytest.approx(8.0, rel=0.01)


def test_cosine() -> None:
    """20 steps up, then half a wave over the 80 to the end, down to a tenth."""
    found = rates([20, 40, 60, 80, 100], name="cosine", warmup_steps=20, min_lr_ratio=0.1)
    quarter = math.sqrt(0.5)
    middle = 0.8 + 7.2 / 2
    assert tuple(found) == approx(8.0, middle + 3.6 * quarter, middle, middle - 3.6 * quarter, 0.8)


def test_cosine_over_decay_steps_then_stays_at_the_floor() -> None:
    found = rates(
        [10, 30, 50, 51, 100], name="cosine", warmup_steps=10, decay_steps=40, min_lr_ratio=0.25
    )
    assert tuple(found) == approx(8.0, 5.0, 2.0, 2.0, 2.0)


def test_linear() -> None:
    found = rates([20, 21, 60, 99, 100], name="linear", warmup_steps=20, min_lr_ratio=0.0)
    assert tuple(found) == approx(8.0, 7.9, 4.0, 0.1, 0.0)
    found = rates([4, 14, 24, 25], name="linear", warmup_steps=4, decay_steps=20, min_lr_ratio=0.5)
    assert tuple(found) == approx(8.0, 6.0, 4.0, 4.0)


def test_constant_has_no_floor() -> None:
    found = rates([3, 50, 100, 1000], name="constant", warmup_steps=2, min_lr_ratio=0.1)
    assert tuple(found) == approx(8.0, 8.0, 8.0, 8.0)


def test_wsd_decays_over_a_tenth_unless_told() -> None:
    found = rates([10, 50, 90, 95, 100], name="wsd", warmup_steps=10, min_lr_ratio=0.1)
    assert tuple(found) == approx(8.0, 8.0, 8.0, 4.4, 0.8)
    found = rates([60, 61, 80, 100], name="wsd", decay_steps=40, min_lr_ratio=0.0)
    assert tuple(found) == approx(8.0, 7.8, 4.0, 0.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_beyond_the_end_is_the_floor(name: str) -> None:
    assert tuple(rates([100, 101, 10**6], name=name, min_lr_ratio=0.2)) == approx(1.6, 1.6, 1.6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_floor_of_one_is_constant(name: str) -> None:
    assert tuple(rates([1, 50, 100], name=name, min_lr_ratio=1.0)) == approx(8.0, 8.0, 8.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_a_trial_shorter_than_its_warmup(name: str) -> None:
    """`--set training.steps=5` of a long run keeps that run's warmup."""
    assert tuple(rates([1, 5], total=5, name=name, warmup_steps=20)) == approx(0.4, 2.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 9])
@pytest.mark.parametrize("warmup", [0, 1])
def test_runs_of_a_few_steps(name: str, total: int, warmup: int) -> None:
    found = rates(list(range(1, total + 1)), total=total, name=name, warmup_steps=warmup)
    assert all(0.8 - 1e-12 <= rate <= 8.0 for rate in found)
    assert found == sorted(found, reverse=True)
    if name != "constant" and total > warmup:
        assert found[-1] == pytest.approx(0.8)


def test_a_longer_run_keeps_the_steps_of_wsd_behind_it() -> None:
    """Why wsd is used: more steps change nothing before the old decay began."""
    before = [rates([step], total=100, name="wsd", warmup_steps=10)[0] for step in range(1, 91)]
    after = [rates([step], total=200, name="wsd", warmup_steps=10)[0] for step in range(1, 91)]
    assert before == after


def test_wsd_never_decays_faster_than_its_decay() -> None:
    """A warmup that reaches into the last tenth must not make the rate fall off a cliff."""
    found = rates(list(range(1, 101)), name="wsd", warmup_steps=97, min_lr_ratio=0.0)
    falls = [a - b for a, b in itertools.pairwise(found)]
    assert max(falls) <= 8.0 / 3 + 1e-9
    assert found[-1] == pytest.approx(0.0)

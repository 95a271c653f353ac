# covers: megalite/optim/schedule.py
"""The learning rate at steps for which it can be computed by hand."""

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
def test_warmup_starts_above_zero_and_ends_at_the_peak(name: str) -> None:
    values = rates([1, 2, 5, 9, 10], name=name, warmup_steps=10)
    assert tuple(values) == approx(0.8, 1.6, 4.0, 7.2, 8.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedule_without_warmup_starts_near_the_peak(name: str) -> None:
    assert rates([1], name=name, warmup_steps=0)[0] == pytest.approx(8.0, rel=0.01)


def test_cosine_falls_over_the_rest_of_the_run() -> None:
    """The rate rises for 20 steps, then falls along half a cosine over 80 steps to a tenth."""
    values = rates([20, 40, 60, 80, 100], name="cosine", warmup_steps=20, min_lr_ratio=0.1)
    quarter = math.sqrt(0.5)
    middle = 0.8 + 7.2 / 2
    assert tuple(values) == approx(8.0, middle + 3.6 * quarter, middle, middle - 3.6 * quarter, 0.8)


def test_cosine_falls_over_decay_steps_and_stays_at_the_floor() -> None:
    values = rates(
        [10, 30, 50, 51, 100], name="cosine", warmup_steps=10, decay_steps=40, min_lr_ratio=0.25
    )
    assert tuple(values) == approx(8.0, 5.0, 2.0, 2.0, 2.0)


def test_linear_falls_over_the_rest_of_the_run_or_decay_steps() -> None:
    values = rates([20, 21, 60, 99, 100], name="linear", warmup_steps=20, min_lr_ratio=0.0)
    assert tuple(values) == approx(8.0, 7.9, 4.0, 0.1, 0.0)
    values = rates([4, 14, 24, 25], name="linear", warmup_steps=4, decay_steps=20, min_lr_ratio=0.5)
    assert tuple(values) == approx(8.0, 6.0, 4.0, 4.0)


def test_constant_has_no_floor() -> None:
    values = rates([3, 50, 100, 1000], name="constant", warmup_steps=2, min_lr_ratio=0.1)
    assert tuple(values) == approx(8.0, 8.0, 8.0, 8.0)


def test_wsd_decays_over_a_tenth_by_default_or_over_decay_steps() -> None:
    values = rates([10, 50, 90, 95, 100], name="wsd", warmup_steps=10, min_lr_ratio=0.1)
    assert tuple(values) == approx(8.0, 8.0, 8.0, 4.4, 0.8)
    values = rates([60, 61, 80, 100], name="wsd", decay_steps=40, min_lr_ratio=0.0)
    assert tuple(values) == approx(8.0, 7.8, 4.0, 0.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedule_stays_at_the_floor_after_the_end(name: str) -> None:
    assert tuple(rates([100, 101, 10**6], name=name, min_lr_ratio=0.2)) == approx(1.6, 1.6, 1.6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedule_with_a_floor_of_one_is_constant(name: str) -> None:
    assert tuple(rates([1, 50, 100], name=name, min_lr_ratio=1.0)) == approx(8.0, 8.0, 8.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warmup_longer_than_the_run_only_rises(name: str) -> None:
    """A short trial of a long run (`--set training.steps=5`) keeps the run's warmup."""
    assert tuple(rates([1, 5], total=5, name=name, warmup_steps=20)) == approx(0.4, 2.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 9])
@pytest.mark.parametrize("warmup", [0, 1])
def test_schedule_of_a_few_steps_falls_to_the_floor(name: str, total: int, warmup: int) -> None:
    values = rates(list(range(1, total + 1)), total=total, name=name, warmup_steps=warmup)
    assert all(0.8 - 1e-12 <= rate <= 8.0 for rate in values)
    assert values == sorted(values, reverse=True)
    if name != "constant" and total > warmup:
        assert values[-1] == pytest.approx(0.8)


def test_wsd_of_a_longer_run_has_the_same_rates_before_the_decay() -> None:
    """This is the purpose of wsd: more steps do not change the steps before the old decay."""
    before = [rates([step], total=100, name="wsd", warmup_steps=10)[0] for step in range(1, 91)]
    after = [rates([step], total=200, name="wsd", warmup_steps=10)[0] for step in range(1, 91)]
    assert before == after


def test_wsd_never_decays_faster_than_its_decay() -> None:
    """If the warmup reaches into the last tenth, the rate must not drop at once."""
    values = rates(list(range(1, 101)), name="wsd", warmup_steps=97, min_lr_ratio=0.0)
    falls = [a - b for a, b in itertools.pairwise(values)]
    assert max(falls) <= 8.0 / 3 + 1e-9
    assert values[-1] == pytest.approx(0.0)

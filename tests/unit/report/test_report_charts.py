# covers: megalite/report/charts.py
"""Scales and downsampling of the report's curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.report.charts import compact, smoothed, thin, ticks


def test_thin_keeps_the_extremes_of_a_million_values() -> None:
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[[123_456, 654_321]] = 50.0, -50.0
    values[300_000:310_000] = math.nan
    indices = thin(values)
    assert 900 < len(indices) <= 1002
    assert {0, 123_456, 654_321, 999_999} <= {*indices.tolist()}
    assert np.isnan(values[indices]).any()  # the gap stays a gap
    assert thin(values[:1000]).tolist() == list(range(1000))


def test_smoothed_is_a_mean_without_lag() -> None:
    line = np.arange(400.0)
    assert smoothed(line)[20:-20] == pytest.approx(line[20:-20])
    line[7] = math.nan
    assert np.flatnonzero(np.isnan(smoothed(line))).tolist() == [7]
    powers = np.exp(np.arange(400.0) / 100)
    assert smoothed(powers, wide=True)[20:-20] == pytest.approx(powers[20:-20])


@given(
    low=st.floats(-1e9, 1e9), span=st.floats(1e-3, 1e9), count=st.integers(2, 6), wide=st.booleans()
)
def test_ticks_lie_within_and_are_few(low: float, span: float, count: int, wide: bool) -> None:
    low = abs(low) + 1e-3 if wide else low
    values = ticks(low, low + span, count, wide=wide)
    room = 1e-9 * max(abs(low), abs(low + span))
    assert all(low - room <= value <= low + span + room for value in values)
    assert len(values) <= 2 * count + 2
    assert values == sorted(values)


def test_compact_shortens_numbers() -> None:
    texts = {0.0003: "0.0003", 12.5: "12.5", 250_000: "250k", 1.2e9: "1.2B", 0: "0", -2e6: "-2M"}
    assert {value: compact(value) for value in texts} == texts

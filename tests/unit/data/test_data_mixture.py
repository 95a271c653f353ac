# covers: megalite/data/mixture.py
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.mixture import Mixture
from megalite.data.order import LIMIT
from megalite.errors import DataError

WEIGHTS = st.lists(
    st.floats(1e-6, 1e6, allow_nan=False) | st.integers(1, 10**13), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=120)
@given(weights=WEIGHTS)
def test_mixture_keeps_the_proportions_in_every_prefix(weights: list[float]) -> None:
    n = 3000
    source, number = Mixture(weights).source_of(np.arange(n))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    # a sample's number is how many of its source came before it
    assert np.array_equal(number, counts[np.arange(n), source] - 1)
    ideal = np.arange(1, n + 1)[:, None] * (np.array(weights) / math.fsum(weights))
    assert np.abs(counts - ideal).max() <= 1 + math.log2(len(weights)) + 1e-9


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, start=st.integers(0, LIMIT - 400))
def test_mixture_keeps_the_proportions_at_large_indices(weights: list[float], start: int) -> None:
    """A sample's number is the count of its source in the prefix before it."""
    source, number = Mixture(weights).source_of(np.arange(start, start + 400))
    total = sum(map(Fraction, weights))
    bound = 1 + Fraction(math.log2(len(weights)))
    for place, one, count in zip(range(start, start + 400), source, number, strict=True):
        assert abs(int(count) - place * Fraction(weights[one]) / total) <= bound
    for one in np.unique(source):
        assert np.array_equal(np.diff(number[source == one]), np.ones((source == one).sum() - 1))


def test_mixture_by_windows_reads_each_window_once_an_epoch() -> None:
    windows = [3, 1, 410, 77, 9, 2]
    source, number = Mixture(windows).source_of(np.arange(2 * sum(windows)))
    for epoch in range(2):
        part = slice(epoch * sum(windows), (epoch + 1) * sum(windows))
        for i, count in enumerate(windows):
            numbers = number[part][source[part] == i]
            assert numbers.tolist() == list(range(epoch * count, (epoch + 1) * count))


def test_mixture_of_one_source_is_the_identity() -> None:
    index = np.array([0, 1, 5, LIMIT - 1])
    source, number = Mixture([0.3]).source_of(index)
    assert source.tolist() == [0, 0, 0, 0]
    assert np.array_equal(number, index)


def test_mixture_does_not_depend_on_the_scale_of_weights() -> None:
    index = np.arange(1000)
    small, large = Mixture([0.25, 0.5, 1.0]).source_of(index), Mixture([1, 2, 4]).source_of(index)
    assert np.array_equal(small[0], large[0])
    assert np.array_equal(small[1], large[1])
    assert Mixture([1, 3]).shares == [0.25, 0.75]


def test_mixture_accepts_extreme_weights() -> None:
    weights = [1e-300, 1e300, 1.0]
    source, number = Mixture(weights).source_of(np.array([0, 1, 2, LIMIT - 1]))
    assert source.tolist() == [1, 1, 1, 1]
    assert number.tolist() == [0, 1, 2, LIMIT - 1]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [float("nan"), 1.0], [float("inf")]])
def test_mixture_refuses_bad_weights(weights: list[float]) -> None:
    with pytest.raises(DataError, match="positive, finite weights"):
        Mixture(weights)

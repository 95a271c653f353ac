# covers: megalite/data/order.py
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.order import LIMIT, derive_key, permute

KEYS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 5000), key=KEYS)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 65535, 65536, 65537, 99991, 316**2 + 1])
def test_permute_is_a_bijection_at_odd_sizes(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2**40, LIMIT), key=KEYS, start=st.integers(0, 2**39))
def test_permute_of_huge_sets_stays_inside_and_distinct(size: int, key: int, start: int) -> None:
    image = permute(np.arange(start, start + 256), size, key)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == 256


@settings(deadline=None, max_examples=60)
@given(
    size=st.one_of(
        st.integers(2**32, LIMIT),
        st.integers(2**16, 2**21).map(lambda root: root * root),
        st.integers(2**16, 2**21).map(lambda root: root * root + 1),
        st.sampled_from([2**32 - 5, 2**32 + 15, 2**42 - 11, 2**43 - 57]),  # primes
    ),
    key=KEYS,
    seed=st.integers(0, 2**32),
)
def test_permute_of_sampled_indices_is_one_to_one(size: int, key: int, seed: int) -> None:
    """For sets too large to enumerate, a sample of indices has as many images."""
    edges = np.array([0, 1, size // 2, size - 2, size - 1])
    scattered = np.random.default_rng(seed).integers(0, size, 3000)
    index = np.unique(np.concatenate([edges, scattered, scattered // 2]))
    image = permute(index, size, key)
    assert 0 <= image.min() <= image.max() < size
    assert len(np.unique(image)) == len(index)
    # Every tenth of the set has images.
    assert len(np.unique(image * 10 // size)) == 10


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, LIMIT), KEYS, st.floats(0, 1)), min_size=1, max_size=40))
def test_permute_of_arrays_is_permute_of_each(cases: list[tuple[int, int, float]]) -> None:
    sizes = np.array([size for size, _, _ in cases])
    keys = np.array([key for _, key, _ in cases], dtype=np.uint64)
    index = np.array([min(size - 1, int(size * part)) for size, _, part in cases])
    together = permute(index, sizes, keys)
    alone = [permute(int(i), int(s), int(k)) for i, s, k in zip(index, sizes, keys, strict=True)]
    assert together.tolist() == alone
    assert np.array_equal(permute(index[None], sizes, keys), together[None])


def test_permute_refuses_an_index_outside() -> None:
    with pytest.raises(AssertionError):
        permute(5, 5, 0)


def test_permute_gives_the_values_of_the_first_release() -> None:
    """Other values would change the data order of every seed."""
    assert permute(np.arange(10), 10, 1234).tolist() == [5, 6, 7, 8, 0, 4, 3, 2, 9, 1]
    assert permute(123_456_789, 5_000_000_000, 42) == 1735973760
    keys = derive_key(1234, np.array([0, 1]), np.array([3, 3]))
    assert keys.tolist() == [5410454076732896507, 3554909566011146982]


@pytest.mark.parametrize("size", [20_000, 65_536, 100_003])
@pytest.mark.parametrize("key", [0, 1, 987_654_321])
def test_permute_has_no_serial_correlation(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key).astype(float)
    for lag in (1, 2, 3, 8, 64, 317):
        correlation = np.corrcoef(image[:-lag], image[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)


@pytest.mark.parametrize("size", [20_000, 100_003])
def test_permute_spreads_any_range_evenly(size: int) -> None:
    image = permute(np.arange(size), size, 11)
    for stretch in np.array_split(image, 7):
        counts = np.histogram(stretch, bins=50, range=(0, size))[0]
        expected = len(stretch) / 50
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert 10 < chi_square < 100  # 49 degrees of freedom: a chance in 10^4 or less


@pytest.mark.parametrize("size", [2, 3, 5, 6, 13])
def test_permute_gives_every_image_equally_often_over_keys(size: int) -> None:
    trials = 6000
    keys = derive_key(5, np.arange(trials), np.zeros(trials, dtype=np.int64))
    for index in range(size):
        image = permute(np.full(trials, index), size, keys)
        counts = np.bincount(image, minlength=size)
        chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert chi_square < size - 1 + 5 * np.sqrt(2 * size)


def test_permute_of_three_gives_all_six_shuffles_equally_often() -> None:
    trials = 6000
    keys = derive_key(6, np.arange(trials), np.zeros(trials, dtype=np.int64))
    code = sum(permute(np.full(trials, i), 3, keys) * 3**i for i in range(3))
    counts = np.unique(np.asarray(code), return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25


def normal_quantile(statistic: float, freedom: int) -> float:
    """Return a chi-square value in standard deviations from its mean (Wilson & Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return float((np.cbrt(statistic / freedom) - (1 - spread)) / np.sqrt(spread))


# Standard deviations in either direction; more have a probability of about one in a million.
CHANCE = 5.0


@pytest.mark.parametrize("size", [1009, 4096, 2**33 + 1, LIMIT])
@pytest.mark.parametrize("place", ["first", "second", "last"])
def test_permute_is_uniform_over_keys_at_a_place(size: int, place: str) -> None:
    trials, bins = 40_000, 100
    index = {"first": 0, "second": 1, "last": size - 1}[place]
    keys = derive_key(7, np.arange(trials), np.full(trials, 3))
    image = permute(np.full(trials, index), size, keys)
    edges = (np.arange(bins + 1) * size) // bins
    counts, _ = np.histogram(image, edges)
    expected = np.diff(edges) * (trials / size)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(normal_quantile(statistic, bins - 1)) < CHANCE


@pytest.mark.parametrize("size", [1009, 4096, 2**33 + 1])
@pytest.mark.parametrize("distance", [1, 2, 64])
def test_permute_is_independent_over_keys_at_two_places(size: int, distance: int) -> None:
    """The images of two indices, as a table of 20 x 20 cells."""
    trials, bins = 40_000, 20
    keys = derive_key(8, np.zeros(trials, np.int64), np.arange(trials))
    pair = [permute(np.full(trials, i), size, keys) * bins // size for i in (5, 5 + distance)]
    counts = np.bincount(pair[0] * bins + pair[1], minlength=bins * bins)
    expected = trials / bins**2
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(normal_quantile(statistic, bins * bins - 1)) < CHANCE


@pytest.mark.parametrize("size", [65_536, 99_991, 2**33 + 1, LIMIT])
def test_permute_does_not_correlate_neighbours(size: int) -> None:
    """Serial correlation of the images, and of their distances modulo the size."""
    count = 60_000
    for key in (0, 1, 2**63, 123_456_789):
        image = permute(np.arange(count), size, key) / size
        steps = np.diff(image) % 1.0
        for series in (image, steps):
            for lag in (1, 2, 3, 5, 256, 257):
                correlation = np.corrcoef(series[:-lag], series[lag:])[0, 1]
                assert abs(correlation) < 5.5 / np.sqrt(count - lag)
        counts, _ = np.histogram(steps, bins=64, range=(0, 1))
        statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert abs(normal_quantile(statistic, 63)) < CHANCE


@pytest.mark.parametrize("seed", [0, 1])
def test_permute_orders_of_epochs_and_sources_are_independent(seed: int) -> None:
    """Two shuffles have about one element in the same position, as two random ones do."""
    size = 5003
    keys = derive_key(seed, np.repeat([0, 1], 6), np.tile(np.arange(6), 2)).tolist()
    orders = [permute(np.arange(size), size, key) for key in keys]
    equal = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert len(equal) == 66
    assert max(equal) < 12  # Poisson of mean 1: a chance in 10^7 for all of them
    assert 30 < sum(equal) < 115  # mean 66, deviation 8


def test_derive_key_is_unique_for_seed_source_and_epoch() -> None:
    source, epoch = (grid.ravel() for grid in np.meshgrid(np.arange(50), np.arange(50)))
    keys = np.concatenate([derive_key(seed, source, epoch) for seed in (0, 1, 2, 2**63 - 1)])
    assert len(np.unique(keys)) == len(keys)

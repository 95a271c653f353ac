"""The order of samples as a keyed permutation that is computed, never stored.

A Feistel network permutes the smallest rectangle a x b that contains [0, size). If an image is
outside [0, size), the network is applied again until it is inside (cycle walking), which makes a
permutation of [0, size). Both are from Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
(2002). Images are rarely outside, because a x b exceeds `size` by less than a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

LIMIT = 2**43  # samples, or windows of a source: about 2 x 10^16 tokens in windows of 2,048

# Six rounds of a random function are indistinguishable from a random permutation (Patarin 2004).
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio; gives each round another key


def skip_gaps(indices: Ints, start: int, gaps: Sequence[tuple[int, int]]) -> Ints:
    """Return positions in the data order after skipping its gaps.

    Args:
        indices: ascending positions from `start` on, counted without gaps.
        gaps: ranges [first, last), ascending and disjoint. Those that end before `start` are
            ignored.
    """
    moved = indices.copy()
    for first, last in gaps:
        if last > start:
            moved[moved >= max(first, start)] += last - max(first, start)
    return moved


@overload
def permute(index: int, size: int, key: int) -> int: ...
@overload
def permute(index: Ints, size: int | Ints, key: int | Words) -> Ints: ...
def permute(index: int | Ints, size: int | Ints, key: int | Words) -> int | Ints:
    """Return the image of `index` under the permutation of [0, size) that `key` selects.

    Takes constant memory, and constant time for each index.

    Args:
        index: an index or an array of indices, each in [0, size).
        size: at most `LIMIT`; one size for all indices, or one for each.
        key: 64 bits; one key for all indices, or one for each.
    Returns:
        a number or an int64 array, as `index`.
    """
    if not isinstance(index, np.ndarray):
        return int(permute(np.array([index], dtype=np.int64), size, key)[0])
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), index.shape).ravel()
    keys = np.broadcast_to(np.asarray(_word(key), dtype=np.uint64), index.shape).ravel()
    image = index.astype(np.uint64).ravel()
    assert np.all(image < sizes)
    assert np.all(sizes <= LIMIT)
    keys = _mix(keys)
    columns = np.ceil(np.sqrt(sizes)).astype(np.uint64)  # exact: sizes are below 2^53
    rows = (sizes + columns - 1) // columns
    image = _feistel(image, rows, columns, keys)
    outside = np.flatnonzero(image >= sizes)
    while outside.size:
        image[outside] = _feistel(image[outside], rows[outside], columns[outside], keys[outside])
        outside = outside[image[outside] >= sizes[outside]]
    return image.astype(np.int64).reshape(index.shape)


def derive_key(seed: int, source: Ints, epoch: Ints) -> Words:
    """Return the keys of the sources' shuffles in the epochs: a uint64 array."""
    start = _mix(np.asarray([_word(seed)], dtype=np.uint64))
    return _mix(_mix(start + source.astype(np.uint64)) + epoch.astype(np.uint64))


def uniform(keys: Words, length: int, stream: int) -> npt.NDArray[np.float64]:
    """Return uniform random numbers in [0, 1), [keys, length], that depend on key and stream."""
    columns = np.arange(length, dtype=np.uint64) + np.uint64(stream << 40)
    return (_mix(_mix(keys)[:, None] + columns) >> np.uint64(11)) * 2.0**-53


def _feistel(image: Words, rows: Words, columns: Words, keys: Words) -> Words:
    """Apply the network, a permutation of [0, rows x columns).

    Each round shifts one half, modulo its range, by a hash of the other half.
    """
    left, right = np.divmod(image, columns)
    for number in range(1, _ROUNDS + 1):
        round_keys = keys + np.uint64(number * _GOLDEN % 2**64)
        # The hash has 56 bits, so that the sum does not overflow, which would break the shift.
        if number % 2:
            left = (left + (_mix(round_keys + right) >> np.uint64(8))) % rows
        else:
            right = (right + (_mix(round_keys + left) >> np.uint64(8))) % columns
    return left * columns + right


def _mix(words: Words) -> Words:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014), a hash of 64 bits."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _word(value: int | Words) -> int | Words:
    return value if isinstance(value, np.ndarray) else value % 2**64

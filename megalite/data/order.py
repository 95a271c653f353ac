"""The order of samples as a function: a keyed permutation that is computed, never stored.

A Feistel network over the smallest rectangle a x b that holds [0, size) is a bijection of the
rectangle; an image outside [0, size) is sent through it again until it falls inside, which makes a
bijection of [0, size) itself (cycle walking). Both from Black and Rogaway, "Ciphers with Arbitrary
Finite Domains" (2002). Since a x b exceeds `size` by less than a row, images rarely fall outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

LIMIT = 2**43  # samples, and windows of a source: two thousand tokens each, twice 10^16 tokens

# Six rounds of a random function look like a random permutation (Patarin 2004); two to spare.
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: makes the rounds' inputs differ


def leave_out(indices: Ints, start: int, gaps: Sequence[tuple[int, int]]) -> Ints:
    """Return places at or after `start`, moved behind the gaps of the order that precede them.

    Args:
        indices: ascending places from `start` on, as if there were no gaps.
        gaps: [first, last) each, ascending and disjoint; none counts if it ends before `start`.
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
    """Return where a shuffle of [0, size) under `key` puts `index`; each key gives another shuffle.

    Args:
        index: one index, or an array of them, each in [0, size).
        size: of the set, at most `LIMIT`; one for all, or one for each index.
        key: 64 bits; one for all, or one for each index.
    Returns:
        The type of `index`: a number, or int64 of its shape. Constant memory, O(1) time an index.
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
    """Return the key of a source's shuffle in an epoch: uint64, one for each element."""
    start = _mix(np.asarray([_word(seed)], dtype=np.uint64))
    return _mix(_mix(start + source.astype(np.uint64)) + epoch.astype(np.uint64))


def uniform(keys: Words, length: int, stream: int) -> npt.NDArray[np.float64]:
    """Return `length` numbers in [0, 1) for each key, [keys, length]; other streams give others."""
    columns = np.arange(length, dtype=np.uint64) + np.uint64(stream << 40)
    return (_mix(_mix(keys)[:, None] + columns) >> np.uint64(11)) * 2.0**-53


def _feistel(image: Words, rows: Words, columns: Words, keys: Words) -> Words:
    """Apply the network once: a bijection of [0, rows x columns).

    The halves take turns: each is shifted, modulo its range, by a hash of the other.
    """
    left, right = np.divmod(image, columns)
    for number in range(1, _ROUNDS + 1):
        round_keys = keys + np.uint64(number * _GOLDEN % 2**64)
        # 56 bits of hash: the sum stays below 2^64, where wrapping would not be a shift
        if number % 2:
            left = (left + (_mix(round_keys + right) >> np.uint64(8))) % rows
        else:
            right = (right + (_mix(round_keys + left) >> np.uint64(8))) % columns
    return left * columns + right


def _mix(words: Words) -> Words:
    """Apply the finaliser of SplitMix64 (Steele et al. 2014): every bit in moves every bit out."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _word(value: int | Words) -> int | Words:
    return value if isinstance(value, np.ndarray) else value % 2**64

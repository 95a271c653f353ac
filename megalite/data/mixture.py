"""The source of each sample in closed form: weighted interleaving without a table.

The sources are the leaves of a balanced binary tree. Let f be the left child's share of a node's
weight. The left child gets round(n f) of the node's first n samples. So sample n goes left if this
count grows, and the counts are the numbers of the children's samples. Every level adds at most 1/2
to a source's deviation from its share.

Shares are 60-bit integers and indices are below 2^43, so the results do not depend on floating
point. The rounding of a share changes a count by less than 2^-17.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from megalite.data.order import LIMIT, Ints, Words
from megalite.errors import DataError

_LIMB = 20  # bits; a limb times an index below 2^43 is below 2^63


class Mixture:
    """Interleaving of sources in proportion to positive, finite weights of any scale.

    Among the first n samples, a source with share w occurs n w times, plus or minus
    1 + log2(sources).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        faults = [repr(w) for w in weights if not (math.isfinite(w) and w > 0)]
        if faults or not weights:
            raise DataError(
                f"a mixture needs positive, finite weights, got {', '.join(faults) or 'none'}; "
                "remove sources that should not be read"
            )
        self._depth = (len(weights) - 1).bit_length()
        self._leaves = 2**self._depth
        # Node 1 is the root, node k has the children 2k and 2k + 1; unused leaves have weight 0.
        nodes = [Fraction(0)] * self._leaves + [Fraction(w) for w in weights]
        nodes += [Fraction(0)] * (2 * self._leaves - len(nodes))
        one = 2 ** (3 * _LIMB)
        shares = [0] * self._leaves
        for node in range(self._leaves - 1, 0, -1):
            nodes[node] = nodes[2 * node] + nodes[2 * node + 1]
            if nodes[node]:
                shares[node] = round(nodes[2 * node] * one / nodes[node])
        low = 2**_LIMB - 1
        self._limbs = [
            np.array(limbs, dtype=np.uint64)
            for limbs in (
                [share >> 2 * _LIMB for share in shares],
                [share >> _LIMB & low for share in shares],
                [share & low for share in shares],
            )
        ]
        self.shares = [float(Fraction(w) / nodes[1]) for w in weights]

    def source_of(self, index: Ints) -> tuple[Ints, Ints]:
        """Return the source of each sample, and the sample's number within that source.

        Args:
            index: int64, numbers of samples of the mixture, in [0, 2^43).
        Returns:
            two int64 arrays of the shape of `index`.
        """
        assert np.all((index >= 0) & (index < LIMIT))
        node = np.ones(index.shape, dtype=np.int64)
        number = index.astype(np.uint64)
        for _ in range(self._depth):
            limbs = [limb[node] for limb in self._limbs]
            left = _round_product(number, limbs)
            goes_right = _round_product(number + np.uint64(1), limbs) == left
            number = np.where(goes_right, number - left, left)
            node = 2 * node + goes_right
        return node - self._leaves, number.astype(np.int64)


def _round_product(number: Words, limbs: list[Words]) -> Words:
    """Return round(number x share), with halves rounded up, exactly, by limbs of 20 bits."""
    high, middle, low = limbs
    bits = np.uint64(_LIMB)
    carry = (number * low) >> bits
    carry = (number * middle + carry) >> bits
    return (number * high + carry + np.uint64(2 ** (_LIMB - 1))) >> bits

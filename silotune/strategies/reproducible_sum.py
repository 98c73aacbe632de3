"""A running sum whose result does not depend on the order of its terms.

Replies arrive in any order, yet the same updates must give the same adapter to the last bit, with any
number of workers and over any network. Floating-point addition is not associative; addition of
multiples of one power of two that stay below 2**53 of it is exact, hence associative. So each term is
first rounded to such a grid (pre-rounding: Demmel and Nguyen, "Fast Reproducible Floating-Point
Summation", ARITH 2013).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32] | NDArray[np.float64]

_BLOCK = 1 << 15  # float64 elements: two blocks stay in a core's second-level cache


class ReproducibleSum:
    """Exact running sum on the grid ``2**exponent``.

    Parameters
    ----------
    size : int
        Length of the vectors.
    exponent : int
        Terms are rounded to multiples of ``2**exponent``: an error of at most half of it a term.

    Notes
    -----
    Memory: one float64 vector, whatever the number of terms.
    """

    def __init__(self, size: int, *, exponent: int) -> None:
        self._total = np.zeros(size, dtype=np.float64)
        # Adding and subtracting 1.5 * 2**(52 + e) rounds to multiples of 2**e in round-to-nearest.
        self._shift = 1.5 * 2.0 ** (52 + exponent)
        # A term must leave room for 2**12 others below the 2**53 limit of exact addition.
        self.limit = 2.0 ** (52 + exponent - 12)
        self._block = np.empty(min(size, _BLOCK), dtype=np.float64)

    def add(self, vector: Values, weight: float = 1.0) -> None:
        """Add ``weight * vector``.

        Raises
        ------
        ValueError
            Another length, or an element whose weighted size passes `limit` (NaN included).
        """
        self.check(vector, weight)
        for start in range(0, vector.size, _BLOCK):
            part = vector[start : start + _BLOCK]
            block = self._block[: part.size]
            np.multiply(part, weight, out=block, dtype=np.float64)
            block += self._shift
            block -= self._shift
            self._total[start : start + _BLOCK] += block

    def check(self, vector: Values, weight: float = 1.0) -> None:
        """Raise what `add` would raise, and add nothing."""
        if vector.shape != self._total.shape:
            raise ValueError(f"expected {self._total.shape[0]} numbers, got {vector.size}")
        if vector.size == 0:
            return
        largest = max(float(vector.max()), -float(vector.min())) * abs(weight)
        if not largest < self.limit:  # also true for NaN
            raise ValueError("a number is NaN, infinite or beyond the range of the sum")

    def add_total(self, total: NDArray[np.float64]) -> None:
        """Add the sum of several weighted vectors, as somebody else computed it.

        Raises
        ------
        ValueError
            Another length, or an element that is NaN or infinite.
        """
        if total.shape != self._total.shape:
            raise ValueError(f"expected {self._total.shape[0]} numbers, got {total.size}")
        if not np.isfinite(total).all():
            raise ValueError("a number is NaN or infinite")
        self._total += total

    def value(self, divisor: float) -> NDArray[np.float32]:
        """The sum divided by `divisor`, rounded once to float32."""
        return self.mean(divisor).astype(np.float32)

    def mean(self, divisor: float) -> NDArray[np.float64]:
        """The sum divided by `divisor`."""
        return self._total / divisor

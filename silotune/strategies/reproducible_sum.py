"""A running sum whose result does not depend on the order of its terms.

Replies arrive in any order, yet the same updates must give the same adapter to the last bit, with any
number of workers and over any network. Floating-point addition is not associative; addition of
integers is. So each term is first rounded to a multiple of one power of two (pre-rounding: Demmel and
Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013), and these multiples are summed as
64-bit integers.

Adding ``1.5 * 2**(52 + e)`` to a float64 rounds it to a multiple of ``2**e`` and leaves just that
multiple, plus a constant, in the low bits of the result: read as an integer it is the term.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32] | NDArray[np.float64]

_BLOCK = 1 << 15  # elements: what is worked on stays in a core's second-level cache


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
    Memory: one int64 vector, whatever the number of terms. At most 2**10 terms of the largest size.
    """

    def __init__(self, size: int, *, exponent: int) -> None:
        self._total = np.zeros(size, dtype=np.int64)
        self._grid = 2.0**exponent
        self._shift = 1.5 * 2.0 ** (52 + exponent)
        self._constant = np.float64(self._shift).view(np.int64)
        self._terms = 0
        # Leaves room for 2**12 terms below the 2**53 that a float64 holds exactly.
        self.limit = 2.0 ** (52 + exponent - 12)
        self._block = np.empty(min(size, _BLOCK), dtype=np.float64)

    def add(self, vector: Values, weight: float = 1.0, *, longest: float | None = None) -> None:
        """Add ``weight * vector``.

        Parameters
        ----------
        vector : array
            The term.
        weight : float
            Its factor.
        longest : float, optional
            At least the vector's length, if somebody measured it: spares a look at every number.

        Raises
        ------
        ValueError
            Another length, or an element whose weighted size passes `limit` (NaN included). The sum
            is then as it was.
        """
        self._require_length(vector)
        known = longest is not None and longest * abs(weight) < 0.5 * self.limit
        for start in range(0, vector.size, _BLOCK):
            part = vector[start : start + _BLOCK]
            if not known and not self._fits(part, weight):
                self._add_block(vector[:start], weight, sign=-1)
                raise ValueError("a number is NaN, infinite or beyond the range of the sum")
            self._add_block(part, weight, start=start)
        self._terms += 1

    def check(self, vector: Values, weight: float = 1.0) -> None:
        """Raise what `add` would raise, and add nothing."""
        self._require_length(vector)
        if not self._fits(vector, weight):
            raise ValueError("a number is NaN, infinite or beyond the range of the sum")

    def add_total(self, total: NDArray[np.float64]) -> None:
        """Add the sum of several weighted vectors, as somebody else computed it.

        Raises
        ------
        ValueError
            Another length, or an element that is NaN or beyond 2**12 times `limit`.
        """
        self._require_length(total)
        if not self._fits(total, 2.0**-12):
            raise ValueError("a number is NaN, infinite or beyond the range of the sum")
        self._total += np.rint(total / self._grid).astype(np.int64)

    def value(self, divisor: float) -> NDArray[np.float32]:
        """The sum divided by `divisor`, rounded once to float32."""
        made = np.empty(self._total.shape, dtype=np.float32)
        for start in range(0, made.size, _BLOCK):
            made[start : start + _BLOCK] = self._mean(slice(start, start + _BLOCK), divisor)
        return made

    def mean(self, divisor: float) -> NDArray[np.float64]:
        """The sum divided by `divisor`."""
        return self._mean(slice(None), divisor)

    def _mean(self, where: slice, divisor: float) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):
            exact = self._total[where] - np.int64(self._terms) * self._constant
        return np.asarray(exact.astype(np.float64) * self._grid / divisor)

    def _add_block(self, part: Values, weight: float, *, start: int = 0, sign: int = 1) -> None:
        for first in range(0, part.size, _BLOCK):
            piece = part[first : first + _BLOCK]
            block = self._block[: piece.size]
            block[:] = piece
            if weight != 1.0:
                block *= weight
            block += self._shift
            place = self._total[start + first : start + first + piece.size]
            if sign > 0:
                place += block.view(np.int64)
            else:
                place -= block.view(np.int64)

    def _require_length(self, vector: Values) -> None:
        if vector.shape != self._total.shape:
            raise ValueError(f"expected {self._total.shape[0]} numbers, got {vector.size}")

    def _fits(self, part: Values, weight: float) -> bool:
        """Whether every weighted element is below the limit; false for NaN."""
        if part.size == 0:
            return True
        # Fast for all but the largest: no element is longer than the vector.
        if float(np.dot(part, part)) * weight**2 < 0.25 * self.limit**2:
            return True
        largest = max(float(part.max()), -float(part.min())) * abs(weight)
        return largest < self.limit

"""Strategies whose aggregate is a weighted mean of the updates, and nothing else of them.

These work under secure aggregation: what the coordinator needs is the sum, however it was computed.

The sum does not depend on the order of its terms. Replies arrive in any order, yet the same updates must
give the same adapter to the last bit, with any number of workers and over any network. Floating-point
addition is not associative; addition of integers is. So each term is first rounded to a multiple of one
power of two (pre-rounding: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013),
and these multiples are summed as 64-bit integers. Adding ``1.5 * 2**(52 + e)`` to a float64 rounds it to
a multiple of ``2**e`` and leaves just that multiple, plus a constant, in the low bits of the result:
read as an integer it is the term. What the sum is divided by is exact, too: a sum of `Fraction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.errors import UpdateRejected
from silotune.models.layout import Layout, Vector
from silotune.plan.plan import Plan
from silotune.strategies.base import AdapterStrategy, Terms, Weight, weight_in
from silotune.strategies.site_privacy import SitePrivacy

Values = NDArray[np.float32] | NDArray[np.float64]

_UNFIT = "a number is NaN, infinite or beyond the range of the sum"
_BLOCK = 1 << 15  # elements: what is worked on stays in a core's second-level cache
# Grids of the exact sum: gradient sums grow with the batch, weighted mean changes stay small.
_SUM_EXPONENT, _CHANGE_EXPONENT = -26, -36


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
                raise ValueError(_UNFIT)
            self._add_block(part, weight, start=start)
        self._terms += 1

    def check(self, vector: Values, weight: float = 1.0) -> None:
        """Raise what `add` would raise, and add nothing."""
        self._require_length(vector)
        if not self._fits(vector, weight):
            raise ValueError(_UNFIT)

    def add_total(self, total: NDArray[np.float64]) -> None:
        """Add the sum of several weighted vectors, as somebody else computed it.

        Raises
        ------
        ValueError
            Another length, or an element that is NaN or beyond 2**12 times `limit`.
        """
        self.check(total, 2.0**-12)
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


class LinearStrategy(AdapterStrategy):
    """Weighted mean over sites with declared, never reported, weights; then `apply`.

    One local step: a site sends its (noisy, clipped) gradient sum; the mean is the sum over sites
    divided by the expected batches, q times the declared units. Several: a site sends its change, and
    the mean is weighted by declared units. With equal weights each site's own mean counts the same.
    """

    def __init__(self, plan: Plan, *, layout: Layout) -> None:
        super().__init__(plan, layout=layout)
        self.privacy = SitePrivacy(plan) if plan.trusts_coordinator else None

    def update_size(self, server_round: int) -> int:
        """Length of a site's update, with its mark under adaptive clipping."""
        return super().update_size(server_round) + self._adapts

    def settings(self) -> dict[str, float]:
        """The clipping norm of the round, where it adapts."""
        return {"clip": self.privacy.clip} if self._adapts and self.privacy else {}

    @property
    def _adapts(self) -> bool:
        """Whether the clipping norm follows the sites' marks."""
        return self.plan.privacy.clipping.adapts

    def weight(self, terms: Terms) -> Weight:
        """Factor of a site's update in the sum, and what the site adds to the divisor."""
        return weight_in(self.plan, declared_units=terms.declared_units, largest=self._largest)

    def begin(self, server_round: int, adapter: Vector) -> None:
        """Start the sum of a round."""
        del adapter
        self._largest = max((t.declared_units for t in self.cohort.values()), default=1)
        exponent = _SUM_EXPONENT if self.plan.sends_sums else _CHANGE_EXPONENT
        self._sum = ReproducibleSum(self.update_size(server_round), exponent=exponent)
        self._mass = Fraction(0)

    def fold(self, terms: Terms, update: Vector) -> None:
        """Add one site's update."""
        self._fold(terms, update)

    def _fold(
        self, terms: Terms, update: Vector, *, scale: float = 1.0, longest: float | None = None
    ) -> None:
        """Add a multiple of one site's update, whose length may be known."""
        weight = self.weight(terms)
        try:
            self._sum.add(update, weight.factor * scale, longest=longest)
        except ValueError as exc:
            raise UpdateRejected(f"site {terms.site}: {exc}") from exc
        self._mass += Fraction(weight.mass)

    def fold_sum(self, total: NDArray[np.float64], *, mass: float) -> None:
        """Add what several sites' weighted updates sum to, as secure aggregation gives it.

        Parameters
        ----------
        total : float64 array [update_size]
            Sum over those sites of ``weight.factor * update``.
        mass : float
            Sum over the same sites of ``weight.mass``.

        Raises
        ------
        UpdateRejected
            Another length, or a number that is not finite; nothing was added.
        """
        try:
            self._sum.add_total(total)
        except ValueError as exc:
            raise UpdateRejected(f"the cohort's sum: {exc}") from exc
        self._mass += Fraction(mass)

    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """Apply the mean to the global adapter."""
        if not self._mass:
            return adapter.copy()
        mean = self._mean(server_round)
        # Twice an adapter of memory, which the steps to come may use.
        self._sum = ReproducibleSum(0, exponent=0)
        return self.apply(adapter, mean, server_round=server_round)

    def _mean(self, server_round: int) -> Vector:
        if self.privacy is None:
            return self._sum.value(float(self._mass))
        total, sites = self._sum.mean(1.0), len(self.cohort)
        noisy = self.privacy.release(total, sites=sites, server_round=server_round)
        return noisy.astype(np.float32)

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes back."""
        return super().state() | ({} if self.privacy is None else self.privacy.state())

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a saved `state`."""
        super().restore(state)
        if self.privacy is not None:
            self.privacy.restore(state)

    def apply(self, adapter: Vector, mean: Vector, *, server_round: int) -> Vector:
        """The next global adapter, from the mean: here the server optimizer's step."""
        return self.step(adapter, mean, server_round=server_round)

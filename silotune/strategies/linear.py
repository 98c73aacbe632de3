"""Strategies whose aggregate is a weighted mean of the updates, and nothing else of them.

These work under secure aggregation: what the coordinator needs is the sum, however it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.errors import UpdateRejected
from silotune.models.layout import Layout
from silotune.plan.plan import Plan
from silotune.strategies.base import AdapterStrategy, Terms, Vector, Weight, weight_in
from silotune.strategies.reproducible_sum import ReproducibleSum
from silotune.strategies.site_privacy import SitePrivacy

# Grids of the exact sum: gradient sums grow with the batch, weighted mean changes stay small.
_SUM_EXPONENT, _CHANGE_EXPONENT = -26, -36


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
        site = self.plan.privacy.site
        return site is not None and site.quantile is not None

    def weight(self, terms: Terms) -> Weight:
        """Factor of a site's update in the sum, and what the site adds to the divisor."""
        return weight_in(self.plan, declared_units=terms.declared_units, largest=self._largest)

    def begin(self, server_round: int, adapter: Vector) -> None:
        """Start the sum of a round."""
        del adapter
        self._largest = max((t.declared_units for t in self.cohort.values()), default=1)
        exponent = _SUM_EXPONENT if self.plan.sends_sums else _CHANGE_EXPONENT
        self._sum = ReproducibleSum(self.update_size(server_round), exponent=exponent)
        self._mass = 0.0

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
        self._mass += weight.mass

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
        self._mass += mass

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
            return self._sum.value(self._mass)
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

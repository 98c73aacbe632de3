"""Strategies that withstand sites which lie: they look at each update beside the others.

Every site has one vote, whatever it declares (a liar would declare the most). Updates of one step are
made commensurable first: a gradient sum is divided by its expected batch. All of them hold the
cohort's updates in memory, and none works under secure aggregation.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from silotune.errors import UpdateRejected
from silotune.strategies.base import AdapterStrategy, Terms, Vector

Rows = NDArray[np.float32]


class RobustStrategy(AdapterStrategy):
    """Collects the updates, one row a site in the order of their names; then `combine`."""

    def begin(self, server_round: int, adapter: Vector) -> None:
        """Forget the updates of the round before."""
        del adapter
        self._size = self.update_size(server_round)
        self._rows: dict[str, Vector] = {}

    def fold(self, terms: Terms, update: Vector) -> None:
        """Keep one site's update."""
        if update.shape != (self._size,):
            raise UpdateRejected(
                f"site {terms.site}: expected {self._size} numbers, got {update.size}"
            )
        if not np.isfinite(update).all():
            raise UpdateRejected(f"site {terms.site}: a number is NaN or infinite")
        batch = self.plan.expected_batch(terms.declared_units) if self.plan.sends_sums else 1.0
        self._rows[terms.site] = update / np.float32(batch)

    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """The server optimizer's step with what the rule makes of the updates."""
        if not self._rows:
            return adapter.copy()
        rows = np.stack([self._rows[site] for site in sorted(self._rows)])
        found = np.asarray(self.combine(rows), dtype=np.float32)
        return self.step(adapter, found, server_round=server_round)

    @abstractmethod
    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """One vector from the rows [sites, update_size]."""

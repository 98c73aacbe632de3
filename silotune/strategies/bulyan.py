"""Bulyan: Multi-Krum, then the values nearest to the median, by Flower's own arithmetic.

El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium" (ICML
2018).

Good for
    Large consortia under attack by experts who hide in a few coordinates: it needs four honest sites
    and three more for each that lies (``aggregation.byzantine``).
Bytes
    As fedavg.
Linear
    No.
Privacy
    Post-processing of releases; it needs each of them, so no secure aggregation.
Head
    Coordinate by coordinate, like the rest.
"""

from __future__ import annotations

import numpy as np
from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from numpy.typing import NDArray

from silotune.strategies.krum import MultiKrum, select
from silotune.strategies.robust import Rows


class Bulyan(MultiKrum):
    """Per coordinate, the mean of the selected values that are nearest to their median."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """N - 2f rows selected, and n - 4f values of each coordinate averaged."""
        kept = max(1, len(rows) - 2 * self.byzantine)
        nearest = max(1, kept - 2 * self.byzantine)
        chosen = select(rows, byzantine=self.byzantine, wanted=kept)
        found = aggregate_n_closest_weights(
            [np.median(chosen, axis=0)], [[row] for row in chosen], nearest
        )
        return np.asarray(found[0])

"""Geometric median (RFA): the point with the smallest sum of distances to the updates.

Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (IEEE Transactions on
Signal Processing, 2022): the smoothed Weiszfeld algorithm.

Good for
    Fewer than half of the sites lying, without knowing how many, at less cost to honest minorities
    than the coordinate-wise median: a far update counts less, but none is cut.
Bytes
    As fedavg.
Linear
    No.
Privacy
    Post-processing of releases; it needs each of them, so no secure aggregation.
Head
    Part of the vector that distances are taken of.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from silotune.strategies.base import RobustStrategy, Rows

_STEPS = 64
_SMALLEST = 1e-12  # of a distance, relative to the median distance at the start: smoothing
_SETTLED = 1e-9  # relative movement below which the point is found


class GeometricMedian(RobustStrategy):
    """Weiszfeld's iteration from the coordinate-wise median."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """The geometric median of the rows."""
        points = rows.astype(np.float64)
        found = np.median(points, axis=0)
        spread = float(np.median(np.linalg.norm(points - found, axis=1)))
        for _ in range(_STEPS if spread else 0):
            distances = np.linalg.norm(points - found, axis=1)
            weights = 1.0 / np.maximum(distances, _SMALLEST * spread)
            moved = weights @ points / weights.sum()
            settled = np.linalg.norm(moved - found) <= _SETTLED * spread
            found = moved
            if settled:
                break
        return np.asarray(found)

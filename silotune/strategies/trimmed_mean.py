"""Coordinate-wise trimmed mean, by Flower's own arithmetic.

Yin, Chen, Kannan and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates" (ICML 2018).

Good for
    A known share of lying sites: ``aggregation.trim`` of them is cut from both ends of each
    coordinate. Loses less of honest minorities than the median.
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
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from numpy.typing import NDArray

from silotune.strategies.base import RobustStrategy, Rows


class TrimmedMean(RobustStrategy):
    """The mean of each coordinate without its lowest and highest ``floor(trim * sites)`` values."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """The trimmed mean."""
        assert self.plan.aggregation.trim is not None  # validated with the plan
        return np.asarray(trim_mean(rows, self.plan.aggregation.trim))

"""Coordinate-wise median.

Yin, Chen, Kannan and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates" (ICML 2018).

Good for
    Fewer than half of the sites lying, without knowing how many. Where honest sites differ (non-IID)
    it drops what only a minority of them sees, such as a class that one site has.
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
from numpy.typing import NDArray

from silotune.strategies.base import RobustStrategy, Rows


class Median(RobustStrategy):
    """The median of each coordinate over the sites."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """The median, in place of the rows."""
        return np.asarray(np.median(rows, axis=0, overwrite_input=True))

"""Multi-Krum, by Flower's own selection.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent" (NeurIPS 2017).

Good for
    A known number of lying sites (``aggregation.byzantine``, of at least twice as many and three): it
    averages the ``aggregation.selected`` updates that are nearest to their neighbours, and so drops
    whoever stands apart, honest specialists too.
Bytes
    As fedavg.
Linear
    No.
Privacy
    Post-processing of releases; it needs each of them, so no secure aggregation. Under noise the
    distances are mostly noise, and the choice is mostly chance.
Head
    Part of the vector that distances are taken of.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from numpy.typing import NDArray

from silotune.strategies.base import RobustStrategy, Rows


class MultiKrum(RobustStrategy):
    """The mean of the updates with the smallest sum of squared distances to their neighbours."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """The mean of the selected rows.

        In float64: Flower takes distances as differences of squares, which cancel.
        """
        liars, wanted = self.plan.aggregation.byzantine, self.plan.aggregation.selected
        assert liars is not None and wanted is not None  # validated with the plan
        contents = [
            RecordDict({"update": ArrayRecord({"flat": Array(row.astype(np.float64))})})
            for row in rows
        ]
        chosen = select_multikrum(contents, liars, min(wanted, len(rows)))
        kept = [content.array_records["update"]["flat"].numpy() for content in chosen]
        return np.asarray(np.stack(kept).mean(axis=0))

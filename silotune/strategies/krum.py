"""Krum and Multi-Krum, by Flower's own selection.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant
Gradient Descent" (NeurIPS 2017).

Good for
    A known number of lying sites (``aggregation.byzantine``, of at least twice as many and three) whose
    honest ones are alike. Krum follows the one update that is nearest to its neighbours, so where
    sites differ it learns one site's records; Multi-Krum averages ``aggregation.selected`` of them.
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

from silotune.strategies.robust import RobustStrategy, Rows


class MultiKrum(RobustStrategy):
    """The mean of the updates with the closest neighbours."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """The mean of the selected rows."""
        wanted = self.plan.aggregation.selected
        assert wanted is not None  # validated with the plan
        return np.asarray(select(rows, byzantine=self.byzantine, wanted=wanted).mean(axis=0))

    @property
    def byzantine(self) -> int:
        """How many sites may lie."""
        assert self.plan.aggregation.byzantine is not None  # validated with the plan
        return self.plan.aggregation.byzantine


class Krum(MultiKrum):
    """The one update with the closest neighbours."""

    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """The selected row."""
        return np.asarray(select(rows, byzantine=self.byzantine, wanted=1)[0])


def select(rows: Rows, *, byzantine: int, wanted: int) -> NDArray[np.float64]:
    """The rows with the smallest sum of squared distances to their nearest neighbours.

    In float64: Flower takes distances as differences of squares, which cancel.
    """
    contents = [
        RecordDict({"update": ArrayRecord({"flat": Array(row.astype(np.float64))})}) for row in rows
    ]
    chosen = select_multikrum(contents, byzantine, min(wanted, len(rows)))
    return np.stack([content.array_records["update"]["flat"].numpy() for content in chosen])

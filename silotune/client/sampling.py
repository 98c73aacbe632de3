"""Poisson sampling of privacy units, and their packing into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silotune.models.batching import batches
from silotune.models.task import Encoded
from silotune.privacy.noise import NoiseSource


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Records of whole units that are run through the model together.

    Attributes
    ----------
    rows : list of int
        Record numbers.
    units : int array [len(rows)]
        For each record, which unit of this micro-batch it belongs to (0, 1, ...).
    """

    rows: list[int]
    units: NDArray[np.int64]

    @property
    def n_units(self) -> int:
        """Number of units in the batch."""
        return int(self.units.max()) + 1

    def apart(self) -> list[MicroBatch]:
        """Each unit in a batch of its own."""
        rows = np.asarray(self.rows)
        return [
            MicroBatch(rows=own.tolist(), units=np.zeros(len(own), dtype=np.int64))
            for own in (rows[self.units == unit] for unit in range(self.n_units))
        ]


class UnitSampler:
    """Draws the units of a step independently, each with the same probability.

    Parameters
    ----------
    encoded : Encoded
        The site's records; like lengths share a micro-batch.
    unit_of : int array [records]
        Dense unit number of each record.
    rows : int array
        The records that may be drawn.
    max_records : int
        A unit with more records gives a uniform sample of this many.
    max_physical : int
        Largest number of records in a micro-batch.
    """

    def __init__(
        self,
        *,
        encoded: Encoded,
        unit_of: NDArray[np.int64],
        rows: NDArray[np.int64],
        max_records: int,
        max_physical: int,
    ) -> None:
        order = np.argsort(unit_of[rows], kind="stable")
        ordered = rows[order]
        _, starts = np.unique(unit_of[ordered], return_index=True)
        self._units = np.split(ordered, starts[1:]) if len(rows) else []
        self._encoded, self._unit_of = encoded, unit_of
        self._max_records, self._max_physical = max_records, max_physical

    @property
    def units(self) -> int:
        """Number of units that may be drawn: private, never released."""
        return len(self._units)

    def draw(self, rate: float, noise: NoiseSource) -> list[MicroBatch]:
        """One Poisson sample of units, as micro-batches that never split a unit; may be empty."""
        chosen = np.flatnonzero(noise.uniform(self.units) < rate)
        if not len(chosen):
            return []
        rows = np.concatenate([self._bounded(self._units[index], noise) for index in chosen])
        packed = batches(self._encoded, rows, size=self._max_physical, units=self._unit_of[rows])
        return [self._numbered(batch) for batch in packed]

    def _bounded(self, rows: NDArray[np.int64], noise: NoiseSource) -> NDArray[np.int64]:
        if len(rows) <= self._max_records:
            return rows
        order = np.argsort(noise.uniform(len(rows)), kind="stable")
        return np.sort(rows[order[: self._max_records]])

    def _numbered(self, rows: list[int]) -> MicroBatch:
        _, units = np.unique(self._unit_of[rows], return_inverse=True)
        return MicroBatch(rows=rows, units=units.astype(np.int64))

"""Fixed point: updates as integers of a ring, and the sum of a cohort back again.

A number x becomes ``floor(x / step + u)`` with u uniform in [0, 1): stochastic rounding, which is right
on average. Numbers beyond a bound are set to it and counted; the bound times the cohort is below half
the ring, so no sum can overflow, whatever the sites send honestly. Steps are powers of two: integer sums
decode without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from silotune.errors import CalibrationImpossible
from silotune.privacy.noise import NoiseSource
from silotune.privacy.secagg.masks import Ring
from silotune.privacy.shared_noise import add_and_round, largest_noise

RingName = Literal["uint32", "uint16"]

_BLOCK = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive numbers of an update that have one bound.

    Attributes
    ----------
    size : int
        How many.
    bound : float
        Largest absolute value.
    """

    size: int
    bound: float


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a plan's updates become integers. Every site and the coordinator derive the same one.

    Parameters
    ----------
    ring : str
        ``uint32`` or ``uint16``.
    spans : sequence of Span
        In the order of the update.
    cohort : int
        Updates in a sum, at most.

    Notes
    -----
    An encoded update has one element more than the update: the number of its elements that were set to
    the bound, itself at most what a cohort of such numbers has room for.
    """

    ring: RingName
    spans: Sequence[Span]
    cohort: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of the ring."""
        return np.dtype(self.ring)

    @property
    def largest(self) -> int:
        """Largest absolute value of one encoded number."""
        return int((2 ** (8 * self.dtype.itemsize - 1) - 1) // self.cohort)

    @property
    def size(self) -> int:
        """Elements of an encoded update."""
        return sum(span.size for span in self.spans) + 1

    def step(self, span: Span) -> float:
        """Distance of two neighbouring values: a power of two, so that bound + 1 step fits."""
        return 2.0 ** math.ceil(math.log2(span.bound / (self.largest - 1)))

    def zeros(self) -> Ring:
        """An array of the ring's type and an encoded update's length."""
        return np.zeros(self.size, dtype=self.dtype)

    def encode(self, update: NDArray[Any], noise: NoiseSource) -> tuple[Ring, int]:
        """Round an update to the ring.

        Parameters
        ----------
        update : float array
            One-dimensional; finite.
        noise : NoiseSource
            Where the rounding's coins come from.

        Returns
        -------
        ring : uint32 or uint16 array
        saturated : int
            How many numbers were set to their bound; the last element of `ring` has it too.
        """
        if update.shape != (self.size - 1,):
            raise ValueError(f"an update of {self.size - 1} numbers is encoded, not {update.shape}")
        ring, at, saturated = self.zeros(), 0, 0
        for span in self.spans:
            step = self.step(span)
            limit = math.floor(span.bound / step)
            for start in range(at, at + span.size, _BLOCK):
                part = slice(start, min(start + _BLOCK, at + span.size))
                scaled = np.divide(update[part], step, dtype=np.float64)
                beyond = np.abs(scaled) > limit
                saturated += int(beyond.sum())
                np.clip(scaled, -limit, limit, out=scaled)
                scaled += noise.uniform(scaled.size)
                ring[part] = np.floor(scaled, out=scaled).astype(np.int64).astype(self.dtype)
            at += span.size
        ring[-1] = min(saturated, self.largest)
        return ring, saturated

    def encode_with_noise(
        self, update: NDArray[Any], stds: Sequence[float], noise: NoiseSource
    ) -> tuple[Ring, int]:
        """Add this site's share of the noise to an update and round both at once.

        What passes the bound is set to it *before* the noise, which moves a neighbouring update no
        further away; the noise itself is bounded, and the sum has room for it. So the last element,
        which no noise covers, stays 0, and `saturated` is for the site's own log only.

        Parameters
        ----------
        update : float array
            Clipped sums without noise.
        stds : sequence of float
            Standard deviation of the share, a span.

        Raises
        ------
        CalibrationImpossible
            The ring is too coarse for this noise, or too small.
        """
        ring, at, saturated = self.zeros(), 0, 0
        for span, std in zip(self.spans, stds, strict=True):
            step, here = self.step(span), slice(at, at + span.size)
            limit = self._limit(span, std)
            scaled = np.divide(update[here], step, dtype=np.float64)
            saturated += int((np.abs(scaled) > limit).sum())
            np.clip(scaled, -limit, limit, out=scaled)
            ring[here] = add_and_round(scaled, std=std / step, noise=noise).astype(self.dtype)
            at += span.size
        return ring, saturated

    def require_room(self, stds: Sequence[float]) -> None:
        """Raise `CalibrationImpossible` if noise of these standard deviations does not fit."""
        for span, std in zip(self.spans, stds, strict=True):
            self._limit(span, std)

    def _limit(self, span: Span, std: float) -> int:
        """Largest number, in steps, that noise may be added to."""
        step = self.step(span)
        limit = min(math.floor(span.bound / step), self.largest - largest_noise(std / step))
        if limit * step < std:
            raise CalibrationImpossible(
                f"the ring {self.ring} has no room for {self.cohort} sites and their noise",
                remedy="Use aggregation.encoding = 'uint32'.",
            )
        return limit

    def decode(self, total: Ring) -> tuple[NDArray[np.float64], int]:
        """The sum of updates behind a sum of encoded ones, and how many numbers were saturated.

        Parameters
        ----------
        total : uint32 or uint16 array
            A sum in the ring of at most `cohort` encoded updates.
        """
        signed = total.view(f"i{self.dtype.itemsize}").astype(np.float64)
        at = 0
        for span in self.spans:
            signed[at : at + span.size] *= self.step(span)
            at += span.size
        return signed[:-1], int(signed[-1])

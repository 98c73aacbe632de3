"""Updates as integers of a ring, the masks on them, a site's share of the noise, and the sum back again.

*Fixed point.* A number x becomes ``floor(x / step + u)`` with u uniform in [0, 1): stochastic rounding,
which is right on average. Numbers beyond a bound are set to it and counted; the bound times the cohort
is below half the ring, so no sum can overflow, whatever the sites send honestly. Steps are powers of
two: integer sums decode without rounding.

*Masks* are the keystream of AES-256 in counter mode (NIST SP 800-38A), added in the ring. Every mask has
a key of its own (HKDF over an X25519 agreement of this round's keys, or a fresh seed), so the counter
starts at zero each time. All masks of a block are added while it is in the cache: the vector is read
from memory once, whatever the number of peers.

*Shared noise* is each site's share of one Gaussian, added in the same integers. The release is the *sum*
of what the sites send, so what has to be proven is a statement on the sum. Let site i have the clipped
sum x_i, in steps of the ring, and send ``y_i = round(x_i + n_i)``, where n_i is Gaussian with standard
deviation t. By Poisson summation y_i has the characteristic function ``sum over m of f(w + 2 pi m) exp(i
(w + 2 pi m) x_i)`` with ``f(w) = exp(-t^2 w^2 / 2) sinc(w / 2)``. For t >= 6 all terms but m = 0
together are below 2**-250 on [-pi, pi], so the sum of the y_i has, but for that, the law of ``round(sum
x_i + N + V)``: N Gaussian of variance (number of sites) t^2, V a sum of independent uniform numbers.
That is post-processing of the Gaussian mechanism on ``sum x_i``: rounding at the sites costs no privacy
and adds nothing to the sensitivity, in any dimension (docs/privacy.md has the proof and what it leaves
to whom). Discrete Gaussians or Skellam noise would need an inflated sensitivity of their own (Kairouz,
Liu and Steinke, ICML 2021; Agarwal, Kairouz and Liu, NeurIPS 2021).

All arithmetic behind the noise is on integers: a step is a whole number of units of the sampler of
`silotune.privacy.noise`, whose discretisation and proof are those of that module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from silotune.errors import CalibrationImpossible, SelfCheckFailed
from silotune.privacy.bands import Row, fresh_row
from silotune.privacy.noise import DRAW_LIMIT, DRAW_STD, INFLATION, NoiseSource, noise_is_plausible

Ring = NDArray[np.uint32] | NDArray[np.uint16]

_BLOCK_BYTES = 1 << 17  # keystream and vector block together stay in a second-level cache
_AES_BLOCK = 16
_ZEROS = memoryview(bytes(_BLOCK_BYTES))


@dataclass(frozen=True)
class Mask:
    """A keystream to be added to a vector, or taken from it.

    Attributes
    ----------
    key : bytes
        32 bytes, used for this mask only.
    plus : bool
        Whether it is added.
    """

    key: bytes
    plus: bool

    def inverse(self) -> Mask:
        """What undoes this mask."""
        return Mask(self.key, not self.plus)


def apply_masks(vector: Ring, masks: Sequence[Mask]) -> None:
    """Add masks to a vector, in place, modulo ``2**32`` or ``2**16`` as its type says.

    Parameters
    ----------
    vector : uint32 or uint16 array
        One-dimensional and contiguous.
    masks : sequence of Mask
        Any number.
    """
    if vector.dtype not in (np.uint32, np.uint16) or vector.ndim != 1:
        raise ValueError("masks are added to a flat vector of uint32 or uint16")
    if not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ValueError("masks are added in place")
    streams = [
        (
            Cipher(algorithms.AES(mask.key), modes.CTR(bytes(_AES_BLOCK))).encryptor(),
            np.add if mask.plus else np.subtract,
        )
        for mask in masks
    ]
    buffer = bytearray(_BLOCK_BYTES + _AES_BLOCK)
    little = vector.dtype.newbyteorder("<")
    keystream: NDArray[Any] = np.frombuffer(buffer, little, _BLOCK_BYTES // vector.itemsize)
    for start in range(0, vector.size, len(keystream)):
        block = vector[start : start + len(keystream)]
        zeros = _ZEROS[: block.nbytes]
        part = keystream[: block.size]
        for stream, combine in streams:
            stream.update_into(zeros, buffer)
            combine(block, part, out=block)


LEAST_STEPS = 6.0
"""Standard deviation of a share, in steps of the ring, below which the proof does not hold."""

Integers = NDArray[np.int64]


def units_per_step(std: float) -> int:
    """Sampler units in a step of the ring, for noise of at least `std` steps.

    Raises
    ------
    CalibrationImpossible
        The ring is too coarse: the noise would be below `LEAST_STEPS`.
    """
    if not std >= LEAST_STEPS:
        raise CalibrationImpossible(
            f"a site's share of the noise is {std:.3g} steps of the ring; it must be {LEAST_STEPS:g}",
            remedy="Use aggregation.encoding = 'uint32', or a smaller aggregation.update_bound.",
        )
    units = math.floor(DRAW_STD / (std * INFLATION))
    if units < 1 << 8:
        raise CalibrationImpossible(f"the ring is finer than the noise sampler: {std:.3g} steps")
    return units


def largest_noise(std: float) -> int:
    """Steps that noise of `std` steps never passes, rounding included."""
    return DRAW_LIMIT // units_per_step(std) + 2


def add_and_round(values: NDArray[np.float64], *, std: float, noise: NoiseSource) -> Integers:
    """Add Gaussian noise to numbers and round to whole ones.

    Parameters
    ----------
    values : float64 array
        In steps of the ring; below ``2**40`` in size.
    std : float
        Standard deviation in steps.
    noise : NoiseSource
        Secure in earnest.

    Raises
    ------
    CalibrationImpossible
        See `units_per_step`.
    SelfCheckFailed
        A value is out of range, or the noise is not what was asked for (false alarms: 1e-9).
    """
    _require_small(values)
    units = units_per_step(std)
    noisy = np.empty(values.size, dtype=np.int64)
    for start, draws in noise.draws(values.size):
        here = slice(start, start + draws.size)
        noisy[here] = _rounded(values[here], draws, units)
    _require_plausible(noisy - values, std)
    return noisy


def add_row_and_round(
    values: NDArray[np.float64], *, std: float, back: Row, noise: NoiseSource
) -> tuple[Integers, Row]:
    """Like `add_and_round`, with noise that takes back some of what earlier rounds added.

    What is added is the row ``fresh - back`` and a Gaussian of `LEAST_STEPS` steps that no later
    round takes back: it alone has to hide how each site rounds, whatever the rows are.

    Parameters
    ----------
    values : float64 array
        In steps of the ring; below ``2**40`` in size.
    std : float
        Standard deviation of the fresh noise, in steps.
    back : int64 array
        What of earlier rounds' noise is taken back, see `silotune.privacy.bands.taken_back`.
    noise : NoiseSource
        Secure in earnest.

    Returns
    -------
    noisy : int64 array
        Whole steps.
    row : int64 array
        In units of the sampler, for the rounds to come.

    Raises
    ------
    CalibrationImpossible, SelfCheckFailed
        As `add_and_round` does.
    """
    _require_small(values)
    units = units_per_step(std)
    row, noisy = fresh_row(back, noise), np.empty(values.size, dtype=np.int64)
    smooth = LEAST_STEPS * INFLATION * units / DRAW_STD
    for start, draws in noise.draws(values.size):
        here = slice(start, start + draws.size)
        added = row[here] + np.rint(draws * smooth).astype(np.int64)
        noisy[here] = _rounded(values[here], added, units)
    _require_plausible(noisy - values + back / units, math.hypot(std, LEAST_STEPS))
    return noisy, row


def _require_small(values: NDArray[np.float64]) -> None:
    if values.size and not np.abs(values).max() < 2.0**40:
        raise SelfCheckFailed("a number is NaN or too large to be given noise")


def _rounded(values: NDArray[np.float64], added: Integers, units: int) -> Integers:
    """Numbers in steps and what is added to them, in `units` of the sampler a step, to whole steps."""
    whole = np.floor(values)
    part = np.rint((values - whole) * units).astype(np.int64)
    part += added
    part += units // 2
    np.floor_divide(part, units, out=part)
    part += whole.astype(np.int64)
    return part


def _require_plausible(added: NDArray[np.float64], std: float) -> None:
    """Noise and rounding together have variance std^2 + 1/12, to a millionth."""
    if added.size and not noise_is_plausible(
        float(np.dot(added, added)) / (std**2 + 1 / 12), added.size
    ):
        raise SelfCheckFailed("the share of the noise is not what was asked for")


RingName = Literal["uint32", "uint16"]

_BLOCK = 1 << 15


@dataclass(frozen=True, kw_only=True)
class BoundedSpan:
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
    spans: Sequence[BoundedSpan]
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

    def step(self, span: BoundedSpan) -> float:
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

    def encode_with_row(
        self,
        update: NDArray[Any],
        stds: Sequence[float],
        noise: NoiseSource,
        *,
        back: Row,
        growth: float,
    ) -> tuple[Ring, int, Row]:
        """Like `encode_with_noise`, with noise that takes `back` some of earlier rounds'; its row, too.

        Parameters
        ----------
        growth : float
            Standard deviation of a row over that of its fresh noise, at most.
        """
        ring, row, saturated = self.zeros(), np.empty_like(back), 0
        for here, scaled, std, cut in self._scaled(update, stds, growth=growth):
            made, row[here] = add_row_and_round(scaled, std=std, back=back[here], noise=noise)
            ring[here] = made.astype(self.dtype)
            saturated += cut
        return ring, saturated, row

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
        ring, saturated = self.zeros(), 0
        for here, scaled, std, cut in self._scaled(update, stds):
            ring[here] = add_and_round(scaled, std=std, noise=noise).astype(self.dtype)
            saturated += cut
        return ring, saturated

    def _scaled(
        self, update: NDArray[Any], stds: Sequence[float], *, growth: float = 1.0
    ) -> Iterator[tuple[slice, NDArray[np.float64], float, int]]:
        """Each span in steps of the ring, set to what there is room for beside its noise.

        Where it lies, its numbers, the standard deviation of its fresh noise in steps, how many were
        cut.
        """
        at = 0
        for span, std in zip(self.spans, stds, strict=True):
            here, step = slice(at, at + span.size), self.step(span)
            limit = self._limit(span, growth * std)
            scaled = np.divide(update[here], step, dtype=np.float64)
            cut = int((np.abs(scaled) > limit).sum())
            np.clip(scaled, -limit, limit, out=scaled)
            yield here, scaled, std / step, cut
            at += span.size

    def require_room(self, stds: Sequence[float]) -> None:
        """Raise `CalibrationImpossible` if noise of these standard deviations does not fit."""
        for span, std in zip(self.spans, stds, strict=True):
            self._limit(span, std)

    def _limit(self, span: BoundedSpan, std: float) -> int:
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

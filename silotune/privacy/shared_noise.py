"""Each site's share of one Gaussian, added in the integers of secure aggregation.

The release is the *sum* of what the sites send, so what has to be proven is a statement on the sum.
Let site i have the clipped sum x_i, in steps of the ring, and send ``y_i = round(x_i + n_i)``, where n_i
is Gaussian with standard deviation t. By Poisson summation y_i has the characteristic function
``sum over m of f(w + 2 pi m) exp(i (w + 2 pi m) x_i)`` with ``f(w) = exp(-t^2 w^2 / 2) sinc(w / 2)``.
For t >= 6 all terms but m = 0 together are below 2**-250 on [-pi, pi], so the sum of the y_i has, but
for that, the law of ``round(sum x_i + N + V)``: N Gaussian of variance (number of sites) t^2, V a sum of
independent uniform numbers. That is post-processing of the Gaussian mechanism on ``sum x_i``: rounding
at the sites costs no privacy and adds nothing to the sensitivity, in any dimension (docs/privacy.md has
the proof and what it leaves to whom). Discrete Gaussians or Skellam noise would need an inflated
sensitivity of their own (Kairouz, Liu and Steinke, ICML 2021; Agarwal, Kairouz and Liu, NeurIPS 2021).

All arithmetic behind the noise is on integers: a step is a whole number of units of the sampler of
`silotune.privacy.noise`, whose discretisation and proof are those of that module.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from silotune.errors import CalibrationImpossible, SelfCheckFailed
from silotune.privacy.checks import noise_is_plausible
from silotune.privacy.noise import DRAW_LIMIT, DRAW_STD, INFLATION, NoiseSource

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
    if values.size and not np.abs(values).max() < 2.0**40:
        raise SelfCheckFailed("a number is NaN or too large to be given noise")
    units = units_per_step(std)
    noisy = np.empty(values.size, dtype=np.int64)
    for start, draws in noise.draws(values.size):
        here = slice(start, start + draws.size)
        whole = np.floor(values[here])
        part = np.rint((values[here] - whole) * units).astype(np.int64)
        part += draws
        part += units // 2
        np.floor_divide(part, units, out=part)
        np.add(part, whole.astype(np.int64), out=noisy[here])
    _require_plausible(noisy - values, std)
    return noisy


def _require_plausible(added: NDArray[np.float64], std: float) -> None:
    """Noise and rounding together have variance std^2 + 1/12, to a millionth."""
    if added.size and not noise_is_plausible(
        float(np.dot(added, added)) / (std**2 + 1 / 12), added.size
    ):
        raise SelfCheckFailed("the share of the noise is not what was asked for")

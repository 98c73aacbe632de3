"""Privacy loss distributions of Poisson-sampled Gaussians, and epsilon of their composition.

The privacy loss distribution (PLD) of a mechanism determines all its (epsilon, delta), and composing
mechanisms convolves their PLDs (Sommer, Meiser and Mohammadi, PoPETs 2019; Koskela, Jälkö and
Honkela, AISTATS 2020). This module discretises with "connect the dots" (Doroshenko, Ghazi, Kamath,
Kumar and Manurangsi, PoPETs 2022), which never understates a loss, and composes with one Fourier
transform each way. It computes what ``dp_accounting.pld`` computes, and the tests hold it to that
library; it exists because an epsilon after every round must cost milliseconds. The difference is in
the work: the losses of all grid points at once instead of one by one, one transform for a whole
history instead of one a composition, and no second difference of numbers close to 1.

Adjacency is add/remove one unit; epsilon is the larger of the two directions. Every approximation is
taken against us: the grid (above), the tails that are cut off and the rounding of the transform all
count as infinite loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import fft, special

Floats = npt.NDArray[np.float64]

_USUAL_STEP = 1e-4
_COARSEST = 0.1
_STEP_PER_DEVIATION = 0.02
_MAX_POINTS = 1 << 21
_MAX_POINTS_ONCE = 1 << 19
_INVERSION_RANGE = 50.0
_TAIL_SIGMAS = 9.75  # mass beyond: 1e-22
_WINDOW_MASS = 1e-15
# Error of a tail's sum a use, from masses, transforms and power; against long double: below 3e-16.
_ROUNDING_MASS = 2.0**-49
_MGF_BLOCK = 32
_MGF_ORDERS: Floats = 2.0 ** np.arange(-6.0, 13.0, 0.5)


class Sampled(NamedTuple):
    """`uses` adaptive uses of the Gaussian mechanism on a Poisson sample of the units.

    With ``units = 2`` neighbours differ by two units of one person, at two sites, each drawn by itself:
    the one noise hides a move of 0, 1 or 2 clips.
    """

    rate: float
    sigma: float
    uses: int
    units: Literal[1, 2] = 1


@dataclass(frozen=True)
class Losses:
    """One direction's losses on the grid ``step * (lowest, lowest + 1, ...)``."""

    lowest: int
    masses: Floats
    infinite: float
    log_mgf: Floats  # [2, orders]: bounds of log E exp(order * loss), and of exp(-order * loss)


def epsilon(mechanisms: Sequence[Sampled], delta: float, *, step: float | None = None) -> float:
    """Epsilon of the adaptive composition of `mechanisms`: a certified upper bound.

    Parameters
    ----------
    mechanisms : sequence of Sampled
        What was done; the order does not matter.
    delta : float
        In (0, 1).
    step : float, optional
        Spacing of the grid of losses; by default 1e-4, less where losses are small, more where they
        are large. A coarser one is faster and gives a larger epsilon. It is doubled as often as the
        composed losses need to fit into memory.

    Returns
    -------
    float
        ``math.inf`` if none can be certified: delta is so small that rounding errors alone
        (2e-15 a use) could reach it, or the losses are too large for the grid.
    """
    if not mechanisms:
        return 0.0
    step = step or default_step(mechanisms)
    while step <= _COARSEST:
        try:
            directions = [discretise(m.rate, m.sigma, step, m.units) for m in mechanisms]
            counts = [m.uses for m in mechanisms]
            removed = _direction([pair[0] for pair in directions], counts, step, delta)
            if all(m.rate == 1.0 for m in mechanisms):
                return removed  # both directions are the same
            return max(removed, _direction([pair[1] for pair in directions], counts, step, delta))
        except _GridTooLarge as exc:
            step *= 2.0 ** math.ceil(math.log2(exc.points / _MAX_POINTS))
    return math.inf


def default_step(mechanisms: Sequence[Sampled]) -> float:
    """Grid spacing that keeps the variance added by the grid below about 1e-4 of the losses'."""
    uses = sum(m.uses for m in mechanisms)
    # q^2 (exp(1/sigma^2) - 1), the chi-square divergence, is the variance of a small loss.
    spread = sum(
        m.uses * (m.units * m.rate) ** 2 * math.expm1(min(m.sigma**-2, 30.0)) for m in mechanisms
    )
    wanted = min(_USUAL_STEP, _STEP_PER_DEVIATION * math.sqrt(spread / uses))
    affordable = max(max(_tops(m.rate, m.sigma, m.units)) for m in mechanisms) / _MAX_POINTS_ONCE
    return _USUAL_STEP * 2.0 ** math.ceil(math.log2(max(wanted, affordable) / _USUAL_STEP))


class _GridTooLarge(Exception):
    """More points than are worth their memory: use a coarser step."""

    def __init__(self, points: int) -> None:
        super().__init__(points)
        self.points = points


@lru_cache(maxsize=16)
def discretise(
    rate: float, sigma: float, step: float, units: Literal[1, 2] = 1
) -> tuple[Losses, Losses]:
    """Losses of one use, when a unit (or a person's two) is removed and when it is added.

    With a grid spacing h, the mass at a loss ``k h > 0`` is a second difference of delta as a
    function of epsilon; the masses of one direction at negative losses are those of the other at
    positive ones times ``exp(-k h)``. So only losses above 0 are computed, where delta is small and
    exact.
    """
    top_removed, top_added = _tops(rate, sigma, units)
    both = units == 2
    removed = (_two_removed if both else _delta_removed)(_grid(top_removed, step), rate, sigma)
    if rate == 1.0:
        symmetric = _losses(removed, removed, step)
        return symmetric, symmetric
    added = (_two_added if both else _delta_added)(_grid(top_added, step), rate, sigma)
    return _losses(removed, added, step), _losses(added, removed, step)


def _grid(top: float, step: float) -> Floats:
    return np.arange(math.ceil(top / step) + 1, dtype=np.float64) * step


def _tops(rate: float, sigma: float, units: int = 1) -> tuple[float, float]:
    """Largest loss, but for a mass of 1e-22, of a removal and of an addition."""
    if units == 2:
        return _tops_of_two(rate, sigma)
    reach = (_TAIL_SIGMAS * sigma + 0.5) / sigma**2
    if rate == 1.0:
        return reach, reach
    rest = math.log1p(-rate)
    removed = float(np.logaddexp(math.log(rate) + reach, rest))
    return removed, -float(np.logaddexp(math.log(rate) - reach, rest))


def _delta_removed(epsilons: Floats, rate: float, sigma: float) -> Floats:
    """Delta of the removal of a unit at each epsilon >= 0 (hockey-stick divergence).

    ``(1-q) N(0, s^2) + q N(-1, s^2)`` against ``N(0, s^2)``; the loss exceeds epsilon left of x.
    """
    odds = epsilons + np.log((rate - (1.0 - rate) * np.expm1(-epsilons)) / rate)
    x = -0.5 - sigma**2 * odds
    left, shifted = x / sigma, (x + 1.0) / sigma
    return np.asarray(
        rate * np.maximum(special.ndtr(shifted) - np.exp(odds + special.log_ndtr(left)), 0.0)
    )


def _delta_added(epsilons: Floats, rate: float, sigma: float) -> Floats:
    """Delta of the addition of a unit at each epsilon >= 0.

    ``N(0, s^2)`` against ``(1-q) N(0, s^2) + q N(1, s^2)``: 0 from ``-log(1-q)`` on.
    """
    # exp(-epsilon) - (1 - q), without the cancellation of small epsilons
    odds = np.where(epsilons < 0.5, np.expm1(-epsilons) + rate, np.exp(-epsilons) - (1.0 - rate))
    share = odds / rate
    inside = share > 0.0
    share = np.where(inside, share, 1.0)
    x = 0.5 + sigma**2 * np.log(share)
    difference = share * special.ndtr(x / sigma) - special.ndtr((x - 1.0) / sigma)
    deltas = rate * np.exp(epsilons) * np.maximum(difference, 0.0)
    return np.asarray(np.where(inside, deltas, 0.0))


def _tops_of_two(rate: float, sigma: float) -> tuple[float, float]:
    """`_tops` for a person's two units: the losses where the noise is `_TAIL_SIGMAS` out."""
    shift = 1.0 / sigma
    none, one, two = _log_chances(rate)

    def log_ratio(noise: float) -> float:
        """Log of the mixture over N(0, 1) where the noise, in deviations, is this towards it."""
        once = one + noise * shift - shift**2 / 2.0
        return float(np.logaddexp.reduce([none, once, two + 2.0 * noise * shift - 2.0 * shift**2]))

    return log_ratio(_TAIL_SIGMAS + 2.0 * shift), -log_ratio(-_TAIL_SIGMAS)


def _log_chances(rate: float) -> tuple[float, float, float]:
    """Logs of the chances that none, one and both of a person's two units are drawn."""
    absent = math.log1p(-rate) if rate < 1.0 else -math.inf
    return 2.0 * absent, math.log(2.0 * rate) + absent, 2.0 * math.log(rate)


def _log_root(log_level: Floats, rate: float, sigma: float) -> Floats:
    """Log of the w > 0 at which ``q^2 exp(-1/s^2) w^2 + 2 q (1-q) w`` is the level.

    With ``w = exp((2 x - 1) / 2 s^2)`` this is where the mixture's density at x, without its first
    part, is the level times that of N(0, s^2). Kept in logs: levels go beyond exp(700).
    """
    _, one, two = _log_chances(rate)
    square = two - sigma**-2
    root = 0.5 * np.logaddexp(2.0 * one, math.log(4.0) + square + log_level)
    return np.asarray(math.log(2.0) + log_level - np.logaddexp(one, root))


def _two_removed(epsilons: Floats, rate: float, sigma: float) -> Floats:
    """`_delta_removed` for a person's two units.

    ``(1-q)^2 N(0, s^2) + 2 q (1-q) N(1, s^2) + q^2 N(2, s^2)`` against ``N(0, s^2)``; the loss exceeds
    epsilon right of x.
    """
    none, one, two = _log_chances(rate)
    drawn = -math.expm1(none)  # with cancellation nowhere: 1 - (1-q)^2
    log_level = epsilons + np.log(drawn - math.exp(none) * np.expm1(-epsilons))
    x = 0.5 + sigma**2 * _log_root(log_level, rate, sigma)
    found = math.exp(one) * special.ndtr((1.0 - x) / sigma)
    found += math.exp(two) * special.ndtr((2.0 - x) / sigma)
    return np.asarray(np.maximum(found - np.exp(log_level + special.log_ndtr(-x / sigma)), 0.0))


def _two_added(epsilons: Floats, rate: float, sigma: float) -> Floats:
    """`_delta_added` for a person's two units: 0 from ``-2 log(1-q)`` on."""
    none, one, two = _log_chances(rate)
    drawn = -math.expm1(none)
    level = np.where(
        epsilons < 0.5, np.expm1(-epsilons) + drawn, np.exp(-epsilons) - math.exp(none)
    )
    inside = level > 0.0
    level = np.where(inside, level, 1.0)
    x = 0.5 + sigma**2 * _log_root(np.log(level), rate, sigma)
    lost = math.exp(one) * special.ndtr((x - 1.0) / sigma)
    lost += math.exp(two) * special.ndtr((x - 2.0) / sigma)
    deltas = np.exp(epsilons) * np.maximum(level * special.ndtr(x / sigma) - lost, 0.0)
    return np.asarray(np.where(inside, deltas, 0.0))


def _losses(deltas: Floats, opposite: Floats, step: float) -> Losses:
    above, below = _connect_the_dots(deltas, step), _connect_the_dots(opposite, step)
    below *= np.exp(-step * np.arange(1, below.size + 1))
    infinite = float(deltas[-1])
    middle = max(0.0, 1.0 - infinite - float(above.sum()) - float(below.sum()))
    masses = np.concatenate([below[::-1], [middle], above])
    lowest = -below.size
    return Losses(lowest, masses, infinite, _log_mgf(masses, lowest, step))


def _connect_the_dots(deltas: Floats, step: float) -> Floats:
    """Masses at the losses ``step, 2 step, ...`` from deltas at ``0, step, 2 step, ...``."""
    falls = -np.diff(np.minimum.accumulate(deltas))
    masses = falls * math.exp(step)
    masses[:-1] -= falls[1:]
    return np.asarray(np.maximum(masses / math.expm1(step), 0.0))


def _log_mgf(masses: Floats, lowest: int, step: float) -> Floats:
    """Upper bounds of log E exp(order * loss) for `_MGF_ORDERS` and their negatives.

    Each block of masses is split between the block's ends so that its mean stays: exp is convex, so
    this can only enlarge the expectation.
    """
    blocks = np.pad(masses, (0, -masses.size % _MGF_BLOCK)).reshape(-1, _MGF_BLOCK)
    to_end = blocks @ (np.arange(_MGF_BLOCK) / _MGF_BLOCK)
    to_start = blocks.sum(axis=1) - to_end
    coarse = np.append(to_start, 0.0) + np.insert(to_end, 0, 0.0)
    losses = step * (lowest + _MGF_BLOCK * np.arange(coarse.size))
    kept = coarse > 0.0
    exponents = np.multiply.outer(np.stack([_MGF_ORDERS, -_MGF_ORDERS]), losses[kept])
    peaks = exponents.max(axis=2)
    exponents -= peaks[:, :, np.newaxis]
    return np.asarray(np.log(np.exp(exponents) @ coarse[kept]) + peaks)


def _direction(losses: Sequence[Losses], counts: Sequence[int], step: float, delta: float) -> float:
    """Epsilon of one direction."""
    low, high = _window(losses, counts, step)
    size = fft.next_fast_len(high - low + 1, real=True)
    if size > _MAX_POINTS:
        raise _GridTooLarge(size)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    offset, log_finite = 0, 0.0
    for one, count in zip(losses, counts, strict=True):
        spectrum *= fft.rfft(_folded(one.masses, size), size) ** count
        offset += one.lowest * count
        log_finite += count * math.log1p(-one.infinite)
    masses = np.roll(fft.irfft(spectrum, size), (offset - low) % size)
    lost = -math.expm1(log_finite) + 2.0 * _WINDOW_MASS + sum(counts) * _ROUNDING_MASS
    return _invert(np.maximum(masses, 0.0), low, step, lost, delta)


def _window(losses: Sequence[Losses], counts: Sequence[int], step: float) -> tuple[int, int]:
    """Grid indices outside of which less than `_WINDOW_MASS` lies on each side (Chernoff)."""
    pairs = list(zip(losses, counts, strict=True))
    highest = sum(n * (one.lowest + one.masses.size - 1) for one, n in pairs)
    lowest = sum(n * one.lowest for one, n in pairs)
    log_mgf = np.sum([n * one.log_mgf for one, n in pairs], axis=0)
    up, down = np.min((log_mgf - math.log(_WINDOW_MASS)) / _MGF_ORDERS, axis=1)
    low = max(lowest, math.floor(-float(down) / step))
    return low, max(low, min(highest, math.ceil(float(up) / step)))


def _folded(masses: Floats, size: int) -> Floats:
    """Masses modulo the length of a circular convolution."""
    if masses.size <= size:
        return masses
    padded = np.pad(masses, (0, -masses.size % size))
    return np.asarray(padded.reshape(-1, size).sum(axis=0))


def _invert(masses: Floats, low: int, step: float, infinite: float, delta: float) -> float:
    """Smallest epsilon >= 0 with ``infinite + sum(masses * (1 - exp(epsilon - loss))+) <= delta``."""
    if infinite >= delta:
        return math.inf
    upper = infinite + np.cumsum(masses[::-1])[::-1]
    # Epsilon is at most the largest loss that is reached with more than delta, and hardly less.
    last = int(np.count_nonzero(upper > delta)) - 1
    first = max(0, -low, last - math.ceil(_INVERSION_RANGE / step))
    if last <= first:
        return max(0.0, step * (low + first))
    relative = step * (np.arange(first, masses.size) - last)
    lower = np.cumsum((masses[first:] * np.exp(-relative))[::-1])[::-1]
    reached = last - first + 1
    enough = upper[first : last + 1] - np.exp(relative[:reached]) * lower[:reached] <= delta
    enough[-1] = True  # it is, but for rounding
    here = int(np.argmax(enough))
    if here == 0:
        return max(0.0, step * (low + first))
    ratio = float(upper[first + here] - delta) / float(lower[here])
    return max(0.0, step * (low + last) + math.log(ratio))

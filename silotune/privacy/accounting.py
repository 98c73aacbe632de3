"""What a sequence of private releases costs, and the noise that keeps within an epsilon.

Releases are events of dp-accounting (`silotune.privacy.events`). Their cost comes from privacy loss
distributions (`silotune.privacy.loss`), adjacency add/remove one unit; where these can't certify a
finite number, from Rényi divergences (Mironov, CSF 2017; Mironov, Talwar
and Zhang, 2019) by dp-accounting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from scipy.optimize import brentq
from scipy.special import ndtri

from silotune.errors import CalibrationImpossible
from silotune.privacy import loss
from silotune.privacy.events import (
    DpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    is_shared,
    step_event,
    uses_of,
)
from silotune.privacy.loss import Sampled

_CALIBRATED_RANGE = (0.1, 1e6)
_TOLERANCE = 2e-4  # of log sigma
_RENYI_ROUNDING = 1e-13
# The library's series for orders that are not whole may not converge below 2.
_ORDERS = (2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, *range(6, 65), 96, 128, 192, 256, 512)

Mechanisms = tuple[Sampled, ...]


def epsilon(events: Iterable[DpEvent], *, delta: float, colluding: int = 0) -> float:
    """Epsilon of the adaptive composition of events: a certified upper bound.

    What the grid of losses adds is below 1e-4 of it, mostly far below. Neither order nor grouping
    of the events matters, to the last bit: equal mechanisms are counted, and Gaussians
    over all units merged into one, before anything is computed.

    Parameters
    ----------
    events : iterable of DpEvent
        What was released; nothing costs 0.
    delta : float
        In (0, 1).
    colluding : int
        Sites that collude with the coordinator: what noise that sites share is worth then.

    Raises
    ------
    EventInvalid
        An event that can't be accounted for.
    """
    _require_delta(delta)
    return _epsilon(_mechanisms(uses_of(events, colluding=colluding)), delta)


def epsilon_at_two_sites(events: Iterable[DpEvent], *, delta: float) -> float:
    """Epsilon of a person with a unit at each of two sites that both released `events`.

    Noise of a site's own hides one unit, so the two sites' releases compose. Noise that sites share
    hides the sum, which the person moves by up to two clips: more than twice the epsilon of one.

    Parameters
    ----------
    events : iterable of DpEvent
        What one site released, without nesting but for repetition.
    delta : float
        In (0, 1).

    Raises
    ------
    EventInvalid
        An event that can't be accounted for.
    """
    _require_delta(delta)
    kinds: dict[bool, list[DpEvent]] = {True: [], False: []}
    for event in events:
        kinds[is_shared(event)].append(event)
    own = _mechanisms(Counter({key: 2 * n for key, n in uses_of(kinds[False]).items()}))
    shared = [Sampled(rate, sigma, n, 2) for (rate, sigma), n in uses_of(kinds[True]).items()]
    return _epsilon(tuple(sorted([*own, *shared])), delta)


def epsilon_curve(
    event_per_round: DpEvent, *, rounds: int, points: int, delta: float
) -> list[tuple[int, float]]:
    """Epsilon after a few rounds of a run, the first and the last among them.

    Parameters
    ----------
    event_per_round : DpEvent
        What each round releases.
    rounds : int
        Rounds of the run.
    points : int
        About how many rounds to look at; each takes some 50 ms.

    Returns
    -------
    list of (round, epsilon)
    """
    chosen = np.unique(np.linspace(1, rounds, min(points, rounds)).round().astype(int))
    return [
        (n, epsilon([SelfComposedDpEvent(event_per_round, n)], delta=delta))
        for n in chosen.tolist()
    ]


def calibrate(
    *,
    epsilon: float,
    delta: float,
    rate: float,
    steps: int,
    extra: Sequence[DpEvent] = (),
) -> float:
    """Smallest noise multiplier with which `steps` steps, together with `extra`, cost epsilon.

    Parameters
    ----------
    epsilon, delta : float
        What the steps may cost; not exceeded as `epsilon` (the function) counts.
    rate : float
        Poisson sampling rate.
    steps : int
        Number of steps.
    extra : sequence of DpEvent
        What else is to be within the same epsilon.

    Returns
    -------
    float
        Sigma, at least 0.1 and at most 0.1 % above the smallest that would do. The cost of the
        result is at most `epsilon`.

    Raises
    ------
    CalibrationImpossible
        `extra` alone costs as much, or not even sigma = 1e6 would do.
    """
    _require_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ValueError(f"epsilon must be positive and finite, not {epsilon}")
    step_event(rate=rate, sigma=1.0, steps=steps)  # checks the ranges
    others = _mechanisms(uses_of(extra))
    return _calibrate(float(epsilon), float(delta), float(rate), steps, others)


def _require_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), not {delta}")


def _mechanisms(uses: Mapping[tuple[float, float], int]) -> Mechanisms:
    """The same in canonical order, with all Gaussians over all units merged into one.

    The sum of squared sensitivities over variances is what counts for Gaussians composed.
    """
    sampled = [Sampled(rate, sigma, n) for (rate, sigma), n in uses.items() if rate < 1.0]
    precision = math.fsum(n / sigma**2 for (rate, sigma), n in uses.items() if rate == 1.0)
    if precision:
        sampled.append(Sampled(1.0, 1.0 / math.sqrt(precision), 1))
    return tuple(sorted(sampled))


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: Mechanisms, delta: float, coarsening: float = 1.0) -> float:
    if not mechanisms:
        return 0.0
    tight = loss.epsilon(mechanisms, delta, step=coarsening * loss.default_step(mechanisms))
    if math.isfinite(tight):
        return tight
    if any(m.units == 2 for m in mechanisms):
        return tight  # two units at once have no Rényi bound here
    rdp = sum((m.uses * _renyi(m.rate, m.sigma) for m in mechanisms), np.zeros(len(_ORDERS)))
    return _from_renyi(rdp, delta)


@lru_cache(maxsize=1024)
def _renyi(rate: float, sigma: float) -> npt.NDArray[np.float64]:
    """Rényi divergences of one use at `_ORDERS`.

    Rounding, which can make a tiny divergence negative, is taken against us.
    """
    once = PoissonSampledDpEvent(rate, GaussianDpEvent(sigma))
    rdp = RdpAccountant(orders=_ORDERS).compose(once).rdp
    return np.asarray(np.maximum(rdp, 0.0) + _RENYI_ROUNDING)


def _from_renyi(rdp: npt.NDArray[np.float64], delta: float) -> float:
    return float(compute_epsilon(_ORDERS, rdp, delta)[0]) if rdp.any() else 0.0


@lru_cache(maxsize=1024)
def _calibrate(epsilon: float, delta: float, rate: float, steps: int, others: Mechanisms) -> float:
    if _epsilon(others, delta) >= epsilon:
        raise CalibrationImpossible(
            f"the other releases alone cost {_epsilon(others, delta):.4g} of {epsilon:.4g}"
        )

    def excess(log_sigma: float, coarsening: float = 1.0) -> float:
        """Log of the cost over epsilon, falling in sigma; bounded, for the root finder."""
        uses = Counter({(rate, math.exp(log_sigma)): steps})
        for other in others:
            uses[other.rate, other.sigma] += other.uses
        ratio = _epsilon(_mechanisms(uses), delta, coarsening) / epsilon
        return math.log(min(max(ratio, 1e-6), 1e6))

    def coarse(log_sigma: float) -> float:
        return excess(log_sigma, 8.0)

    near = _first_guess(epsilon, delta, rate, steps)
    near = _root(coarse, _bracket(coarse, near, stride=0.1))
    found = _root(excess, _bracket(excess, near, stride=_TOLERANCE))
    if math.isinf(found):
        raise CalibrationImpossible(
            f"epsilon {epsilon:.4g} at delta {delta:g} is out of reach of {steps} steps"
        )
    return math.exp(found)


def _root(excess: Callable[[float], float], bracket: tuple[float, float]) -> float:
    """The largest log sigma of a bracket, or less if the bracket is wide: not in excess."""
    low, high = bracket
    if high - low <= 2.0 * _TOLERANCE or math.isinf(low) or math.isinf(high):
        return high
    found = float(brentq(excess, low, high, xtol=_TOLERANCE, rtol=1e-12))
    while excess(found) > 0.0:
        found += _TOLERANCE
    return found


def _first_guess(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Log of a sigma within 30 % or so.

    Many steps are about one Gaussian release of multiplier ``1 / mu`` (Bu, Dong, Long and Su,
    Harvard Data Science Review 2020), which costs about ``mu**2 / 2 + mu * z(1 - delta)``.
    """
    quantile = max(0.0, -float(ndtri(delta)))
    mu = math.sqrt(quantile**2 + 2.0 * epsilon) - quantile
    if rate == 1.0:
        return 0.5 * math.log(steps) - math.log(mu)
    return -0.5 * math.log(math.log1p(mu**2 / (rate**2 * steps)))


def _bracket(
    excess: Callable[[float], float], start: float, *, stride: float
) -> tuple[float, float]:
    """Log sigmas that cost too much and little enough, the first or the second infinite if none."""
    least, most = map(math.log, _CALIBRATED_RANGE)
    low = high = min(max(start, least), most)
    if excess(low) > 0.0:
        while excess(high) > 0.0:
            if high == most:
                return low, math.inf
            low, high, stride = high, min(high + stride, most), 2.0 * stride
    else:
        while excess(low) <= 0.0:
            if low == least:
                return -math.inf, low
            low, high, stride = max(low - stride, least), low, 2.0 * stride
    return low, high

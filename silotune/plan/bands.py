"""Noise that is correlated over rounds: what a plan needs for it, and the weights that suit the plan.

With ``privacy.bands = b`` the noise of round t is ``z_t = w_t - c_1 z_{t-1} - ... - c_{b-1} z_{t-b+1}``
with fresh w_t: in matrices ``C Z = W``, where C is lower triangular, constant along its diagonals, and
has b of them (Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", NeurIPS 2023). Much of a
round's noise is taken back by the next ones in whatever adds rounds up. A unit is drawn in one of b
rounds only, so its participations touch rows of ``C G + W`` that don't overlap; docs/privacy.md has the
proof, which holds for any weights c.

The weights are chosen for the least mean square of the noise in all adapters of the run: of
``|c|^2 |A C^-1|_F^2``, where A is the server's own recursion, schedule and momentum. The fresh noise is
scaled by ``|c|``, so that the privacy is the same whatever the weights.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from silotune.plan.sections import Sections
from silotune.plan.strategies import STRATEGIES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

_DIGITS = 4
_HORIZON = (
    1000  # rounds that weights are chosen for; a longer run is looked at as if it had so many
)
_MOST_GROWTH = 30.0  # times the fresh noise, that the noise of one round may become


def bands_conflicts(plan: Sections) -> list[str]:
    """What correlated noise needs and the plan lacks: the key's path and the reason."""
    privacy = plan.privacy
    if privacy.bands == 1:
        if privacy.band_weights:
            return ["privacy.band_weights: only with privacy.bands above 1; remove them"]
        return []
    needs = f"privacy.bands = {privacy.bands}"
    if plan.only_sums:
        return ["privacy.bands: statistics are counted in one round; remove it"]
    found = [*_step_conflicts(plan, needs), *_weight_conflicts(plan)]
    if privacy.bands > plan.rounds.number:
        found.append(f"privacy.bands: at most rounds.number = {plan.rounds.number}")
    if privacy.rate is not None and privacy.bands * privacy.rate > 1.0:
        found.append(
            f"privacy.rate: at most 1 / bands = {1 / privacy.bands:.4g} with {needs}: a unit is drawn "
            "in one of so many rounds, and then so much more often"
        )
    return found


def _step_conflicts(plan: Sections, needs: str) -> list[str]:
    """What keeps noise of one round from being taken back in the next ones."""
    found = []
    if not plan.per_unit:
        found.append(f"privacy.mode: must be 'record' with {needs}, which hides single units")
    if not plan.sends_sums:
        found.append(
            f"rounds.local_steps: must be 1 with {needs}: after a step of its own a site would go on "
            "from noise that later rounds have yet to take back"
        )
    if plan.optimizer.server.name != "sgd":
        found.append(
            f"optimizer.server.name: must be 'sgd' (with momentum) with {needs}: noise cancels only "
            "where rounds are added up; under 'adam' it lost where it was measured"
        )
    if 0 < plan.head_rounds < plan.rounds.number:
        found.append(
            f"optimizer.site.head_rounds: 0, or all {plan.rounds.number}, with {needs}: what the next "
            "round takes back must be of the same numbers"
        )
    if not plan.strategy.sends_same or plan.aggregation.head != "shared":
        names = sorted(name for name, facts in STRATEGIES.items() if facts.sends_same)
        found.append(
            f"aggregation.strategy: {' or '.join(map(repr, names))} with {needs}, and aggregation.head "
            "= 'shared': every round must send the same numbers, all of them, as they are"
        )
    return found


def _weight_conflicts(plan: Sections) -> list[str]:
    weights, bands = plan.privacy.band_weights, plan.privacy.bands
    if not weights:
        return []
    if len(weights) > bands:
        return [f"privacy.band_weights: at most privacy.bands = {bands}, not {len(weights)}"]
    if weights[0] != 1.0:
        return ["privacy.band_weights: the first must be 1"]
    if growth(weights, plan.rounds.number) > _MOST_GROWTH:
        return [
            f"privacy.band_weights: the noise of a round would grow to more than {_MOST_GROWTH:g} times "
            "the fresh noise within the run"
        ]
    return []


@lru_cache(maxsize=256)
def growth(weights: tuple[float, ...], rounds: int) -> float:
    """Standard deviation of the noise of a run's last round over that of the fresh noise.

    Infinite for weights that are no numbers, or whose noise grows beyond any bound.
    """
    past = [0.0] * (len(weights) - 1)
    total, value = 0.0, 1.0
    for _ in range(rounds):
        total += value * value
        if not total < _MOST_GROWTH**4:
            return math.inf
        past = [value, *past[:-1]] if past else past
        value = -sum(weight * old for weight, old in zip(weights[1:], past, strict=True))
    return math.sqrt(total)


def band_weights(plan: Sections) -> tuple[tuple[float, ...], str]:
    """Weights for the plan's own schedule and momentum, and the rule in words.

    Returns
    -------
    weights : tuple of float
        As many as `privacy.bands`, the first 1, each to four digits behind the point.
    why : str
    """
    import numpy as np

    factors = np.asarray(_factors(plan))
    weights = _best(factors, plan.optimizer.server.momentum, plan.privacy.bands)
    return weights, (
        "least mean square of the noise in the run's adapters, for the server's schedule and momentum "
        f"({noise_in_adapters(plan, weights):.2f} of what independent noise of the same size leaves)"
    )


def noise_in_adapters(plan: Sections, weights: tuple[float, ...], *, last: bool = False) -> float:
    """Root mean square of the noise in a run's adapters, over that of independent noise.

    Both have one noise multiplier; what amplification by sampling loses is not in it.

    Parameters
    ----------
    plan : Sections
        Gives rounds, schedule and momentum.
    weights : tuple of float
        First column of C.
    last : bool
        Of the last adapter alone, instead of the mean over all.
    """
    import numpy as np

    factors, momentum = np.asarray(_factors(plan)), plan.optimizer.server.momentum
    mine = _spread(np.asarray(weights), factors, momentum)
    plain = _spread(np.ones(1), factors, momentum)
    if last:
        mine, plain = mine[:, -1], plain[:, -1]
    size = math.sqrt(sum(weight * weight for weight in weights))
    return float(size * np.linalg.norm(mine) / np.linalg.norm(plain))


def walked_under_sgd(plan: Sections) -> float:
    """How far independent noise has moved a number of a run's last adapter under SGD with momentum.

    Per standard deviation of the noise of one round, and per learning rate.
    """
    import numpy as np

    factors = np.asarray(_factors(plan))
    return float(
        np.linalg.norm(_spread(np.ones(1), factors, plan.optimizer.server.momentum)[:, -1])
    )


def _factors(plan: Sections) -> list[float]:
    """Learning rates of the rounds, as parts of the peak."""
    rounds = min(plan.rounds.number, _HORIZON)
    return [plan.optimizer.site.factor(step=step, steps=rounds) for step in range(rounds)]


def _best(factors: Vector, momentum: float, bands: int) -> tuple[float, ...]:
    import numpy as np
    from scipy.optimize import minimize

    # The first coefficients of (1 - x)^(-1/2): best where rounds are just added up, and all kept.
    start = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))])

    plain = float(np.sum(_spread(np.ones(1), factors, momentum) ** 2))

    def loss(free: Vector) -> tuple[float, Vector]:
        weights = np.concatenate([[1.0], free])
        spread = _spread(weights, factors, momentum)
        twice = _spread(np.convolve(weights, weights), factors, momentum)
        size, noise = float(weights @ weights), float(np.sum(spread * spread))
        # Toeplitz matrices commute: d(A C^-1) = -A C^-2 S_k dc_k, where S_k moves columns by k.
        rows = len(factors)
        slopes = np.array(
            [-2.0 * float(np.sum(spread[: rows - k] * twice[k:])) for k in range(1, bands)]
        )
        return size * noise / plain, (2.0 * free * noise + size * slopes) / plain

    found = minimize(loss, start[1:], jac=True, method="L-BFGS-B").x
    return (1.0, *(round(float(value), _DIGITS) for value in found))


def _spread(weights: Vector, factors: Vector, momentum: float) -> Vector:
    """``A C^-1``, transposed: row r is what a unit of round r's fresh noise does to each adapter.

    Parameters
    ----------
    weights : float64 array
        First column of C.
    factors : float64 array [rounds]
        Learning rates.
    momentum : float
        Of the server's SGD.

    Returns
    -------
    float64 array [rounds, rounds]
    """
    import numpy as np

    rounds = len(factors)
    column = np.zeros(rounds)  # of (momentum filter) C^-1, which is Toeplitz as both are
    divisor = np.convolve(weights, [1.0, -momentum])
    for t in range(rounds):
        reach = min(t, len(divisor) - 1)
        past = column[t - reach : t][::-1]
        column[t] = (1.0 if t == 0 else 0.0) - divisor[1 : reach + 1] @ past
    lags = np.arange(rounds)[None, :] - np.arange(rounds)[:, None]
    moves = np.where(lags >= 0, column[lags], 0.0) * factors[None, :]
    return np.asarray(np.cumsum(moves, axis=1))

"""Client-level differential privacy: what a whole site's records can do to the shared adapter.

McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language Models" (ICLR
2018): each site shortens its change to a norm C, and Gaussian noise of standard deviation ``sigma C``
goes onto the sum, which is divided by the size of the cohort that joined. Andrew, Thakkar, McMahan and
Ramaswamy, "Differentially Private Learning with Adaptive Clipping" (NeurIPS 2021): C follows a quantile
of the sites' norms, of which each round releases a noisy count.

Here the coordinator adds the noise, and is trusted with the sites' updates. Neighbouring runs differ in
one site's update, which is replaced by zero; who takes part is public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.plan.plan import Plan
from silotune.privacy.noise import NoiseSource, noise_for

Vector = NDArray[np.float32]

_COUNT_SHARE = 1 / 20  # noise of the count over the cohort, where that is enough: Andrew et al.
_PIECE = 1 << 15  # elements that a norm is taken of at a time


class SitePrivacy:
    """The coordinator's half of a plan whose ``privacy.mode`` is "site".

    Parameters
    ----------
    plan : Plan
        With ``privacy.site.noise = "coordinator"``.

    Attributes
    ----------
    clip : float
        The norm of the coming round.
    sigma : float
        Noise multiplier of a round as a whole; the plan's epsilon is that of `rounds` such releases.
    """

    def __init__(self, plan: Plan) -> None:
        from silotune.privacy.accounting import calibrate

        privacy = plan.privacy
        assert privacy.site is not None  # validated with the plan, like the next ones
        assert privacy.epsilon is not None and privacy.delta is not None
        self._plan, self._settings = plan, privacy.site
        self.clip = privacy.clipping.norm
        self.sigma = calibrate(
            epsilon=privacy.epsilon, delta=privacy.delta, rate=1.0, steps=plan.rounds.number
        )

    def multipliers(self, sites: int) -> tuple[float, float]:
        """Noise of the sum, over C, and of the count of short updates, over one site.

        Together they cost what one release of `sigma` costs: ``z^-2 + (2 b)^-2 = sigma^-2``, the count
        being taken of ±1/2. Without adaptive clipping there is no count.
        """
        if self._settings.quantile is None:
            return self.sigma, 0.0
        count = max(sites * _COUNT_SHARE, self.sigma)
        return (self.sigma**-2 - (2 * count) ** -2) ** -0.5, count

    def release(
        self, total: NDArray[np.float64], *, sites: int, server_round: int
    ) -> NDArray[np.float64]:
        """The noisy mean of the sites' changes; then `clip` is that of the next round.

        Parameters
        ----------
        total : float64 array
            Sum of the shortened changes; under adaptive clipping with the sum of the marks at its end.
        sites : int
            Of the cohort, whether they answered or not.
        server_round : int
            From 1.
        """
        noise = noise_for(self._plan.plan.seed, "site privacy", server_round)
        spread, count = self.multipliers(sites)
        changes = total if self._settings.quantile is None else total[:-1]
        mean = _noisy(changes, spread * self.clip, noise) / sites
        if self._settings.quantile is not None:
            short = float(_noisy(total[-1:], count, noise)[0]) / sites + 0.5
            pull = self._settings.clip_lr * (short - self._settings.quantile)
            self.clip *= math.exp(-pull)
        return mean

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes back."""
        return {"clip": np.array([self.clip])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a saved `state`."""
        self.clip = float(state["clip"][0])


def hidden(
    plan: Plan, update: Vector, *, clip: float | None, sigma: float, noise: NoiseSource
) -> Vector:
    """What leaves a site of its update; all of it unless ``privacy.mode`` is "site".

    Parameters
    ----------
    update : float32 array
        The site's change.
    clip : float or None
        The norm that the coordinator named; the plan's if None.
    sigma : float
        Noise multiplier, where the site adds the noise.
    noise : NoiseSource
        Where it comes from.
    """
    site = plan.privacy.site
    if site is None:
        return update
    bound = clip or plan.privacy.clipping.norm
    if plan.privacy.clipping.adapts:
        return marked(update, bound)
    short = shortened(update, bound)
    if site.noise == "coordinator":
        return short
    # Whatever the records say, the shortened change is at most two bounds away.
    return _noisy(short, 2.0 * bound * sigma, noise).astype(np.float32)


def shortened(update: Vector, bound: float) -> Vector:
    """The vector scaled to the bound if it is longer (and left alone if it is not finite)."""
    norm = _length(update)
    if not norm > bound or not np.isfinite(norm):
        return update
    return update * np.float32(bound / norm * (1.0 - 2.0**-19))


def marked(update: Vector, bound: float) -> Vector:
    """The shortened update, and behind it +1/2 if it was short already, else -1/2."""
    short = _length(update) <= bound
    mark = np.array([0.5 if short else -0.5], dtype=np.float32)
    return np.concatenate([shortened(update, bound), mark])


def _length(update: Vector) -> float:
    """Euclidean norm in float64, of one piece after the other: a whole copy is two adapters."""
    total = 0.0
    for start in range(0, update.size, _PIECE):
        piece = update[start : start + _PIECE].astype(np.float64)
        total += float(np.dot(piece, piece))
    return math.sqrt(total)


def _noisy(values: NDArray[Any], std: float, noise: NoiseSource) -> NDArray[np.float64]:
    return noise.added(values.astype(np.float32), std).astype(np.float64)

"""What each site has spent so far, cheap enough for every round.

Certified points of the run's curve are computed once for each kind of site; between two of them
the later one is given, so the number shown is never below the truth and always within the curve.
"""

from __future__ import annotations

import bisect
from collections import Counter

_POINTS = 16

_Mechanism = tuple[float, float]


class LiveEpsilon:
    """Epsilon of each site after the rounds it replied in.

    Parameters
    ----------
    delta : float
        The plan's.
    rounds : int
        Rounds of the whole run.
    local_steps : int
        Noisy steps that a site takes in a round.
    """

    def __init__(self, *, delta: float, rounds: int, local_steps: int) -> None:
        self._delta, self._rounds, self._local_steps = delta, rounds, local_steps
        self._mechanism: dict[str, _Mechanism] = {}
        self._replies: Counter[str] = Counter()
        self._curves: dict[_Mechanism, list[tuple[int, float]]] = {}

    def joined(self, site: str, *, rate: float, sigma: float) -> None:
        """A site takes part with this sampling rate and noise multiplier."""
        self._mechanism[site] = (rate, sigma)

    def replied(self, site: str) -> None:
        """A site released a round's update."""
        self._replies[site] += 1

    def spent(self) -> dict[str, float]:
        """An upper bound of epsilon, by site; sites that released nothing are left out."""
        return {
            site: self._after(mechanism, self._replies[site])
            for site, mechanism in self._mechanism.items()
            if self._replies[site]
        }

    def _after(self, mechanism: _Mechanism, rounds: int) -> float:
        if mechanism not in self._curves:
            # Here, because it takes seconds to import and a finished run's report needs none of it.
            from silotune.privacy.accounting import epsilon_curve, step_event

            rate, sigma = mechanism
            self._curves[mechanism] = epsilon_curve(
                step_event(rate=rate, sigma=sigma, steps=self._local_steps),
                rounds=self._rounds,
                points=_POINTS,
                delta=self._delta,
            )
        curve = self._curves[mechanism]
        place = bisect.bisect_left([number for number, _ in curve], rounds)
        return curve[min(place, len(curve) - 1)][1]

"""What the scores of canaries say of a claimed epsilon: lower bounds, and whether one is above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from silotune.privacy.attacks.bounds import (
    Coins,
    Guesses,
    Scores,
    epsilon_of,
    gaussian,
    gaussian_alone,
    guess,
    steinke,
)

CONFIDENCE = 0.95
"""Of each printed bound, on its own."""

VERDICT_ALPHA = 1e-5
"""Chance that a mechanism that keeps its claim is called a violation, for each of the three bounds."""

_SHARES = (0.1, 0.3, 1.0)  # of the canaries that are guessed: many leaks are seen at different ones


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Lower bounds of epsilon at the claim's delta, each at `CONFIDENCE`.

    Attributes
    ----------
    canaries : int
        Each in with probability 1/2.
    claimed : float or None
        What is claimed; None without privacy.
    any_mechanism : float
        Holds whatever the mechanism is.
    one_run : float or None
        Holds for mechanisms that are as private as a Gaussian of some size.
    independent : float or None
        Holds if, beyond that, canaries don't touch each other's scores.
    violated : bool
        One of them is above the claim at confidence ``1 - VERDICT_ALPHA``.
    """

    canaries: int
    claimed: float | None
    any_mechanism: float
    one_run: float | None = None
    independent: float | None = None
    violated: bool

    @property
    def lower_bound(self) -> float:
        """The largest of those that don't need independence."""
        return max(self.any_mechanism, self.one_run or 0.0)


def audit_step(
    scores: Scores, coins: Coins, *, claimed: float | None, mu: float, delta: float
) -> Finding:
    """Judge one step whose claim is that of a Gaussian.

    Parameters
    ----------
    scores, coins : arrays [canaries]
        Scores are in standard deviations of the claimed noise.
    claimed : float or None
        Epsilon.
    mu : float
        Distance between canaries that are in and out, as claimed: half of it is the threshold.
    delta : float
        Of all epsilons.
    """
    tried = _guesses(scores, coins)

    def bounds(alpha: float) -> tuple[float, float, float]:
        alone = gaussian_alone(scores, coins, threshold=mu / 2, alpha=alpha)
        return (
            _best(tried, lambda g, a: steinke(g, delta=delta, alpha=a), alpha=alpha),
            epsilon_of(_best(tried, lambda g, a: gaussian(g, alpha=a), alpha=alpha), delta=delta),
            epsilon_of(alone, delta=delta),
        )

    first, second, third = bounds(1.0 - CONFIDENCE)
    return Finding(
        canaries=len(coins),
        claimed=claimed,
        any_mechanism=first,
        one_run=second,
        independent=third,
        violated=claimed is not None and max(bounds(VERDICT_ALPHA)) > claimed,
    )


def audit_run(scores: Scores, coins: Coins, *, claimed: float | None, delta: float) -> Finding:
    """Judge a whole run, of which nothing but its (epsilon, delta) is claimed."""
    tried = _guesses(scores, coins)

    def bound(alpha: float) -> float:
        return _best(tried, lambda g, a: steinke(g, delta=delta, alpha=a), alpha=alpha)

    return Finding(
        canaries=len(coins),
        claimed=claimed,
        any_mechanism=bound(1.0 - CONFIDENCE),
        violated=claimed is not None and bound(VERDICT_ALPHA) > claimed,
    )


def _guesses(scores: Scores, coins: Coins) -> list[Guesses]:
    return [guess(scores, coins, count=int(share * len(coins)) // 2 * 2) for share in _SHARES]


def _best(tried: list[Guesses], bound: Callable[[Guesses, float], float], *, alpha: float) -> float:
    """The best of several bounds; each has its part of `alpha` (Bonferroni)."""
    return max(bound(found, alpha / len(tried)) for found in tried)

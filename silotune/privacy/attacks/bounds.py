"""Lower bounds of a mechanism's privacy from guesses about canaries, in one run of it.

An auditor plants m canaries, each with a fair coin of its own, looks at what the mechanism released, and
guesses k of the coins. Three ways to conclude from the number of right guesses:

- `steinke`: no (epsilon, delta)-DP mechanism allows so many but with probability alpha (Steinke, Nasr
  and Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, theorem 5.2).
- `gaussian`: the same for mechanisms whose releases tell no more of one unit than a Gaussian of
  sensitivity mu does (mu-GDP). Proof below.
- `gaussian_alone`: mu from the rates of false alarms and misses, by Clopper and Pearson. Sharper, and
  sound only if canaries don't touch each other's scores, as where the noise of different coordinates
  is independent. Noise that is one number for all canaries would mislead it.

**The Gaussian bound.** Let ``F(x) = Phi(Phi^-1(x) + mu)``: under mu-GDP a test of one unit at level x
has power F(x) at most. Fix all other coins. Let W be the number of right guesses, W' that without
canary i's. The event {i is guessed, W' >= c - 1} does not look at coin i, so it makes a test of it. Its
right guesses are right guesses with W >= c, its wrong ones are wrong guesses with W >= c - 1. F is
concave, so after averaging over the coins and the canaries

    X(c) <= F(Z(c - 1)),    X(c) = E[W; W >= c] / m,    Z(c) = E[k - W; W >= c] / m.

Suppose P(W >= w) >= alpha. Then X(w) >= alpha w / m; that asks for some Z(w - 1), so for some
probability of W = w - 1, which adds to X(w - 1), and so on down to W = 0. If all that comes to more
than probability 1, that is X(0) + Z(0) > k / m, no such mechanism exists, and mu is refuted at
confidence 1 - alpha. Taking each inequality as an equality, and all of {W >= w} at w, asks for the
least: mass at a larger W brings more X for the same Z. The argument is that of Mahloujifar, Melis and
Chaudhuri ("Auditing f-differential privacy in one run", ICML 2025). Xiang et al. ("Tight privacy audit
in one run", arXiv 2509.08704) assume scores that dominate each other canary by canary, Agrawal et al.
("Let's ask Gauss", arXiv 2606.12733) a central limit theorem: both come close to `gaussian_alone`, and
share its assumption.

`audit_step` and `audit_run` say what the scores of canaries mean for a claimed epsilon, and whether a
bound is above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

Scores = NDArray[np.float64]
Coins = NDArray[np.bool_]

_MOST_EPSILON = 100.0
_MOST_MU = 40.0
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """How an attack did.

    Attributes
    ----------
    canaries : int
        Planted with a fair coin each.
    guessed : int
        Coins that were guessed, chosen by the scores and never by the coins.
    right : int
        Guesses that were right.
    """

    canaries: int
    guessed: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.guessed <= self.canaries:
            raise ValueError("right guesses are among the guesses, and those among the canaries")


def guess(scores: Scores, coins: Coins, *, count: int) -> Guesses:
    """Guess the `count` canaries with the most extreme scores: half of them in, half out.

    Parameters
    ----------
    scores : float64 array [canaries]
        Larger where a canary seems to be in.
    coins : bool array [canaries]
        Which ones are in.
    count : int
        Even, and fixed before the scores are seen.
    """
    if not 0 <= count <= len(scores) or count % 2:
        raise ValueError("the number of guesses is even and at most that of the canaries")
    order, half = np.argsort(scores, kind="stable"), count // 2
    out, inside = order[:half], order[len(order) - half :]
    right = np.count_nonzero(~coins[out]) + np.count_nonzero(coins[inside])
    return Guesses(canaries=len(scores), guessed=count, right=int(right))


def steinke(found: Guesses, *, delta: float, alpha: float) -> float:
    """Largest epsilon that is refuted with error probability `alpha`; 0 if none is."""
    return _largest(
        lambda epsilon: steinke_p_value(found, epsilon=epsilon, delta=delta) < alpha,
        most=_MOST_EPSILON,
    )


def steinke_p_value(found: Guesses, *, epsilon: float, delta: float) -> float:
    """Bound of the probability of so many right guesses under (epsilon, delta)-DP."""
    share, right = float(expit(epsilon)), found.right
    tail = float(binom.sf(right - 1, found.guessed, share))
    if delta == 0.0 or not right:
        return tail
    steps = np.arange(1, right + 1)
    gained = (binom.sf(right - steps - 1, found.guessed, share) - tail) / steps
    return min(1.0, tail + 2.0 * found.canaries * delta * max(0.0, float(gained.max())))


def gaussian(found: Guesses, *, alpha: float) -> float:
    """Largest mu whose mu-GDP is refuted with error probability `alpha`; 0 if none is."""
    return _largest(lambda mu: gaussian_refuted(found, mu=mu, alpha=alpha), most=_MOST_MU)


def gaussian_refuted(found: Guesses, *, mu: float, alpha: float) -> bool:
    """Whether so many right guesses have a probability below `alpha` under mu-GDP."""
    m, k, w = found.canaries, found.guessed, found.right
    if not w:
        return False
    right, wrong = alpha * w / m, alpha * (k - w) / m  # X(w), and Z(w) with all mass at w
    for c in range(w - 1, -1, -1):
        needed = float(ndtr(ndtri(min(right, 1.0)) - mu))  # the least Z(c)
        if needed <= wrong:
            return False  # from here on nothing more is asked for
        right += (needed - wrong) * c / (k - c)
        wrong = needed
        if right + wrong > k / m:
            return True
    return False


def gaussian_alone(scores: Scores, coins: Coins, *, threshold: float, alpha: float) -> float:
    """Lower confidence bound of mu, for canaries whose scores are independent.

    Parameters
    ----------
    threshold : float
        Scores above it are guessed to be in; fixed before the scores are seen.
    """
    inside, outside = scores[coins], scores[~coins]
    misses = _at_most(int((inside <= threshold).sum()), len(inside), alpha / 2)
    alarms = _at_most(int((outside > threshold).sum()), len(outside), alpha / 2)
    return max(0.0, -float(ndtri(misses)) - float(ndtri(alarms)))


def epsilon_of(mu: float, *, delta: float) -> float:
    """Epsilon of mu-GDP at `delta` (Dong, Roth and Su, "Gaussian differential privacy", 2022)."""
    if _log_delta(mu, 0.0) <= math.log(delta):
        return 0.0
    most = 1.0
    while _log_delta(mu, most) > math.log(delta):
        most *= 2.0
    return float(brentq(lambda epsilon: _log_delta(mu, epsilon) - math.log(delta), 0.0, most))


def _log_delta(mu: float, epsilon: float) -> float:
    """Logarithm of the delta of mu-GDP at an epsilon."""
    if mu <= 0.0:
        return -math.inf
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return first + math.log(max(-math.expm1(second - first), 1e-300))


def _at_most(successes: int, trials: int, alpha: float) -> float:
    """Upper confidence bound of a probability (Clopper and Pearson, 1934)."""
    if successes >= trials:
        return 1.0
    return float(beta.ppf(1.0 - alpha, successes + 1, trials - successes))


def _largest(refuted: Callable[[float], bool], *, most: float) -> float:
    """The largest number that is refuted, to three digits, downwards; refutation is monotone."""
    low, high = 0.0, most
    if not refuted(_TOLERANCE):
        return 0.0
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


CONFIDENCE = 0.95
"""Of each printed bound, on its own."""

VERDICT_ALPHA = 1e-5
"""Chance that a mechanism that keeps its claim is called a violation, for each of the three bounds."""

_SHARES = (0.1, 0.3, 1.0)  # of the canaries that are guessed: many leaks are seen at different ones


@dataclass(frozen=True, kw_only=True)
class AuditResult:
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
) -> AuditResult:
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
    return AuditResult(
        canaries=len(coins),
        claimed=claimed,
        any_mechanism=first,
        one_run=second,
        independent=third,
        violated=claimed is not None and max(bounds(VERDICT_ALPHA)) > claimed,
    )


def audit_run(scores: Scores, coins: Coins, *, claimed: float | None, delta: float) -> AuditResult:
    """Judge a whole run, of which nothing but its (epsilon, delta) is claimed."""
    tried = _guesses(scores, coins)

    def bound(alpha: float) -> float:
        return _best(tried, lambda g, a: steinke(g, delta=delta, alpha=a), alpha=alpha)

    return AuditResult(
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

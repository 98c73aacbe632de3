"""Two models on the same records: whose mistakes are fewer, whose ranking is better.

McNemar, "Note on the sampling error of the difference between correlated proportions" (Psychometrika,
1947), in its exact form: of the records that only one of two models has right, each has as many if they
are equally good, so the smaller number is a draw of a fair coin's.

DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
characteristic curves" (Biometrics, 1988), by way of midranks: Sun and Xu, "Fast implementation of
DeLong's algorithm" (IEEE Signal Processing Letters, 2014).

Both take records as independent of each other. Where a unit has several, the bootstrap over units stands
beside them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, rankdata

from silotune.inference.evaluated import DeLong, McNemar

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def mcnemar(right: Bools, other_right: Bools) -> McNemar:
    """The exact test of two models whose answers are right or not, both of shape [records]."""
    only_this = int(np.count_nonzero(right & ~other_right))
    only_other = int(np.count_nonzero(other_right & ~right))
    both = only_this + only_other
    p_value = float(binomtest(min(only_this, only_other), both).pvalue) if both else 1.0
    return McNemar(only_this=only_this, only_other=only_other, p_value=p_value)


def delong(
    positive: Bools, scores: Floats, other: Floats, *, label: str, confidence: float
) -> DeLong | None:
    """The test of two models' areas under the ROC curve.

    Parameters
    ----------
    positive : bool array [records]
        Which have the label.
    scores, other : float array [records]
        The label's probability by either model.
    label : str
        Its name.
    confidence : float
        Of the interval of the difference.

    Returns
    -------
    DeLong or None
        None where fewer than two records have the label, or fewer than two don't.
    """
    if min(np.count_nonzero(positive), np.count_nonzero(~positive)) < 2:
        return None
    areas, covariance = areas_under(positive, np.stack([scores, other]))
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = float(np.sqrt(max(variance, 0.0)))
    reach = float(norm.isf((1 - confidence) / 2)) * error
    p_value = (
        2 * float(norm.sf(abs(difference) / error)) if error > 1e-12 else float(difference == 0)
    )
    return DeLong(
        label=label,
        auroc=float(areas[0]),
        other=float(areas[1]),
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p_value=p_value,
    )


def areas_under(positive: Bools, scores: Floats) -> tuple[Floats, Floats]:
    """Areas under the ROC curve of several models [models, records], and their covariance.

    A record's part of the area is the share of the records of the other side that it is rightly ranked
    against, ties counting half: its rank among all less its rank among its own side.
    """
    m, n = np.count_nonzero(positive), np.count_nonzero(~positive)
    everywhere = rankdata(scores, axis=1)
    own = np.empty_like(everywhere)
    for side in (positive, ~positive):
        own[:, side] = rankdata(scores[:, side], axis=1)
    of_positive = (everywhere - own)[:, positive] / n
    of_negative = 1.0 - (everywhere - own)[:, ~positive] / m
    covariance = np.cov(of_positive) / m + np.cov(of_negative) / n
    return of_positive.mean(1), covariance

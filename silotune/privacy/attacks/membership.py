"""How well scores tell canaries that were trained on from those that were not.

The score is a likelihood ratio: the loss of a record under a reference model that never saw it, less
its loss under the model that perhaps did (Carlini et al., "Membership inference attacks from first
principles", S&P 2022, offline; with one reference, which here differs in the canaries alone).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from silotune.privacy.attacks.bounds import Coins, Scores

FALSE_ALARMS = 0.01
"""Rate of false alarms at which hits are counted: a few sure hits are worse than many vague ones."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How far apart two sets of scores are.

    Attributes
    ----------
    auc : float
        Chance that a canary that was in has a larger score than one that was out: 0.5 for a guess.
    hits : float
        Part of the canaries that were in and are found, with `FALSE_ALARMS` of the others.
    """

    auc: float
    hits: float


def separation(scores: Scores, coins: Coins) -> Separation:
    """Compare the scores of canaries that were in with the others'.

    Raises
    ------
    ValueError
        All canaries are on one side.
    """
    inside, outside = np.sort(scores[coins]), np.sort(scores[~coins])
    if not len(inside) or not len(outside):
        raise ValueError("canaries are needed on both sides")
    below = np.searchsorted(outside, inside, side="left")
    level = np.searchsorted(outside, inside, side="right")
    threshold = outside[len(outside) - 1 - int(FALSE_ALARMS * len(outside))]
    return Separation(
        auc=float((below + level).mean() / 2 / len(outside)),
        hits=float((inside > threshold).mean()),
    )

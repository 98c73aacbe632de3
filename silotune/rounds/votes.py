"""What the noisy sum of a vote says: votes for each candidate, and how sure the first place is.

All of it is post-processing of the sum. The chosen candidate is the one with the most noisy votes, the
first of equals. Beside it stands the probability that it has the most votes without noise, too: that of
the true numbers given the noisy ones, if before the vote every outcome was as likely as any other. It
says nothing of how well a candidate does where it is not tried, in the training of all sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.events.schema import VOTES_FORMAT
from silotune.models.layout import Vector
from silotune.plan.counted import part_scale
from silotune.plan.plan import Plan
from silotune.plan.voted import blocks_at

_REACH, _POINTS = 9.0, 4001  # deviations, and points of the integral


def find(
    plan: Plan,
    sums: Vector,
    *,
    variance: float,
    sites: Sequence[str],
    declared: Mapping[str, int],
) -> dict[str, Any]:
    """What a vote came to, as plain data: the content of votes.json.

    Parameters
    ----------
    plan : Plan
        With a vote.
    sums : float32 array [number of candidates]
        The noisy sum over sites.
    variance : float
        Of the noise on each of its numbers.
    sites : sequence of str
        Sites that are in the sum.
    declared : mapping of site to int
        Units that they declare.
    """
    vote, privacy = plan.vote, plan.privacy
    assert vote is not None and privacy.epsilon is not None and privacy.delta is not None
    counted = np.asarray(sums, dtype=np.float64) / part_scale(plan)
    noise = math.sqrt(variance) / part_scale(plan)
    chosen = int(counted.argmax())
    return {
        "format": VOTES_FORMAT,
        "plan_sha256": plan.sha256,
        "plan": vote.plan.name,
        "dataset": plan.data.dataset,
        "unit": privacy.unit,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "private": plan.plan.seed is None,
        "noise": noise,
        "sites": {
            site: {
                "declared_units": declared.get(site),
                "blocks": blocks_at(plan, declared[site]) if site in declared else None,
            }
            for site in sites
        },
        "candidates": [
            {"number": number, "settings": settings, "votes": float(votes)}
            for number, (settings, votes) in enumerate(
                zip(vote.candidates, counted, strict=True), start=1
            )
        ],
        "chosen": chosen + 1,
        "settings": vote.candidates[chosen],
        "probability": leads(counted, chosen, noise=noise),
    }


def leads(votes: NDArray[np.float64], one: int, *, noise: float) -> float:
    """Probability that `one` has the most votes without noise, of independent Gaussian noise.

    Given the noisy numbers, and no outcome likelier than another beforehand.
    """
    if noise == 0.0:
        return float(votes[one] == votes.max())
    steps, normal = np.linspace(-_REACH, _REACH, _POINTS), NormalDist()
    density = np.exp(-0.5 * steps**2) / math.sqrt(2.0 * math.pi)
    for other, count in enumerate(votes):
        if other != one:
            ahead = (float(votes[one]) - float(count)) / noise
            density *= np.array([normal.cdf(step + ahead) for step in steps.tolist()])
    return float(min(1.0, density.sum() * (steps[1] - steps[0])))

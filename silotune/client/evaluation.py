"""What a site tells of its validation units: counts that leave only with noise, or not at all.

Each validation unit adds one record to the counts, so that a unit moves them by a known amount: one
cell of a confusion matrix, or one capped loss and one to the number of texts. Counting is
`silotune.client.scoring`'s; here are the shape and the bounds that it has to keep, and the noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from silotune.errors import SelfCheckFailed
from silotune.plan.plan import Plan
from silotune.privacy.noise import NoiseSource

_MOST_UNITS = 8  # times as many as are declared: more would be a mistake in site.toml, or a lie


def sensitivity(plan: Plan) -> float:
    """L2 norm of the most that one unit can add to counts."""
    return plan.task.sensitivity(plan.model)


def nothing(plan: Plan) -> NDArray[np.float64]:
    """Counts of no unit at all."""
    return np.zeros(plan.task.shape(plan.model))


def bounded(values: NDArray[np.float64], plan: Plan, *, units: int) -> NDArray[np.float64]:
    """Counts as they may be, whoever counted: of the plan's shape, none below zero, none too large.

    Each number is moved to the nearest one that is allowed, so that two countings are no further apart
    afterwards than they were: the noise hides as much as before.

    Parameters
    ----------
    values : float64 array
        As they were counted.
    plan : Plan
        Its task gives the shape.
    units : int
        That the site declares.

    Raises
    ------
    SelfCheckFailed
        They have another shape or type, or are not finite.
    """
    if values.shape != nothing(plan).shape or values.dtype != np.float64:
        raise SelfCheckFailed("the counts are not of the plan's shape")
    if not np.isfinite(values).all():
        raise SelfCheckFailed("a count is not finite")
    return np.clip(values, 0.0, _MOST_UNITS * units * sensitivity(plan))


def noisy(
    values: NDArray[np.float64], *, sigma: float, sensitivity: float, noise: NoiseSource
) -> NDArray[np.float32]:
    """Counts with Gaussian noise of standard deviation sigma times sensitivity."""
    return noise.added(values.astype(np.float32), sigma * sensitivity)

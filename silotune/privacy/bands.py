"""A round's noise that takes back a part of what earlier rounds added: the matrix mechanism, row by row.

What a site sends in round t is ``X_t = G_t + z_t`` with ``z_t = w_t - sum over k of c_k z_{t-k}``,
where G_t is its clipped sum and w_t fresh Gaussian noise. Anybody who has seen the rounds can add up
``c_k X_{t-k}``: that is ``sum over k of c_k G_{t-k} + w_t``, the Gaussian mechanism on weighted sums. So
all that is sent is computed from its outputs, and docs/privacy.md derives what they cost.

z_t is kept as what was sent less G_t, in float64. Then rounding what is sent to float32 is
post-processing, too: the next row takes back what was sent indeed, and not what was meant to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.errors import SelfCheckFailed
from silotune.privacy.noise import NoiseSource, noised


def correlated(
    sums: NDArray[np.floating[Any]],
    earlier: Mapping[int, NDArray[np.float64]],
    *,
    column: Sequence[float],
    stds: Sequence[float],
    sizes: Sequence[int],
    noise: NoiseSource,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Sums with a round's noise, and that noise, which later rounds take back a part of.

    Parameters
    ----------
    sums : float64 array
        Clipped sums of the round.
    earlier : mapping of int to float64 array
        Noise of earlier rounds that were sent, by how many rounds ago; of a round that this site did
        not take part in there is none, and none of it is taken back.
    column : sequence of float
        Weights, beginning with 1 for the round's own.
    stds, sizes : sequence of float, of int
        Standard deviation of the fresh noise of each part of the sums, and how long it is.
    noise : NoiseSource
        Of the fresh noise.

    Raises
    ------
    SelfCheckFailed
        The noise is not what was asked for, or that of an earlier round has another shape.
    """
    aim = np.array(sums, dtype=np.float64)
    for ago in sorted(earlier):
        row = earlier[ago]
        if row.shape != aim.shape or row.dtype != np.float64 or not np.isfinite(row).all():
            raise SelfCheckFailed(f"the noise of {ago} rounds ago is not of this round's shape")
        if ago < len(column):
            aim -= column[ago] * row
    made = noised(aim, stds, sizes, noise=noise)
    return made, made.astype(np.float64) - sums

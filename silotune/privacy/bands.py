"""Noise of which later rounds take back a part: the matrix mechanism, a row a round, in whole numbers.

In round t a site adds ``z_t = w_t - c_1 z_{t-1} - ... - c_{b-1} z_{t-b+1}`` to its clipped sum, with
fresh Gaussian noise w_t: all of it, or its share. A row z_t is kept exactly, in units of the sampler
(`silotune.privacy.noise`: `DRAW_STD` of them are one standard deviation of the fresh noise), and what
is taken back is rounded to whole units: a function of earlier rows, never of records or of what was
sent. So whatever is done to a sum after its row was added is post-processing. docs/privacy.md derives
what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.errors import SelfCheckFailed
from silotune.privacy.noise import DRAW_STD, INFLATION, NoiseSource, noise_is_plausible

Row = NDArray[np.int64]


def taken_back(earlier: Mapping[int, Row], *, column: Sequence[float], size: int) -> Row:
    """What a round's noise takes back of earlier rounds', in units of the sampler.

    Of a round that the site had no part in, or whose row is gone, nothing is: that costs accuracy and no
    privacy.

    Parameters
    ----------
    earlier : mapping of int to int64 array
        Rows of earlier rounds, by how many rounds *of the run* ago. A site that counted its own instead
        would bring units of other sites, which are drawn every so many rounds, too close together.
    column : sequence of float
        Weights, beginning with 1 for the round's own.
    size : int
        Numbers in a row.

    Raises
    ------
    SelfCheckFailed
        A row of another form.
    """
    total = np.zeros(size)
    for ago in sorted(earlier):
        row = earlier[ago]
        if row.shape != (size,) or row.dtype != np.int64:
            raise SelfCheckFailed(f"the noise of {ago} rounds ago is not of this round's shape")
        if ago < len(column):
            total += column[ago] * row
    return np.rint(total).astype(np.int64)


def fresh_row(back: Row, noise: NoiseSource) -> Row:
    """A round's noise: fresh, less what it takes back."""
    row = -back
    for start, draws in noise.draws(len(row)):
        row[start : start + draws.size] += draws
    return row


def correlated(
    sums: NDArray[np.floating[Any]],
    earlier: Mapping[int, Row],
    *,
    column: Sequence[float],
    stds: Sequence[float],
    sizes: Sequence[int],
    noise: NoiseSource,
) -> tuple[NDArray[np.float32], Row]:
    """Sums with a round's noise, and its row, which later rounds take back a part of.

    Parameters
    ----------
    sums : float64 array
        Clipped sums of the round.
    earlier, column
        See `taken_back`.
    stds, sizes : sequence of float, of int
        Standard deviation of the fresh noise of each part of the sums, and how long it is.
    noise : NoiseSource
        Of the fresh noise.

    Raises
    ------
    SelfCheckFailed
        The noise is not what was asked for (false alarms: at most 1e-9), or that of an earlier round
        has another form.
    """
    back = taken_back(earlier, column=column, size=len(sums))
    row, made, squares, start = np.empty_like(back), np.empty(len(sums), dtype=np.float32), 0.0, 0
    for std, size in zip(stds, sizes, strict=True):
        here = slice(start, start + size)
        row[here] = fresh_row(back[here], noise)
        grid = std * INFLATION / DRAW_STD
        # One correctly rounded sum of two whole numbers: what is lost is post-processing.
        made[here] = (np.rint(np.divide(sums[here], grid, dtype=np.float64)) + row[here]) * grid
        fresh = (made[here] - sums[here]) / std + back[here] / DRAW_STD
        squares += float(np.sum(np.square(fresh, dtype=np.float64)))
        start += size
    if not noise_is_plausible(squares, len(sums)):
        raise SelfCheckFailed("the noise of an update is not what was asked for")
    return made, row

"""Micro-batches of examples of like length, so that little of a batch is padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.models.task import Encoded, Rows


def batches(
    encoded: Encoded,
    rows: Rows,
    *,
    size: int,
    units: NDArray[np.integer[Any]] | None = None,
) -> list[list[int]]:
    """Split rows into micro-batches, shortest examples first.

    Parameters
    ----------
    encoded : Encoded
        Where the lengths come from.
    rows : sequence of int
        Rows of `encoded`; each ends up in exactly one batch.
    size : int
        Most rows a batch may have, at least 1.
    units : int array [len(rows)], optional
        Privacy unit of each of `rows`. The rows of a unit then stay in one batch, because a unit's
        gradient is clipped as a whole. A unit of more than `size` rows is a batch of its own.

    Returns
    -------
    list of lists of int
        The same input gives the same batches; ties keep the order of `rows`. Without units the
        batches are of equal size to within one row.
    """
    chosen = np.asarray(rows, dtype=np.int64)
    if not len(chosen):
        return []
    lengths = encoded.lengths[chosen]
    if units is None:
        ordered = chosen[np.argsort(lengths, kind="stable")]
        parts = np.array_split(ordered, -(-len(ordered) // size))
        return [part.tolist() for part in parts]
    return _whole_units(chosen, lengths, np.asarray(units), size)


def _whole_units(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    units: NDArray[np.integer[Any]],
    size: int,
) -> list[list[int]]:
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    longest = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(longest, unit, lengths)
    # Units by their longest example, ties by first appearance; rows of a unit side by side.
    order = np.lexsort((np.arange(len(rows)), first[unit], longest[unit]))
    ends = np.flatnonzero(np.diff(unit[order], append=-1)) + 1
    result: list[list[int]] = []
    start = taken = 0
    for end in ends.tolist():
        if end - start > size and taken > start:
            result.append(rows[order[start:taken]].tolist())
            start = taken
        taken = end
    result.append(rows[order[start:]].tolist())
    return result

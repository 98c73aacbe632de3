"""Which rounds' adapters a run directory keeps: the last, the best and every n-th.

A run goes on from its checkpoint, so none of them is needed for that; they are for who wants to look
back. Their number has a bound, however many rounds there are.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from silotune.events.view import RunView

_MARKS = 20
_DECIDING = (("macro_f1", 1.0), ("loss", -1.0))


def every(rounds: int) -> int:
    """The n of every n-th round."""
    return max(1, math.ceil(rounds / _MARKS))


def most_kept(rounds: int) -> int:
    """How many adapters a run of so many rounds leaves at most."""
    marks = rounds // every(rounds)
    return min(rounds, marks + 2)


def spare(view: RunView, have: Collection[int], *, newest: int, rounds: int) -> list[int]:
    """Rounds whose adapter may go, once that of the newest round is on the disk.

    Parameters
    ----------
    view : RunView
        The run so far: it knows the best round on validation data.
    have : collection of int
        Rounds whose adapter is on the disk.
    """
    kept = {newest, best(view)}
    return [n for n in have if n not in kept and n % every(rounds) and n < newest]


def best(view: RunView) -> int | None:
    """The round with the best score on validation data, the first of equals; None without any."""
    looks = [found for found in view.evaluations if found.split == "validation"]
    for key, sign in _DECIDING:
        scored = [
            (sign * found.pooled[key], -found.number) for found in looks if key in found.pooled
        ]
        if scored:
            return -max(scored)[1]
    return None

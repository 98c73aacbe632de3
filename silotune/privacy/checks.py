"""Run-time checks of a private step: what must hold before anything is released."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from silotune.errors import SelfCheckFailed

if TYPE_CHECKING:  # loaded where it is needed: a coordinator checks noise and has no PyTorch
    from torch import Tensor

# Chance that the check of correct noise fails all the same.
_FALSE_ALARM = 1e-9


def noise_is_plausible(chi_square: float, count: int) -> bool:
    """Whether a sum of squares fits `count` independent standard normals.

    Both tails are bounded by Chernoff: for ``X ~ chi^2_n`` and ``u = x / n``, ``P(X >= x)`` for
    ``u > 1`` and ``P(X <= x)`` for ``u < 1`` are at most ``exp(-n/2 (u - 1 - ln u))``. Correct noise
    fails with a probability of at most 1e-9. A standard deviation that is off by 5 % is caught from
    9,000 numbers on, one that is off by 2 % from 55,000 on, and noise left out always.
    """
    ratio = chi_square / count
    if not (ratio > 0.0 and math.isfinite(ratio)):
        return False
    return count / 2 * (ratio - 1.0 - math.log(ratio)) <= math.log(2.0 / _FALSE_ALARM)


def require_finite(tensors: Sequence[Tensor], what: str) -> None:
    """Check that no number is NaN or infinite.

    Raises
    ------
    SelfCheckFailed
        Saying what is not finite.
    """
    import torch

    if not bool(torch.isfinite(torch.cat([tensor.flatten() for tensor in tensors])).all()):
        raise SelfCheckFailed(f"{what} is not finite")

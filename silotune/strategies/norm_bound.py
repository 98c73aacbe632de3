"""Norm bounding: no update may be longer than ``aggregation.bound``.

Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?" (2019).

Good for
    Keeping a lying site's influence to one site's worth, also where nobody may see its update: the
    one defence that works with secure aggregation. It does not find the liar.
Bytes
    As fedavg.
Linear
    Yes: a site shortens its own update; the coordinator does so again where it can see it. Under
    secure aggregation the range of the encoding is what enforces a bound, coordinate by coordinate.
Privacy
    Post-processing of releases.
Head
    Part of the vector whose length is bounded.

With one local step the bound is on the mean gradient: the sum over the expected batch.

A site shortens its update exactly. The coordinator, which adds up thousands, measures lengths in
float32: what it adds is at most 1.001 times as long as the bound.
"""

from __future__ import annotations

import math

import numpy as np

from silotune.models.layout import Vector
from silotune.plan.plan import Plan
from silotune.strategies.base import Terms
from silotune.strategies.linear import LinearStrategy
from silotune.strategies.site_privacy import shortened

# So many squares added one after the other in float32 are off by at most 2**13 * 2**-24 of their sum,
# and the root by half of that. Longer products would also start BLAS's threads, which spin.
_PIECE, _ERROR = 1 << 13, 2.0**-11


class NormBound(LinearStrategy):
    """Weighted mean of updates shortened to the bound."""

    @classmethod
    def outgoing(cls, plan: Plan, update: Vector, *, declared_units: int) -> Vector:
        """The update, no longer than the bound."""
        return shortened(update, _bound(plan, declared_units))

    def fold(self, terms: Terms, update: Vector) -> None:
        """Shorten again what should be short already, and add it."""
        bound, length = _bound(self.plan, terms.declared_units), _length(update)
        longer = bound * (1 + _ERROR) < length < math.inf
        scale = bound / length if longer else 1.0
        self._fold(terms, update, scale=scale, longest=length * (1 + _ERROR))


def _bound(plan: Plan, declared_units: int) -> float:
    assert plan.aggregation.bound is not None  # validated with the plan
    return plan.aggregation.bound * (plan.expected_batch(declared_units) if plan.sends_sums else 1)


def _length(update: Vector) -> float:
    """Euclidean norm to a relative `_ERROR`, in a third of the time of an exact one."""
    pieces = (update[start : start + _PIECE] for start in range(0, update.size, _PIECE))
    return math.sqrt(sum(float(np.dot(piece, piece)) for piece in pieces))

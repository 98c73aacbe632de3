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
"""

from __future__ import annotations

from silotune.plan import Plan
from silotune.strategies.base import Terms, Vector
from silotune.strategies.linear import LinearStrategy
from silotune.strategies.site_privacy import shortened


class NormBound(LinearStrategy):
    """Weighted mean of updates shortened to the bound."""

    @classmethod
    def outgoing(cls, plan: Plan, update: Vector, *, declared_units: int) -> Vector:
        """The update, no longer than the bound."""
        assert plan.aggregation.bound is not None  # validated with the plan
        unit = plan.expected_batch(declared_units) if plan.sends_sums else 1.0
        return shortened(update, plan.aggregation.bound * unit)

    def fold(self, terms: Terms, update: Vector) -> None:
        """Shorten again what should be short already, and add it."""
        bounded = self.outgoing(self.plan, update, declared_units=terms.declared_units)
        super().fold(terms, bounded)

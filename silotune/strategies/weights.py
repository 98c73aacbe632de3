"""What a site's update counts for, from public numbers: one rule for sites and coordinator."""

from __future__ import annotations

from silotune.plan import Plan
from silotune.strategies.base import Weight


def weight_in(plan: Plan, *, declared_units: int, largest: int) -> Weight:
    """Factor of a site's update in a sum, and what the site adds to the divisor.

    Parameters
    ----------
    declared_units : int
        The site's.
    largest : int
        The most that a member of the cohort declares.
    """
    equal = plan.aggregation.weights == "equal"
    if plan.sends_sums:
        batch = plan.expected_batch(declared_units)
        return Weight(factor=1.0 / batch, mass=1.0) if equal else Weight(factor=1.0, mass=batch)
    share = 1.0 if equal else declared_units / largest
    return Weight(factor=share, mass=share)

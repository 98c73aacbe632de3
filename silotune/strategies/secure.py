"""What a plan's secure rounds come to, alike at every site and at the coordinator.

From the plan, the layout and the sites' declared units alone: how updates are encoded, what a site
multiplies its own by, and how the noise is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from silotune.models.layout import Layout, Part
from silotune.plan.counted import units_with_room
from silotune.plan.plan import Plan
from silotune.privacy.secagg.encoding import BoundedSpan, Encoding
from silotune.privacy.secagg.graph import tolerated_collusion
from silotune.strategies import method_of

# Adam moves a number by at most (1 - beta1) / sqrt(1 - beta2) = 3.2 learning rates a step.
_ADAM_REACH = 4.0
# Bounds in clip norms. A number of a gradient sum passes them only if so many units push it alike.
_SUM_REACH = {"uint32": 1024.0, "uint16": 16.0}
_MEAN_REACH = 16.0


@dataclass(frozen=True)
class SharedNoise:
    """How the sites share one Gaussian.

    Attributes
    ----------
    sharers : int
        Honest survivors whose shares suffice: the plan's threshold.
    tolerated : int
        Sites that may collude with the coordinator without breaking the aggregation.
    """

    sharers: int
    tolerated: int


def shared_noise(plan: Plan) -> SharedNoise | None:
    """How the plan's noise is shared; None if every site adds all of its own."""
    if plan.privacy.noise != "shared":
        return None
    threshold, cohort = plan.aggregation.threshold, plan.aggregation.cohort
    assert threshold is not None and cohort is not None  # validated with the plan
    return SharedNoise(threshold, tolerated_collusion(threshold, cohort))


def encoding_for(plan: Plan, *, layout: Layout, server_round: int) -> Encoding:
    """How the updates of a round are encoded."""
    cohort = plan.aggregation.cohort
    assert cohort is not None  # validated with the plan
    sent = layout.spans(method_of(plan).sent(plan, server_round))
    spans = [BoundedSpan(size=s.size, bound=update_bound(plan, s.part)) for s in sent]
    return Encoding(ring=plan.aggregation.encoding, spans=tuple(spans), cohort=cohort)


def update_bound(plan: Plan, part: Part) -> float:
    """Largest absolute value that a number of a site's (weighted) update may have."""
    given = plan.aggregation.update_bound
    if plan.only_sums:
        return units_with_room(plan)
    if given is not None:
        return given
    site = plan.optimizer.site
    rate = site.head_lr if part == "head" else site.adapter_lr
    if plan.rounds.local_steps > 1 and site.local == "adam":
        return _ADAM_REACH * rate * plan.rounds.local_steps
    norm = plan.privacy.clipping.of(part).norm  # validated with the plan: else it has a bound
    if plan.rounds.local_steps > 1:
        return _MEAN_REACH * norm * rate * plan.rounds.local_steps
    if plan.aggregation.weights == "equal":
        return _MEAN_REACH * norm
    return _SUM_REACH[plan.aggregation.encoding] * norm

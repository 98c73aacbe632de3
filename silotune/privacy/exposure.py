"""What a run's releases are worth to whom: the published adapter's readers, the coordinator, colluders.

Under secure aggregation only sums over sites are seen, so other sites' noise protects a unit too, as far
as those sites keep it to themselves. A site can vouch for its own noise alone: hence one epsilon for
each number of sites that might collude with the coordinator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent

from silotune.plan import Plan
from silotune.plan_secure import sends_all_it_trains
from silotune.privacy.accounting import from_json, to_json
from silotune.privacy.events import SharedGaussianDpEvent
from silotune.privacy.secagg.graph import tolerated_collusion
from silotune.privacy.tally import Tally, epsilon_of

ALL_OTHERS = -1
"""In place of a number: all other sites collude."""


@dataclass(frozen=True)
class Sums:
    """Sums that the coordinator sees, of which every site's noise has the same scale.

    Attributes
    ----------
    threshold : int
        Sites in a sum, at least.
    tolerated : int
        Sites that may collude with the coordinator without opening single updates.
    shared : bool
        Whether the sites share the noise; if not, each adds all of its own.
    """

    threshold: int
    tolerated: int
    shared: bool


def sums_of(plan: Plan) -> Sums | None:
    """How the plan's training updates are summed; None if what a site sends counts on its own.

    That other sites' noise counts takes one step a round, one rate, declared weights (so that all
    noise multipliers are one), updates that are sent whole and unchanged, and a threshold that the
    plan fixes.
    """
    aggregation = plan.aggregation
    common = (
        plan.rounds.local_steps == 1
        and plan.privacy.rate
        and aggregation.weights == "declared"
        and sends_all_it_trains(plan)
    )
    if not (aggregation.secure and common and aggregation.threshold and aggregation.cohort):
        return None
    return Sums(
        threshold=aggregation.threshold,
        tolerated=tolerated_collusion(aggregation.threshold, aggregation.cohort),
        shared=plan.privacy.noise == "shared",
    )


def exposures(
    tally: Mapping[str, int], *, delta: float, sums: Sums | None
) -> list[tuple[int, float]]:
    """Epsilon by number of sites that collude with the coordinator.

    Parameters
    ----------
    tally : mapping of str to int
        What was released, as the ledger counts it.
    delta : float
        Of every epsilon.
    sums : Sums or None
        See `sums_of`.

    Returns
    -------
    list of (colluding, epsilon)
        From 0 up to what the aggregation tolerates, then `ALL_OTHERS`; only that if nothing is summed.
    """
    if sums is None:
        return [(ALL_OTHERS, epsilon_of(tally, delta=delta))]
    seen = dict(tally) if sums.shared else _in_sums(tally, sums)
    counts = range(sums.tolerated + 1)
    rows = [(c, epsilon_of(seen, delta=delta, colluding=c)) for c in counts]
    return [*rows, (ALL_OTHERS, epsilon_of(seen, delta=delta, colluding=sums.threshold))]


def _in_sums(tally: Mapping[str, int], sums: Sums) -> Tally:
    """Training steps with the noise of all sites in a sum, of which each has a share."""
    found: Tally = Tally()
    for leaf, times in tally.items():
        found[to_json(_in_sum(from_json(leaf), sums))] += times
    return found


def _in_sum(event: DpEvent, sums: Sums) -> DpEvent:
    if not isinstance(event, PoissonSampledDpEvent) or type(event.event) is not GaussianDpEvent:
        return event
    together = event.event.noise_multiplier * math.sqrt(sums.threshold)
    shared = SharedGaussianDpEvent(together, sums.threshold, sums.tolerated)
    return PoissonSampledDpEvent(event.sampling_probability, shared)


def in_words(colluding: int, *, sums: Sums | None) -> str:
    """Against whom an epsilon of `exposures` holds."""
    if colluding == ALL_OTHERS:
        return "the coordinator, whoever colludes with it"
    if colluding == 0:
        return "readers of the adapter, and the coordinator alone"
    assert sums is not None  # otherwise there is no such row
    sites = "1 site" if colluding == 1 else f"{colluding} sites"
    return f"the coordinator with {sites} of {sums.threshold} or more"

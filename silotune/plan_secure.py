"""Which plans secure aggregation and shared noise can serve, and why not the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from silotune.plan_strategies import STRATEGIES

if TYPE_CHECKING:
    from silotune.plan import Plan


def sends_all_it_trains(plan: Plan) -> bool:
    """Whether sites send the sum of all that they train, as it is: other sites' noise then counts.

    A part that is kept, or an update that is changed after its noise, has the site's own noise only,
    and later rounds depend on it.
    """
    return plan.strategy.sends_all and plan.aggregation.head == "shared"


def secure_conflicts(plan: Plan) -> list[str]:
    """Settings of secure aggregation and shared noise that contradict each other or the rest."""
    shared = plan.privacy.noise == "shared"
    if not plan.aggregation.secure:
        found = [
            f"aggregation.{key}: has no meaning without aggregation.secure = true; remove it"
            for key in ("cohort", "threshold", "update_bound")
            if getattr(plan.aggregation, key) is not None
        ]
        if plan.aggregation.encoding != "uint32":
            found.append("aggregation.encoding: has no meaning without aggregation.secure = true")
        if shared:
            found.append(
                "privacy.noise: 'shared' needs aggregation.secure = true: alone, a site's share of "
                "the noise does not protect what it sends"
            )
        return found
    return [*_cohort_conflicts(plan), *(_shared_conflicts(plan) if shared else [])]


def _cohort_conflicts(plan: Plan) -> list[str]:
    aggregation, rounds = plan.aggregation, plan.rounds
    cohort, threshold = aggregation.cohort, aggregation.threshold
    found = []
    if reason := plan.strategy.needs_each:
        found.append(
            f"aggregation.strategy: '{aggregation.strategy}' can't work with secure = true, which "
            f"gives the coordinator sums only: {reason}"
        )
    if cohort is None:
        found.append(
            "aggregation.cohort: needed with secure = true; the most sites that a round may have, "
            "for which the sum must have room"
        )
    elif threshold is not None and not cohort < 2 * threshold <= 2 * cohort:
        found.append(
            f"aggregation.threshold: must be more than half of aggregation.cohort = {cohort}, and at "
            "most all; with less, two disjoint halves of a round could be opened"
        )
    if cohort is not None and cohort < rounds.min_sites:
        found.append("aggregation.cohort: less than rounds.min_sites")
    if threshold is not None and threshold < rounds.min_sites:
        found.append("aggregation.threshold: less than rounds.min_sites")
    if aggregation.update_bound is None and not _bounded(plan):
        found.append(
            "aggregation.update_bound: needed here: neither clipping nor Adam's step bounds the "
            "updates, and a sum in whole numbers must not overflow"
        )
    return found


def _bounded(plan: Plan) -> bool:
    several = plan.rounds.local_steps > 1
    return plan.private or (several and plan.optimizer.site.local == "adam")


def _shared_conflicts(plan: Plan) -> list[str]:
    found = []
    if not plan.private:
        found.append("privacy.noise: there is no noise to share when privacy.mode is 'none'")
    if plan.rounds.local_steps > 1:
        found.append(
            "privacy.noise: 'shared' needs rounds.local_steps = 1: after a step of its own a site's "
            "next gradient depends on a model with less noise than the guarantee counts on"
        )
    if plan.privacy.rate is None:
        found.append(
            "privacy.noise: 'shared' needs privacy.rate instead of privacy.batch: only with one "
            "rate for all sites is the round one mechanism on one sample of all units"
        )
    if plan.aggregation.weights != "declared":
        found.append(
            "privacy.noise: 'shared' needs aggregation.weights = 'declared', which adds the sums as "
            "they are: other weights would give sites different sensitivities"
        )
    if not sends_all_it_trains(plan):
        names = sorted(name for name, facts in STRATEGIES.items() if facts.sends_all)
        found.append(
            "privacy.noise: 'shared' needs a strategy that sends all that it trains, as it is: "
            f"{', '.join(names)}, with aggregation.head = 'shared'; what a site "
            "keeps or changes would be without enough noise"
        )
    if plan.aggregation.threshold is None:
        found.append(
            "aggregation.threshold: needed when privacy.noise is 'shared': each site's share of the "
            "noise is sized for so many honest sites"
        )
    return found

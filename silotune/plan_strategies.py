"""What a plan's aggregation strategy needs of the rest of the plan, and what it can't go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from silotune.plan import Plan

_PRODUCT = (
    "it averages the products B_k A_k, which the coordinator computes from each site's update"
)
_VOTE = "it compares the sites' updates with each other"

NOT_LINEAR: Mapping[str, str] = {
    "fedex": _PRODUCT,
    "flora": _PRODUCT,
    "flexlora": _PRODUCT,
    "median": _VOTE,
    "trimmed_mean": _VOTE,
    "krum": _VOTE,
    "multi_krum": _VOTE,
    "geometric_median": _VOTE,
    "bulyan": _VOTE,
}
"""Strategies that need each site's update, and why: they can't work on a sum alone."""

_OPTIONS: Mapping[str, frozenset[str]] = {
    "trim": frozenset({"trimmed_mean"}),
    "byzantine": frozenset({"krum", "multi_krum", "bulyan"}),
    "selected": frozenset({"multi_krum"}),
    "bound": frozenset({"norm_bound"}),
}
_PRODUCTS = frozenset({"fedex", "flora", "flexlora"})
_VOTES = frozenset(NOT_LINEAR) - _PRODUCTS


def strategy_conflicts(plan: Plan) -> list[str]:
    """Impossible combinations of ``[aggregation]`` with itself and with other sections."""
    return [*_options(plan), *_votes(plan), *_steps(plan), *_local_head(plan)]


def _options(plan: Plan) -> list[str]:
    name, found = plan.aggregation.strategy, []
    for option, users in _OPTIONS.items():
        given = getattr(plan.aggregation, option) is not None
        if given and name not in users:
            listed = " or ".join(f"'{user}'" for user in sorted(users))
            found.append(f"aggregation.{option}: only for strategy {listed}; remove it")
        if not given and name in users:
            found.append(f"aggregation.{option}: needed by strategy '{name}'")
    return found


def _votes(plan: Plan) -> list[str]:
    aggregation, found = plan.aggregation, []
    name, liars, sites = aggregation.strategy, aggregation.byzantine, plan.rounds.min_sites
    if name in _VOTES and aggregation.weights != "equal":
        found.append(
            f"aggregation.weights: must be 'equal' with strategy '{name}', which gives every site one "
            "vote: a site that lies would declare the most units"
        )
    if liars is None:
        return found
    least = 4 * liars + 3 if name == "bulyan" else 2 * liars + 3
    if sites < least:
        found.append(
            f"rounds.min_sites: strategy '{name}' needs {least} sites to withstand {liars}, not {sites}"
        )
    if aggregation.selected is not None and aggregation.selected > sites - liars:
        found.append(
            f"aggregation.selected: at most {sites - liars}, which is rounds.min_sites without the "
            f"{liars} that may lie"
        )
    return found


def _steps(plan: Plan) -> list[str]:
    name, server, found = plan.aggregation.strategy, plan.optimizer.server.name, []
    if plan.sends_sums:
        if name in _PRODUCTS:
            found.append(
                f"aggregation.strategy: with rounds.local_steps = 1 sites send gradients, whose mean is "
                f"exact; '{name}' has nothing to mend. Use 'fedavg', or more local steps"
            )
        if name == "scaffold":
            found.append(
                "aggregation.strategy: with rounds.local_steps = 1 no site drifts; 'scaffold' has "
                "nothing to correct. Use 'fedavg', or more local steps"
            )
        if plan.optimizer.site.prox:
            found.append(
                "optimizer.site.prox: with rounds.local_steps = 1 the one step starts at the global "
                "adapter, where the proximal term is zero; remove it"
            )
    elif name in _PRODUCTS | {"scaffold"} and server != "none":
        reason = (
            "whose new adapter is no step from the old one"
            if name in _PRODUCTS
            else "whose sites read the common control variate off the change of the adapter"
        )
        found.append(f"optimizer.server.name: must be 'none' with strategy '{name}', {reason}")
    if name == "scaffold" and plan.optimizer.site.local != "sgd":
        found.append(
            "optimizer.site.local: must be 'sgd' with strategy 'scaffold': its control variates are "
            "changes divided by the step size, which Adam doesn't have"
        )
    return found


def _local_head(plan: Plan) -> list[str]:
    if plan.aggregation.head == "shared":
        return []
    found = []
    if plan.model.task == "causal_lm":
        found.append("aggregation.head: causal_lm has no head to keep; remove it")
    if plan.optimizer.site.head_rounds:
        found.append(
            "optimizer.site.head_rounds: must be 0 when aggregation.head is 'local': in such a round "
            "sites would have nothing to send"
        )
    if plan.aggregation.strategy in _PRODUCTS | {"scaffold"}:
        found.append(
            f"aggregation.head: '{plan.aggregation.strategy}' has no form that keeps a part at the "
            "site; use 'shared'"
        )
    return found


def site_privacy_conflicts(plan: Plan) -> list[str]:
    """What client-level privacy needs, and what it can't go with."""
    privacy, aggregation = plan.privacy, plan.aggregation
    if privacy.mode != "site":
        return (
            []
            if privacy.site is None
            else ["privacy.site: only when privacy.mode is 'site'; remove it"]
        )
    found = []
    if privacy.site is None:
        found.append("privacy.site: needed when privacy.mode is 'site': say who adds the noise")
    elif privacy.site.quantile is not None and privacy.site.noise == "site":
        found.append(
            "privacy.site.quantile: needs noise = 'coordinator'; each site's own count would need as "
            "much noise as its update, and say nothing"
        )
    if not isinstance(privacy.clip, float | None):
        found.append("privacy.clip: give one number when privacy.mode is 'site'")
    if plan.sends_sums:
        found.append(
            "rounds.local_steps: at least 2 when privacy.mode is 'site', where whole changes of a site "
            "are clipped"
        )
    if aggregation.weights != "equal":
        found.append(
            "aggregation.weights: must be 'equal' when privacy.mode is 'site': a weight would scale "
            "what one site can do"
        )
    if aggregation.secure:
        found.append(
            "aggregation.secure: not with privacy.mode 'site': the noise on a sum of whole numbers is "
            "that of clipped gradients, not of clipped changes"
        )
    if reason := _NOT_BY_SITE.get(aggregation.strategy, NOT_LINEAR.get(aggregation.strategy)):
        found.append(
            f"aggregation.strategy: '{aggregation.strategy}' does not go with privacy.mode 'site', "
            f"which hides one site in a plain mean: {reason}"
        )
    return found


_NOT_BY_SITE: Mapping[str, str] = {
    "scaffold": "the sites' control variates are of changes before clipping, and would not add up",
    "norm_bound": "privacy.clip bounds the norms already; use 'fedavg'",
}

"""What a plan comes to at one site: noise, and the events it will cost."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.client.errors import DeltaTooLarge
from silotune.data.site import DatasetConfig, SiteConfig
from silotune.errors import BudgetExceeded
from silotune.models.layout import Part, Span, laid_out
from silotune.plan.plan import Plan
from silotune.plan.voted import blocks_at
from silotune.privacy.costs import calibrate
from silotune.privacy.events import DpEvent, gaussian_event, shared_step_event, step_event
from silotune.privacy.ledger import Budget
from silotune.privacy.tally import Tally, epsilon_of, tally_of, total
from silotune.strategies import method_of
from silotune.strategies.secure import shared_noise

_log = logging.getLogger(__name__)

_ALL_OTHERS = 1 << 30  # more than share any noise
_MOST_DRAWN, _MORE_DRAWN = 4.0, 16.0  # times the expected batch, and more


def metric_releases(plan: Plan) -> int:
    """How often a private plan releases metrics."""
    every = plan.rounds.evaluate_every
    return plan.rounds.number // every if every and plan.privacy.metrics_share else 0


def metric_sigma(plan: Plan) -> float:
    """Noise multiplier of a metric release: all of them together cost metrics_share of epsilon."""
    privacy = plan.privacy
    assert privacy.epsilon is not None and privacy.delta is not None
    return calibrate(
        epsilon=privacy.epsilon * privacy.metrics_share,
        delta=privacy.delta,
        rate=1.0,
        steps=metric_releases(plan),
    )


def sigma_for(plan: Plan, declared_units: int) -> float:
    """Noise multiplier of a training step, so that the whole run costs the plan's epsilon.

    Raises
    ------
    CalibrationImpossible
        No noise reaches it.
    """
    privacy = plan.privacy
    assert privacy.epsilon is not None and privacy.delta is not None
    return calibrate(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        rate=plan.release_rate(declared_units),
        steps=plan.releases,
        extra=tuple(_metric_events(plan)),
    )


def run_events(plan: Plan, declared_units: int, *, sigma: float) -> list[DpEvent]:
    """Every event of a whole run at a site, which its ledger reserves."""
    steps = training_event(plan, declared_units, sigma=sigma, steps=plan.releases)
    return [steps, *_metric_events(plan)]


def budget_for(plan: Plan, site: SiteConfig, dataset: DatasetConfig) -> Budget:
    """What a dataset's ledger may reach with a private plan: the tighter of budget and policy.

    Raises
    ------
    BudgetExceeded
        The dataset has no budget, or one for a smaller delta than the plan's.
    """
    delta = plan.privacy.delta
    assert delta is not None  # validated with the plan
    limit = dataset.budget
    if limit is None:
        raise BudgetExceeded(
            f"site.toml gives dataset {plan.data.dataset!r} no budget",
            remedy="Add [datasets.NAME.budget] with epsilon and delta to site.toml.",
        )
    if delta > limit.delta:
        raise BudgetExceeded(
            f"the plan's delta is {delta:g}, the site's budget has {limit.delta:g}"
        )
    policy = site.policy
    most = policy.max_total_epsilon if policy and policy.max_total_epsilon else limit.epsilon
    return Budget(epsilon=min(limit.epsilon, most), delta=delta)


def large_delta(plan: Plan, declared_units: int) -> bool:
    """Whether handing out one whole record in `declared_units` at random would pass the plan's delta."""
    delta = plan.privacy.delta
    return plan.private and delta is not None and delta * declared_units >= 1.0


def delta_notes(plan: Plan, site: SiteConfig) -> list[str]:
    """What is to be said of the plan's delta at a site, in a sentence; nothing if it is small."""
    delta, units = plan.privacy.delta, site.dataset(plan.data.dataset).declared_units
    if not plan.private or delta is None or delta * units * 10.0 <= 1.0:
        return []
    if large_delta(plan, units):
        return [
            f"delta {delta:g} is at or above 1/{units} at {site.name}: a mechanism that hands out whole "
            "records could pass it; a site refuses unless its policy has allow_large_delta = true"
        ]
    return [
        f"delta {delta:g} is above a tenth of 1/{units} at {site.name}: {0.1 / units:.1g} or less is "
        "usual for so many units"
    ]


def require_small_delta(plan: Plan, site: SiteConfig) -> None:
    """Refuse a delta at or above 1/declared_units unless the policy says otherwise in so many words.

    Raises
    ------
    DeltaTooLarge
        It is, and the policy does not.
    """
    allowed = site.policy is not None and site.policy.allow_large_delta
    if large_delta(plan, site.dataset(plan.data.dataset).declared_units) and not allowed:
        raise DeltaTooLarge("; ".join(delta_notes(plan, site)))


def require_uncolluding(
    charged: Sequence[DpEvent | Tally], *, dataset: DatasetConfig, delta: float
) -> None:
    """Refuse what a site's own noise alone would not protect well enough.

    Parameters
    ----------
    charged : sequence of DpEvent or Tally
        What is asked, and what other runs charged or may charge.
    dataset : DatasetConfig
        Its budget may limit epsilon to a coordinator that all other sites collude with.

    Raises
    ------
    BudgetExceeded
    """
    limit = dataset.budget.colluding_epsilon if dataset.budget else None
    if limit is None:
        return
    tallies = [part if isinstance(part, Counter) else tally_of(part) for part in charged]
    reached = epsilon_of(total(tallies), delta=delta, colluding=_ALL_OTHERS)
    if reached > limit:
        raise BudgetExceeded(
            f"to a coordinator that all other sites collude with, epsilon would be {reached:.4f}; "
            f"budget.colluding_epsilon is {limit:.4f}",
            remedy="Use privacy.noise = 'local', or a smaller aggregation.threshold or epsilon.",
        )


def training_event(plan: Plan, declared_units: int, *, sigma: float, steps: int) -> DpEvent:
    """What some training steps at a site cost: the central mechanism, if the noise is shared."""
    rate, shared = plan.release_rate(declared_units), shared_noise(plan)
    if shared is None:
        return step_event(rate=rate, sigma=sigma, steps=steps)
    return shared_step_event(
        rate=rate,
        sigma=sigma,
        steps=steps,
        sharers=shared.sharers,
        tolerated=shared.tolerated,
    )


def round_event(plan: Plan, declared_units: int, *, sigma: float) -> DpEvent | None:
    """What a round's update costs, whatever comes of it; None without privacy.

    Under correlated noise that is what the round's whole block costs, charged once for all of it.
    """
    if not plan.private:
        return None
    return training_event(plan, declared_units, sigma=sigma, steps=plan.releases_a_round)


def missing_noise(plan: Plan, parts: Iterable[Part], *, sigma: float) -> dict[Part, float]:
    """Standard deviation of the fresh noise that a round's clipped sums still lack, by part.

    Sums of one step leave the training as they are clipped, and get their noise next to the ledger: a
    site's share of it in the ring of secure aggregation, or all of it. Empty where the training itself
    has to add it, because it goes on from noisy sums: with several local steps, or with parts that stay
    at the site.

    Parameters
    ----------
    plan : Plan
        What is trained.
    parts : iterable of Part
        Of the adapter, that the round trains.
    sigma : float
        Noise multiplier of the whole.
    """
    if not (plan.per_unit and plan.sends_sums) or method_of(plan).kept(plan):
        return {}
    shared, clipping, found = shared_noise(plan), plan.privacy.clipping, sorted(set(parts))
    own = sigma / math.sqrt(shared.sharers) if shared else sigma
    own *= math.hypot(*plan.privacy.column)  # a unit moves so many rows of C G
    if plan.only_sums:
        return dict.fromkeys(found, own)  # of what one unit moves by a length of 1
    alone = len({clipping.group(part) for part in found}) == 1  # it has all of the sensitivity
    return {
        part: own * clipping.of(part).norm / math.sqrt(1.0 if alone else clipping.of(part).share)
        for part in found
    }


def shortened_sums(
    plan: Plan, sums: NDArray[Any], spans: Sequence[Span], *, declared_units: int
) -> NDArray[Any]:
    """Clipped sums, none longer than of far more units than a step draws, whoever summed them up.

    Votes are none longer than of all blocks.

    Each group is projected onto a ball. That brings two sums no further apart, so that what hides one
    unit still does.

    Parameters
    ----------
    plan : Plan
        Whose clip norms they have.
    sums : float64 array
        Of the spans, one after the other; changed in place.
    spans : sequence of Span
        What they are of.
    declared_units : int
        The site's.
    """
    clipping, counted = plan.privacy.clipping, plan.only_sums
    most = _most_added(plan, declared_units)
    groups: dict[str, list[slice]] = {}
    for span, place in laid_out(spans):
        groups.setdefault("sums" if counted else clipping.group(span.part), []).append(place)
    for group, places in groups.items():
        norm_of_one = 1.0 if counted else clipping.bounds[group].norm
        longest = most * norm_of_one
        norm = math.hypot(*(float(np.linalg.norm(sums[place])) for place in places))
        if norm > longest:
            _log.warning("a gradient sum of the %s was far too long; shortened", group)
            for place in places:
                sums[place] *= longest / norm
    return sums


def _most_added(plan: Plan, declared_units: int) -> float:
    """How often the most that one unit adds can be in a sum."""
    if plan.vote is not None:
        return blocks_at(plan, declared_units)  # one vote each, which is shorter
    drawn = declared_units if plan.only_sums else plan.expected_batch(declared_units)
    return _MOST_DRAWN * drawn + _MORE_DRAWN


def _metric_events(plan: Plan) -> list[DpEvent]:
    return (
        [gaussian_event(metric_sigma(plan))] * metric_releases(plan)
        if metric_releases(plan)
        else []
    )

"""A proposed plan as its readers need it: what leaves, what it costs, the verdict, what changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from silotune.client.approvals import Approvals, ProposalRecord, difference
from silotune.client.judging import knows_base, verdict_on
from silotune.client.policy import PlanVerdict, total_epsilon
from silotune.client.terms import delta_notes
from silotune.data.checks import notes_on_sites, survey
from silotune.data.declared import secret_for_a_look
from silotune.data.site import SiteConfig
from silotune.errors import SilotuneError
from silotune.models.base import outline, require_taken
from silotune.models.layout import Layout, statistics_layout
from silotune.plan.plan import Plan, candidates_of, plan_in_words
from silotune.privacy.ledger import find_ledger


@dataclass(frozen=True, kw_only=True)
class PlanSpending:
    """Epsilon of the plan's dataset, at the plan's delta.

    Attributes
    ----------
    now : float
        Spent and reserved by other runs.
    after : float
        With the whole of this run.
    budget : float or None
        What the dataset may reach, by its budget and by the policy; None if site.toml gives none.
    """

    now: float
    after: float
    budget: float | None

    @property
    def left(self) -> float | None:
        """What would be left for later runs."""
        return None if self.budget is None else max(0.0, self.budget - self.after)


def judge_proposal(site: SiteConfig, entry: ProposalRecord) -> PlanVerdict:
    """The policy's verdict on a proposal that can be served here.

    Raises
    ------
    SilotuneError
        The plan can't be judged or served here: unknown dataset, a model that does not take it.
    """
    verdict = _verdict(site, entry)
    if verdict.allowed:
        require_servable(site, entry.plan)
    return verdict


def require_servable(site: SiteConfig, plan: Plan) -> None:
    """Check that the base model, if the policy knows it, can be trained as the plan says.

    Raises
    ------
    ModelError
        Of some kind, with the number, the nearest name or the layer.
    """
    if plan.statistics is not None:
        return
    if knows_base(site, plan):
        tried = plan if plan.vote is None else candidates_of(plan)[0]
        require_taken(tried, base=site.model_place(plan))


def _verdict(site: SiteConfig, entry: ProposalRecord) -> PlanVerdict:
    return verdict_on(site, entry, layout_at(site, entry.plan.model.sha256, entry))


def layout_at(site: SiteConfig, sha256: str | None, entry: ProposalRecord) -> Layout | None:
    """The adapter's layout, if the policy knows the base model; else nothing is looked at."""
    if entry.plan.only_sums:
        return statistics_layout(entry.plan)
    if site.policy is None or sha256 not in site.policy.base_models:
        return None
    return outline(entry.plan, base=site.model_place(entry.plan))


def spending(site: SiteConfig, entry: ProposalRecord) -> PlanSpending | None:
    """What the run would do to the dataset's budget; None for a plan without privacy."""
    plan = entry.plan
    if not plan.private or plan.privacy.delta is None:
        return None
    from silotune.privacy.tally import epsilon_of, total

    ledger = find_ledger(site.state_folder)
    name = plan.data.dataset
    others = [] if ledger is None else [a for a in ledger.runs(name) if a.run != entry.run]
    budget, policy = site.dataset(name).budget, site.policy
    limits = [budget.epsilon] if budget else []
    limits += [policy.max_total_epsilon] if policy and policy.max_total_epsilon else []
    return PlanSpending(
        now=epsilon_of(total(a.committed for a in others), delta=plan.privacy.delta),
        after=total_epsilon(site, plan, run=entry.run, ledger=ledger),
        budget=min(limits, default=None),
    )


def describe(site: SiteConfig, entry: ProposalRecord, approvals: Approvals) -> dict[str, Any]:
    """Everything about a proposal, as JSON values.

    What can't be worked out here is None or empty, with the reason under ``problem``.
    """
    plan, proposal = entry.plan, entry.proposal
    found: dict[str, Any] = {
        "run": entry.run,
        "state": entry.state,
        "name": plan.plan.name,
        "plan_sha256": plan.sha256,
        "proposed_at": proposal.proposed_at,
        "signed_by": proposal.plan.key,
        "reason": entry.decision.reason if entry.decision else "",
        "words": plan_in_words(plan),
        "leaves": None,
        "spending": None,
        "verdict": [],
        "allowed": False,
        "problem": "",
    }
    try:
        verdict = _verdict(site, entry) if site.policy else PlanVerdict(())
        found["verdict"] = [
            {"clause": c.name, "allowed": c.allowed, "reason": c.reason, "code": c.error.code}
            for c in verdict.clauses
        ]
        require_servable(site, plan)
        found["allowed"] = bool(verdict.clauses) and verdict.allowed
        found["leaves"] = _leaves(layout_at(site, plan.model.sha256, entry))
        spent = spending(site, entry)
        found["spending"] = spent and {**vars(spent), "left": spent.left}
    except SilotuneError as exc:
        found["problem"] = str(exc)
    before = approvals.last_approved(but=entry.run)
    found["compared_with"] = before.run if before else None
    found["changes"] = [
        {"key": key, "old": old, "new": new}
        for key, old, new in (difference(before.plan, plan) if before else [])
    ]
    return found


def records_in_words(site: SiteConfig, plan: Plan) -> list[str]:
    """What the plan makes of this site's records, in sentences for its own team alone.

    They are read here and now. Look-alikes are counted on a split of the same shares.
    """
    roles, secrets = plan.roles, {site.name: secret_for_a_look(site, os.urandom(32))}
    found = survey([site], plan, roles=roles, secrets=secrets)
    own = [] if plan.data.dataset not in site.datasets else delta_notes(plan, site)
    return [*notes_on_sites(found, split_by=plan.data.split_by), *own]


def _leaves(layout: Layout | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    return {
        "bytes": layout.nbytes,
        "tensors": [{"name": e.name, "shape": list(e.shape)} for e in layout.entries],
    }

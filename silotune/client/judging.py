"""A site's judgement of a proposal, from what is declared and from the base model: no record is read."""

from __future__ import annotations

from datetime import datetime

from silotune.client.approvals import ProposalRecord
from silotune.client.policy import PlanVerdict, facts_for, judge
from silotune.client.training.base import Trainers, TrainingJob
from silotune.data.declared import require_declared
from silotune.data.site import SiteConfig
from silotune.models.layout import Layout
from silotune.plan.plan import Plan
from silotune.privacy.ledger import find_ledger


def local_time() -> datetime:
    """Now, in the machine's time zone: what a policy's hours are compared with."""
    return datetime.now().astimezone()


def knows_base(site: SiteConfig, plan: Plan) -> bool:
    """Whether the site's policy lists the plan's base model."""
    return site.policy is not None and plan.model.sha256 in site.policy.base_models


def verdict_on(site: SiteConfig, entry: ProposalRecord, layout: Layout | None) -> PlanVerdict:
    """What the policy says; hours don't count before the training itself.

    Parameters
    ----------
    site : SiteConfig
        With a policy.
    entry : ProposalRecord
        What is proposed.
    layout : Layout or None
        The adapter's, if the policy knows the base model.

    Raises
    ------
    SilotuneError
        The plan asks for a dataset, unit or label that the site doesn't declare.
    """
    assert site.policy is not None  # whoever asks has seen to it
    require_declared(site, entry.plan, roles=entry.plan.roles)
    facts = facts_for(
        site,
        entry.plan,
        run=entry.run,
        ledger=find_ledger(site.state_folder),
        layout=layout,
        moment=local_time(),
    )
    verdict = judge(site.policy, entry.plan, facts)
    return PlanVerdict(tuple(clause for clause in verdict.clauses if clause.name != "hours"))


def judge_apart(site: SiteConfig, entry: ProposalRecord, *, trainers: Trainers) -> PlanVerdict:
    """The verdict of a site whose models are loaded in other processes, and whether one takes the plan.

    Raises
    ------
    SilotuneError
        The plan can't be judged or served here.
    """
    plan = entry.plan
    training = trainers.training(
        TrainingJob(
            site=site,
            plan=plan,
            base=site.model_place(plan),
            rank=plan.lora.r,
            sigma=lambda: 0.0,
            secret=lambda: b"",
            on_records=lambda found: None,
        )
    )
    try:
        known = knows_base(site, plan) or plan.statistics is not None
        verdict = verdict_on(site, entry, training.layout() if known else None)
        if verdict.allowed and known:
            training.loaded()
        return verdict
    finally:
        training.close()

"""What a site knows when it judges a plan: what would leave, and where the ledger would be."""

from __future__ import annotations

from datetime import datetime

from dp_accounting import ComposedDpEvent

from silotune.client.policy import Facts
from silotune.client.terms import run_events, sigma_for
from silotune.data.site import SiteConfig
from silotune.models.layout import Layout
from silotune.plan import Plan
from silotune.privacy.ledger import Ledger
from silotune.privacy.tally import epsilon_of, tally_of, total


def facts_for(
    site: SiteConfig,
    plan: Plan,
    *,
    run: str,
    ledger: Ledger | None,
    layout: Layout | None,
    moment: datetime,
) -> Facts:
    """Facts about a plan at a site, before or during its run.

    Parameters
    ----------
    site : SiteConfig
        Whose policy will judge.
    plan : Plan
        What is asked.
    run : str
        The run's name; what it has reserved itself is not counted twice.
    ledger : Ledger or None
        The site's; None if it is empty, or if the plan has no privacy.
    layout : Layout or None
        Of the adapter; None if it can't be told.
    moment : datetime
        Now, local time.

    Raises
    ------
    DatasetUnknown
        The site doesn't offer the plan's dataset.
    CalibrationImpossible
        No noise reaches the plan's epsilon.
    """
    upload = None if layout is None else layout.nbytes
    reached = total_epsilon(site, plan, run=run, ledger=ledger) if plan.private else None
    return Facts(
        moment=moment,
        upload_bytes=upload,
        total_epsilon=reached,
        declared_units=site.dataset(plan.data.dataset).declared_units,
    )


def total_epsilon(site: SiteConfig, plan: Plan, *, run: str, ledger: Ledger | None) -> float:
    """Epsilon of all the dataset's runs, reservations included, with the whole of this one."""
    name = plan.data.dataset
    declared = site.dataset(name).declared_units
    assert plan.privacy.delta is not None  # a validated private plan has it
    events = run_events(plan, declared, sigma=sigma_for(plan, declared))
    accounts = [] if ledger is None else ledger.runs(name)
    others = total(account.committed for account in accounts if account.run != run)
    return epsilon_of(others + tally_of(ComposedDpEvent(events)), delta=plan.privacy.delta)

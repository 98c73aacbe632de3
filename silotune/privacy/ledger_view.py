"""A ledger as people and pages see it: rows of plain values, by dataset and by run."""

from __future__ import annotations

from typing import Any

from silotune.privacy.ledger import Ledger
from silotune.privacy.tally import epsilon_of, total


def dataset_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """One row a dataset: what is spent and reserved, of which budget.

    Epsilon is taken at the delta of the dataset's newest budget. ``left`` is what the budget has
    above charges and open reservations together.
    """
    return [_dataset_row(ledger, name) for name in {a.dataset: None for a in ledger.runs()}]


def run_rows(ledger: Ledger) -> list[dict[str, Any]]:
    """One row a run and dataset: its plan, releases and epsilon of its own."""
    return [
        {
            "dataset": account.dataset,
            "run": account.run,
            "plan_sha256": account.plan_sha256,
            "state": "open" if account.open else "settled",
            "releases": account.charges,
            "epsilon": epsilon_of(account.charged, delta=account.budget.delta),
            "epsilon_reserved": epsilon_of(account.reserved, delta=account.budget.delta),
            "delta": account.budget.delta,
        }
        for account in ledger.runs()
    ]


def _dataset_row(ledger: Ledger, name: str) -> dict[str, Any]:
    accounts = ledger.runs(name)
    budget = accounts[-1].budget  # of the newest reservation
    committed = epsilon_of(total(a.committed for a in accounts), delta=budget.delta)
    return {
        "dataset": name,
        "delta": budget.delta,
        "epsilon_spent": epsilon_of(total(a.charged for a in accounts), delta=budget.delta),
        "epsilon_committed": committed,
        "epsilon_budget": budget.epsilon,
        "left": max(0.0, budget.epsilon - committed),
        "runs": len(accounts),
        "releases": sum(a.charges for a in accounts),
    }

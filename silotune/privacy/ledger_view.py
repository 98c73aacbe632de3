"""A ledger as plain rows, for tables and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from silotune.privacy.ledger import Ledger
from silotune.privacy.tally import epsilon_of, total

LEDGER_FILE = "ledger.sqlite"
"""Name of the ledger in a site's state folder."""


def open_ledger(place: Path) -> Ledger:
    """The ledger at a file, or in a site's state folder; it must be there.

    Raises
    ------
    LedgerDamaged
        No ledger there, or not a whole one.
    """
    return Ledger(place / LEDGER_FILE if place.is_dir() else place, create=False)


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


def verification(ledger: Ledger) -> dict[str, Any]:
    """Check the whole ledger and say what was checked. Raises `LedgerDamaged`."""
    head = ledger.verify()
    return {"path": str(ledger.path), "rows": head.seq, "head": head.hash, "intact": True}


def entries(ledger: Ledger) -> list[dict[str, str | int | None]]:
    """Every row as it is stored, oldest first."""
    return [row.as_dict() for row in ledger.rows()]


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

"""A ledger as plain rows, for tables and JSON.

What each site has spent so far, cheap enough for every round.

Certified points of the run's curve are computed once for each kind of site; between two of them
the later one is given, so the number shown is never below the truth and always within the curve.
"""

from __future__ import annotations

import bisect
from collections import Counter
from pathlib import Path
from typing import Any

from silotune.privacy.ledger import Ledger
from silotune.privacy.tally import epsilon_of, total
from silotune.trust.chain import Value

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


def entries(ledger: Ledger) -> list[dict[str, Value]]:
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


_POINTS = 16

_Mechanism = tuple[float, float]


class LiveEpsilon:
    """Epsilon of each site after the rounds it replied in.

    Parameters
    ----------
    delta : float
        The plan's.
    rounds : int
        Rounds of the whole run.
    local_steps : int
        Noisy steps that a site takes in a round.
    """

    def __init__(self, *, delta: float, rounds: int, local_steps: int) -> None:
        self._delta, self._rounds, self._local_steps = delta, rounds, local_steps
        self._mechanism: dict[str, _Mechanism] = {}
        self._replies: Counter[str] = Counter()
        self._curves: dict[_Mechanism, list[tuple[int, float]]] = {}

    def joined(self, site: str, *, rate: float, sigma: float) -> None:
        """A site takes part with this sampling rate and noise multiplier."""
        self._mechanism[site] = (rate, sigma)

    def replied(self, site: str) -> None:
        """A site released a round's update."""
        self._replies[site] += 1

    def spent(self) -> dict[str, float]:
        """An upper bound of epsilon, by site; sites that released nothing are left out."""
        return {
            site: self._after(mechanism, self._replies[site])
            for site, mechanism in self._mechanism.items()
            if self._replies[site]
        }

    def _after(self, mechanism: _Mechanism, rounds: int) -> float:
        if mechanism not in self._curves:
            # Here, because it takes seconds to import and a finished run's report needs none of it.
            from silotune.privacy.accounting import epsilon_curve
            from silotune.privacy.events import step_event

            rate, sigma = mechanism
            self._curves[mechanism] = epsilon_curve(
                step_event(rate=rate, sigma=sigma, steps=self._local_steps),
                rounds=self._rounds,
                points=_POINTS,
                delta=self._delta,
            )
        curve = self._curves[mechanism]
        place = bisect.bisect_left([number for number, _ in curve], rounds)
        return curve[min(place, len(curve) - 1)][1]

"""Which sites a round asks, where the plan asks some of the run's only (``rounds.sites``).

Every site of the run gets a number for each round, a hash of a key, the round and its name, and those of
the smallest numbers are asked: a uniform draw without replacement, anew in each round. The key is the
plan's seed, or without one the run's name and the plan's hash. Nothing has to be kept: a process that
goes on with a run asks the same sites again, and where a site is gone one other is asked instead of it.
Whoever reads a run's events can check its draws. Nothing rests on their being secret: the coordinator
could ask whom it likes, so no guarantee counts on chance here.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection

from silotune.plan.plan import Plan


def drawn(plan: Plan, *, run: str, server_round: int, sites: Collection[str]) -> frozenset[str]:
    """Sites that a round (from 1) asks, of those in the run; all of them if the plan draws none.

    Parameters
    ----------
    plan : Plan
        ``rounds.sites`` says how many.
    run : str
        The run's name.
    server_round : int
        From 1.
    sites : collection of str
        Names of those in the run.
    """
    if plan.rounds.sites is None or len(sites) <= plan.rounds.sites:
        return frozenset(sites)
    seed = plan.plan.seed
    key = f"{run} {plan.sha256}" if seed is None else f"{seed}"
    start = hashlib.sha256(f"{key}\n{server_round}\n".encode())

    def number(site: str) -> bytes:
        own = start.copy()
        own.update(site.encode())
        return own.digest()

    return frozenset(heapq.nsmallest(plan.rounds.sites, sites, key=number))

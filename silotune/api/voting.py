"""Votes on settings of a plan: the plan by which sites choose among fixed candidates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from silotune.errors import PlanInvalid
from silotune.plan.plan import Plan
from silotune.plan.ranges import Range
from silotune.plan.voted import vote_tables


def vote_of(
    plan: Plan, vary: Sequence[str], *, epsilon: float, block_units: int, units: int
) -> Plan:
    """The plan of a vote among all combinations of values. Raises `PlanInvalid`."""
    if plan.only_sums:
        raise PlanInvalid(f"{plan.plan.name} trains nothing: give the plan that is to be trained")
    candidates = combinations(vary)
    tables = vote_tables(plan, candidates, epsilon=epsilon, units=units, block_units=block_units)
    return Plan.from_mapping(tables, source="the vote")


def combinations(vary: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of ``key=value,value``. Raises `PlanInvalid`."""
    ranges = [Range.parse(text) for text in vary]
    if not ranges:
        raise PlanInvalid("candidates of a vote are fixed: give --vary key=value,value")
    for each in ranges:
        if not each.choices:
            raise PlanInvalid(
                f"--vary {each}: candidates of a vote are fixed; name them: {each.key}=value,value"
            )
    return [
        dict(zip((each.key for each in ranges), values, strict=True))
        for values in itertools.product(*(each.choices for each in ranges))
    ]

"""Aggregation methods: how the sites' updates become the next adapter."""

from __future__ import annotations

from collections.abc import Mapping

from silotune.plan import Plan
from silotune.strategies.base import AdapterStrategy
from silotune.strategies.fedavg import FedAvg
from silotune.strategies.server_optimizer import Group

_STRATEGIES: dict[str, type[AdapterStrategy]] = {"fedavg": FedAvg}


def strategy_for(plan: Plan, *, slices: Mapping[Group, slice], size: int) -> AdapterStrategy:
    """The strategy that the plan names, for an adapter of this size and these groups."""
    return _STRATEGIES[plan.aggregation.strategy](plan, slices=slices, size=size)

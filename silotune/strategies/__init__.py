"""Aggregation methods: how the sites' updates become the next adapter."""

from __future__ import annotations

from silotune.models.layout import Layout
from silotune.plan import Plan
from silotune.strategies.base import AdapterStrategy
from silotune.strategies.fedavg import FedAvg

_STRATEGIES: dict[str, type[AdapterStrategy]] = {"fedavg": FedAvg}


def method_of(plan: Plan) -> type[AdapterStrategy]:
    """The class of the plan's strategy: what sites train, send and keep, and whether it is linear."""
    return _STRATEGIES[plan.aggregation.strategy]


def strategy_for(plan: Plan, *, layout: Layout) -> AdapterStrategy:
    """The strategy that the plan names, for a global adapter of this layout."""
    return method_of(plan)(plan, layout=layout)

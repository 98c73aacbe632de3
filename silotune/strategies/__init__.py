"""Aggregation methods: how the sites' updates become the next adapter."""

from __future__ import annotations

from importlib import import_module

from silotune.models.layout import Layout
from silotune.plan.plan import Plan
from silotune.strategies.base import AdapterStrategy


def method_of(plan: Plan) -> type[AdapterStrategy]:
    """The class of the plan's strategy: what sites train, send and keep."""
    module, name = plan.strategy.made_by.split(":")
    found: type[AdapterStrategy] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def strategy_for(plan: Plan, *, layout: Layout) -> AdapterStrategy:
    """The strategy that the plan names, for a global adapter of this layout."""
    return method_of(plan)(plan, layout=layout)

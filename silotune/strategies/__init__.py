"""Aggregation methods: how the sites' updates become the next adapter."""

from __future__ import annotations

from silotune.models.layout import Layout
from silotune.plan import Plan
from silotune.strategies.base import AdapterStrategy
from silotune.strategies.bulyan import Bulyan
from silotune.strategies.fedavg import FedAvg
from silotune.strategies.fedex import ExactResidual
from silotune.strategies.fedsa import KeptB
from silotune.strategies.fedsvd import Refactored
from silotune.strategies.ffa import FrozenA
from silotune.strategies.flexlora import Redistributed
from silotune.strategies.flora import Stacking
from silotune.strategies.geometric_median import GeometricMedian
from silotune.strategies.krum import Krum, MultiKrum
from silotune.strategies.median import Median
from silotune.strategies.norm_bound import NormBound
from silotune.strategies.rolora import Alternating
from silotune.strategies.scaffold import Scaffold
from silotune.strategies.trimmed_mean import TrimmedMean

STRATEGIES: dict[str, type[AdapterStrategy]] = {
    "fedavg": FedAvg,
    "ffa": FrozenA,
    "rolora": Alternating,
    "fedsvd": Refactored,
    "fedex": ExactResidual,
    "flora": Stacking,
    "flexlora": Redistributed,
    "fedsa": KeptB,
    "scaffold": Scaffold,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "geometric_median": GeometricMedian,
    "bulyan": Bulyan,
    "norm_bound": NormBound,
}
"""Every strategy by its name in a plan."""


def method_of(plan: Plan) -> type[AdapterStrategy]:
    """The class of the plan's strategy: what sites train, send and keep, and whether it is linear."""
    return STRATEGIES[plan.aggregation.strategy]


def strategy_for(plan: Plan, *, layout: Layout) -> AdapterStrategy:
    """The strategy that the plan names, for a global adapter of this layout."""
    return method_of(plan)(plan, layout=layout)

"""The strategies that a plan may name, in one table that plans, sites and the coordinator all ask.

A new strategy is its file in `silotune.strategies`, its line in `STRATEGIES` and its test. The line
names the class and does not import it: whoever reads a plan needs none of the libraries behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_VOTE = "it compares the sites' updates with each other"
_TURNED = "which factors each product BA anew: the matrices of two rounds are in other coordinates"


@dataclass(frozen=True, kw_only=True)
class StrategyFacts:
    """What a strategy is, and what it can't go with.

    Reasons complete a sentence of `silotune.plan.rules`.

    Attributes
    ----------
    made_by : str
        ``module:Class`` in `silotune.strategies`.
    needs_each : str or None
        Why it needs each site's update; None for linear ones, which work on a weighted sum alone.
    one_vote : bool
        Whether every site counts the same, whatever it declares.
    options : frozenset of str
        Keys of ``[aggregation]`` that it needs and no other strategy has.
    sends_all : bool
        Whether sites send the sum of all the gradients that they train with, unchanged.
    sends_same : bool
        Whether all rounds that train the same parts send the same numbers, unchanged, and are added up.
    freezes_a : bool
        Whether A is no part of the adapter that travels.
    ranks : bool
        Whether sites may have adapters of a smaller rank than the plan's.
    keeps_parts : bool
        Whether it has a form in which a part of the adapter stays at each site.
    idle_in_one_step : str or None
        Why it has nothing to do where sites take one local step.
    no_server_optimizer : str or None
        Why there can be no optimizer at the server.
    needs_sgd : str or None
        Why local steps must be plain SGD.
    needs_all : str or None
        Why every site must be asked in every round.
    turns_matrices : str or None
        Why the matrices of two rounds can't be averaged.
    refused_by_site : str or None
        Why it does not go with ``privacy.mode = "site"``, besides not being linear.
    """

    made_by: str
    needs_each: str | None = None
    one_vote: bool = False
    options: frozenset[str] = frozenset()
    sends_all: bool = False
    sends_same: bool = False
    freezes_a: bool = False
    ranks: bool = False
    keeps_parts: bool = True
    idle_in_one_step: str | None = None
    no_server_optimizer: str | None = None
    needs_sgd: str | None = None
    needs_all: str | None = None
    turns_matrices: str | None = None
    refused_by_site: str | None = None

    @property
    def linear(self) -> bool:
        """Whether its aggregate is a function of the weighted sum of the updates."""
        return self.needs_each is None


STRATEGIES: Mapping[str, StrategyFacts] = {
    "fedavg": StrategyFacts(made_by="fedavg:FedAvg", sends_all=True, sends_same=True),
    "ffa": StrategyFacts(made_by="ffa:FrozenA", sends_all=True, sends_same=True, freezes_a=True),
    "rolora": StrategyFacts(made_by="rolora:Alternating", sends_all=True),
    "fedsvd": StrategyFacts(made_by="fedsvd:Refactored", sends_all=True, turns_matrices=_TURNED),
    "flexlora": StrategyFacts(
        made_by="flexlora:Redistributed",
        needs_each=(
            "it averages the products B_k A_k, which the coordinator computes from each site's update"
        ),
        ranks=True,
        keeps_parts=False,
        idle_in_one_step="sites send gradients, whose mean is exact; 'flexlora' has nothing to mend",
        no_server_optimizer="whose new adapter is no step from the old one",
        turns_matrices=_TURNED,
    ),
    "fedsa": StrategyFacts(made_by="fedsa:KeptB"),
    "scaffold": StrategyFacts(
        made_by="scaffold:Scaffold",
        keeps_parts=False,
        idle_in_one_step="no site drifts; 'scaffold' has nothing to correct",
        no_server_optimizer=(
            "whose sites read the common control variate off the change of the adapter"
        ),
        needs_sgd=(
            "its control variates are changes divided by the step size, which Adam doesn't have"
        ),
        needs_all=(
            "a site corrects its steps only where it was in the round before, and would seldom be"
        ),
        refused_by_site=(
            "the sites' control variates are of changes before clipping, and would not add up"
        ),
    ),
    "median": StrategyFacts(made_by="median:Median", needs_each=_VOTE, one_vote=True),
    "trimmed_mean": StrategyFacts(
        made_by="trimmed_mean:TrimmedMean",
        needs_each=_VOTE,
        one_vote=True,
        options=frozenset({"trim"}),
    ),
    "multi_krum": StrategyFacts(
        made_by="multi_krum:MultiKrum",
        needs_each=_VOTE,
        one_vote=True,
        options=frozenset({"byzantine", "selected"}),
    ),
    "geometric_median": StrategyFacts(
        made_by="geometric_median:GeometricMedian", needs_each=_VOTE, one_vote=True
    ),
    "norm_bound": StrategyFacts(
        made_by="norm_bound:NormBound",
        options=frozenset({"bound"}),
        refused_by_site="privacy.clip bounds the norms already; use 'fedavg'",
    ),
}
"""Every strategy by its name in a plan."""

SUMS = StrategyFacts(made_by="sums:Sums", sends_all=True)
"""What adds up statistics; no plan names it."""

DROPPED: Mapping[str, str] = {
    "krum": "'multi_krum'",
    "bulyan": "'trimmed_mean' or 'multi_krum'",
    "fedex": "'flexlora'",
    "flora": "'flexlora'",
    "yogi": "'adam'",
    "adagrad": "'adam'",
}
"""Strategies and server optimizers of earlier versions, and what to use instead."""


def not_dropped(name: object) -> object:
    """A name as it is. Raises `ValueError` for one that plans could have once."""
    if isinstance(name, str) and name in DROPPED:
        raise ValueError(
            f"'{name}' was dropped: measured, it gained nothing (docs/strategies.md); "
            f"use {DROPPED[name]}"
        )
    return name

"""Optimizers at the coordinator, on the aggregate of a round: any strategy may wear any of them.

Reddi et al., "Adaptive Federated Optimization" (ICLR 2021): the aggregate is a gradient. With one
local step it is one; with several, the negative mean change of the sites stands in for it. FedAvgM
(Hsu et al., 2019) is "sgd". All are post-processing of releases.

Adam's moments start at zero and are divided by what they still lack of their weight; the paper starts
the second at tau squared and leaves the first as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from silotune.models.layout import Group, Part, Span
from silotune.plan.plan import Plan
from silotune.plan.sections import ClientOptimizer
from silotune.plan.sections import ServerOptimizerSettings as Settings

Phase = Literal["head", "adapter"]


def phase_of(plan: Plan, server_round: int) -> Phase:
    """What a round (from 1) trains: the head alone, or adapter and head together."""
    return "head" if server_round <= plan.optimizer.site.head_rounds else "adapter"


def factor(optimizer: ClientOptimizer, *, step: int, steps: int) -> float:
    """Part of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then decay."""
    warmup = optimizer.warmup_share * steps
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    done = step / steps
    if optimizer.schedule == "constant":
        return rise
    span = 1.0 - optimizer.final_share
    if optimizer.schedule == "cosine":
        return rise * (optimizer.final_share + span * (1 + math.cos(math.pi * done)) / 2)
    return rise * (1.0 - span * done)


def learning_rate(plan: Plan, group: Group, *, step: int) -> float:
    """Learning rate of a group at a step (from 0) of the whole run."""
    site = plan.optimizer.site
    peak = site.head_lr if group == "head" else site.adapter_lr
    return peak * factor(site, step=step, steps=plan.steps)


Vector = NDArray[np.float32]

_PARTS: tuple[Part, ...] = get_args(Part)


class Rule(ABC):
    """How a gradient becomes a direction; the two moments are updated in place.

    Parameters
    ----------
    settings : Settings
        ``[optimizer.server]`` of the plan.
    """

    def __init__(self, settings: Settings) -> None:
        self.beta1, self.beta2 = settings.momentum, settings.beta2
        self.epsilon = settings.epsilon

    @abstractmethod
    def direction(self, gradient: Vector, first: Vector, second: Vector, count: int) -> Vector:
        """The direction to go against, at the `count`-th step (from 1) of these coordinates."""


class Plain(Rule):
    """The aggregate as it is."""

    def direction(self, gradient: Vector, first: Vector, second: Vector, count: int) -> Vector:
        """The gradient."""
        return gradient


class Momentum(Rule):
    """SGD with heavy-ball momentum."""

    def direction(self, gradient: Vector, first: Vector, second: Vector, count: int) -> Vector:
        """The accumulated gradient."""
        first *= np.float32(self.beta1)
        first += gradient
        return first


class Adam(Rule):
    """FedAdam, with the bias corrections of Kingma and Ba (ICLR 2015)."""

    def direction(self, gradient: Vector, first: Vector, second: Vector, count: int) -> Vector:
        """The mean gradient over the root of the mean square."""
        beta1 = np.float32(self.beta1)
        first *= beta1
        first += (1 - beta1) * gradient
        beta2 = np.float32(self.beta2)
        second *= beta2
        second += (1 - beta2) * gradient * gradient
        corrected = first / np.float32(1 - self.beta1**count)
        scale = np.sqrt(second / np.float32(1 - self.beta2**count)) + np.float32(self.epsilon)
        return np.asarray(corrected / scale, dtype=np.float32)


_RULES: Mapping[str, type[Rule]] = {"none": Plain, "sgd": Momentum, "adam": Adam}


class ServerOptimizer:
    """State and step of the plan's server optimizer over a flat adapter vector.

    Parameters
    ----------
    plan : Plan
        Gives the optimizer, its constants and the learning rates of adapter and head.
    size : int
        Length of the flat vector.

    Attributes
    ----------
    counts : dict of part to int
        Each part (A, B, head) counts its own steps, so that it starts fresh after rounds that
        trained others.
    """

    def __init__(self, plan: Plan, *, size: int) -> None:
        self._plan = plan
        self._rule = _RULES[plan.optimizer.server.name](plan.optimizer.server)
        self.first = np.zeros(size, dtype=np.float32)
        self.second = np.zeros(size, dtype=np.float32)
        self.counts: dict[Part, int] = dict.fromkeys(_PARTS, 0)

    def step(
        self, adapter: Vector, gradient: Vector, spans: Sequence[Span], *, server_round: int
    ) -> Vector:
        """The next adapter.

        Parameters
        ----------
        adapter : float32 array
            The whole flat vector.
        gradient : float32 array
            The aggregate of the coordinates in `spans`, one span after the other.
        spans : sequence of Span
            What was trained.
        server_round : int
            From 1.
        """
        updated, start = adapter.copy(), 0
        self._count(span.part for span in spans)
        for span in spans:
            where, end = slice(span.start, span.stop), start + span.stop - span.start
            direction = self._rule.direction(
                gradient[start:end], self.first[where], self.second[where], self.counts[span.part]
            )
            updated[where] -= self._rate(span.part, server_round) * direction
            start = end
        return updated

    def _count(self, parts: Iterable[Part]) -> None:
        for part in set(parts):
            self.counts[part] += 1

    def _rate(self, part: Part, server_round: int) -> np.float32:
        own = self._plan.optimizer.server.lr if self._plan.optimizer.server.name != "none" else 1.0
        if not self._plan.sends_sums:
            return np.float32(own)  # the sites' own learning rates are already in the change
        group: Group = "head" if part == "head" else "adapter"
        return np.float32(own * learning_rate(self._plan, group, step=server_round - 1))

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes back."""
        counts = np.array([self.counts[part] for part in _PARTS], dtype=np.int64)
        return {"first": self.first, "second": self.second, "counts": counts}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a saved `state`."""
        self.first = np.array(state["first"], dtype=np.float32)
        self.second = np.array(state["second"], dtype=np.float32)
        # Older checkpoints count a fourth part, which no strategy trains any more.
        for part, count in zip(_PARTS, state["counts"], strict=False):
            self.counts[part] = int(count)

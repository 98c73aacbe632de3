"""Optimizers at the coordinator, on the aggregate of a round: any strategy may wear any of them.

Reddi et al., "Adaptive Federated Optimization" (ICLR 2021): the aggregate is a gradient. With one
local step it is one; with several, the negative mean change of the sites stands in for it. FedAvgM
(Hsu et al., 2019) is "sgd". All are post-processing of releases.

Adam's moments start at zero and are divided by what they still lack of their weight; the paper starts
the second at tau squared and leaves the first as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from silotune.models.layout import Group, Part, Span, laid_out
from silotune.plan.plan import Plan
from silotune.plan.sections import ServerOptimizerSettings as Settings

Phase = Literal["head", "adapter"]


def phase_of(plan: Plan, server_round: int) -> Phase:
    """What a round (from 1) trains: the head alone, or adapter and head together."""
    return "head" if server_round <= plan.head_rounds else "adapter"


def learning_rate(plan: Plan, group: Group, *, step: int) -> float:
    """Learning rate of a group at a step (from 0) of the whole run."""
    site = plan.optimizer.site
    peak = site.head_lr if group == "head" else site.adapter_lr
    return peak * site.factor(step=step, steps=plan.steps)


Vector = NDArray[np.float32]

_PARTS: tuple[Part, ...] = get_args(Part)


def _plain(
    gradient: Vector, first: Vector, second: Vector, *, count: int, settings: Settings
) -> Vector:
    """The aggregate as it is."""
    del first, second, count, settings
    return gradient


def _momentum(
    gradient: Vector, first: Vector, second: Vector, *, count: int, settings: Settings
) -> Vector:
    """SGD with heavy-ball momentum: the accumulated gradient."""
    del second, count
    first *= np.float32(settings.momentum)
    first += gradient
    return first


def _adam(
    gradient: Vector, first: Vector, second: Vector, *, count: int, settings: Settings
) -> Vector:
    """FedAdam, with the bias corrections of Kingma and Ba (ICLR 2015)."""
    beta1, beta2 = np.float32(settings.momentum), np.float32(settings.beta2)
    first *= beta1
    first += (1 - beta1) * gradient
    second *= beta2
    second += (1 - beta2) * gradient * gradient
    corrected = first / np.float32(1 - settings.momentum**count)
    scale = np.sqrt(second / np.float32(1 - settings.beta2**count)) + np.float32(settings.epsilon)
    return np.asarray(corrected / scale, dtype=np.float32)


# How a gradient becomes the direction to go against, at the `count`-th step (from 1) of its coordinates;
# the two moments are updated in place.
_RULES = {"none": _plain, "sgd": _momentum, "adam": _adam}


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
        self._settings = plan.optimizer.server
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
        updated = adapter.copy()
        self._count(span.part for span in spans)
        for span, place in laid_out(spans):
            where = slice(span.start, span.stop)
            direction = _RULES[self._settings.name](
                gradient[place],
                self.first[where],
                self.second[where],
                count=self.counts[span.part],
                settings=self._settings,
            )
            updated[where] -= self._rate(span.part, server_round) * direction
        return updated

    def _count(self, parts: Iterable[Part]) -> None:
        for part in set(parts):
            self.counts[part] += 1

    def _rate(self, part: Part, server_round: int) -> np.float32:
        own = self._settings.lr if self._settings.name != "none" else 1.0
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

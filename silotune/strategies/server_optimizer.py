"""Optimizers at the coordinator, on the aggregate of a round.

Reddi et al., "Adaptive Federated Optimization" (ICLR 2021): the aggregate is a gradient. With one
local step it is one; with several, the negative mean change of the sites stands in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from silotune.plan import Plan
from silotune.strategies.schedule import learning_rate

Vector = NDArray[np.float32]
Group = Literal["adapter", "head"]


class ServerOptimizer:
    """State and step of the plan's server optimizer over a flat adapter vector.

    Parameters
    ----------
    plan : Plan
        Gives the optimizer, its constants and the learning rates of both groups.
    slices : mapping of group to slice
        Where each group lies in the flat vector. Each group counts its own steps, so that the adapter
        starts fresh after rounds that trained only the head.
    size : int
        Length of the flat vector.
    """

    def __init__(self, plan: Plan, *, slices: Mapping[Group, slice], size: int) -> None:
        self._plan, self._slices = plan, dict(slices)
        self.first = np.zeros(size, dtype=np.float32)
        self.second = np.zeros(size, dtype=np.float32)
        self.counts: dict[Group, int] = dict.fromkeys(self._slices, 0)

    def step(
        self, adapter: Vector, gradient: Mapping[Group, Vector], *, server_round: int
    ) -> Vector:
        """The next adapter, from the aggregate gradient of each trained group (rounds from 1)."""
        updated = adapter.copy()
        for group, values in gradient.items():
            where = self._slices[group]
            self.counts[group] += 1
            updated[where] -= self._rate(group, server_round) * self._direction(group, values)
        return updated

    def _rate(self, group: Group, server_round: int) -> np.float32:
        own = self._plan.optimizer.server.lr if self._plan.optimizer.server.name != "none" else 1.0
        if self._plan.rounds.local_steps > 1:
            return np.float32(own)  # the sites' own learning rates are already in the change
        return np.float32(own * learning_rate(self._plan, group, step=server_round - 1))

    def _direction(self, group: Group, gradient: Vector) -> Vector:
        rule, where, count = self._plan.optimizer.server, self._slices[group], self.counts[group]
        if rule.name == "none":
            return gradient
        first = self.first[where]
        if rule.name == "sgd":
            first *= np.float32(rule.momentum)
            first += gradient
            return first
        beta1, beta2 = np.float32(rule.momentum), np.float32(rule.beta2)
        second = self.second[where]
        first *= beta1
        first += (1 - beta1) * gradient
        second *= beta2
        second += (1 - beta2) * gradient * gradient
        corrected = first / np.float32(1 - rule.momentum**count)
        scale = np.sqrt(second / np.float32(1 - rule.beta2**count)) + np.float32(rule.epsilon)
        return np.asarray(corrected / scale, dtype=np.float32)

    def state(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """Arrays that `restore` takes back."""
        counts = np.array([self.counts[g] for g in sorted(self.counts)], dtype=np.int64)
        return {"first": self.first, "second": self.second, "counts": counts}

    def restore(self, state: Mapping[str, NDArray[np.float32] | NDArray[np.int64]]) -> None:
        """Go on from a saved `state`."""
        self.first = np.array(state["first"], dtype=np.float32)
        self.second = np.array(state["second"], dtype=np.float32)
        for group, count in zip(sorted(self.counts), state["counts"], strict=True):
            self.counts[group] = int(count)

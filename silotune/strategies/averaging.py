"""The final adapter as a mean of the last ones: what noise added to one step is not in most others.

Uniform: Polyak and Juditsky (1992), over the tail only (Jain et al., JMLR 2018). Exponential: of the
iterates of differentially private training, De et al., 2022. A function of what was released before,
so it costs no epsilon. Sites are sent the iterates themselves; the mean is what the run ends with.

Each part (A, B, head) is averaged over the last share of the rounds in which it is trained, so that an
adapter whose rounds come last is not pulled to where it started.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from silotune.models.layout import Layout, Part, Vector
from silotune.plan.plan import Plan

_PARTS: tuple[Part, ...] = get_args(Part)


class TailAverage:
    """A running mean of the global adapter.

    Parameters
    ----------
    plan : Plan
        ``optimizer.server.average`` and ``average_share`` say how.
    layout : Layout
        Of the adapter.
    rounds : mapping of part to int
        In how many rounds of the run each part is trained.
    """

    def __init__(self, plan: Plan, *, layout: Layout, rounds: Mapping[Part, int]) -> None:
        self._kind, self._share = plan.optimizer.server.average, plan.optimizer.server.average_share
        self._layout, self._rounds = layout, rounds
        self._last = plan.rounds.number
        self._counts = dict.fromkeys(_PARTS, 0)
        kept = 0 if self._kind == "none" else layout.size
        self._mean = np.zeros(kept, dtype=np.float32)

    def after(self, adapter: Vector, *, trained: Collection[Part], server_round: int) -> Vector:
        """What a round (from 1) leaves: the adapter itself, and at the end of the run the mean."""
        if self._kind == "none":
            return adapter
        for part in set(trained):
            self._counts[part] += 1
        for span in self._layout.spans(trained):
            where = slice(span.start, span.stop)
            weight = np.float32(self._weight(span.part))
            self._mean[where] += weight * (adapter[where] - self._mean[where])
        if server_round < self._last:
            return adapter
        found = adapter.copy()  # what was never trained has no mean
        for span in self._layout.spans([p for p in _PARTS if self._counts[p]]):
            found[span.start : span.stop] = self._mean[span.start : span.stop]
        return found

    def _weight(self, part: Part) -> float:
        """Weight of the newest iterate; 1 starts the mean anew."""
        count = self._counts[part]
        tail = max(1.0, self._share * self._rounds[part])
        if self._kind == "ema":
            return max(1.0 / count, 1.0 / tail)
        return 1.0 / max(1.0, count - (self._rounds[part] - tail))

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes back."""
        if self._kind == "none":
            return {}
        counts = np.array([self._counts[part] for part in _PARTS], dtype=np.int64)
        return {"mean": self._mean, "averaged": counts}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a saved `state`."""
        if self._kind != "none":
            self._mean = np.array(state["mean"], dtype=np.float32)
            self._counts = dict(zip(_PARTS, map(int, state["averaged"]), strict=True))

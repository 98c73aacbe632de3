"""SCAFFOLD's control variates, as one site sees them; see `silotune.strategies.scaffold`.

With option II, plain SGD at the sites and no optimizer at the server, the common variate is the mean
change of the last round over the summed learning rates of its steps, negated: a site reads it off two
successive global adapters, and nothing beside them has to travel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from silotune.client.memory import Memory
from silotune.models.layout import Layout, gathered
from silotune.plan import Plan
from silotune.strategies import method_of
from silotune.strategies.schedule import Group, learning_rate, phase_of

Vector = NDArray[np.float32]


class Control:
    """One site's control variate.

    Parameters
    ----------
    plan : Plan
        With strategy "scaffold".
    layout : Layout
        Of the site's adapter.
    memory : Memory
        Where the variate is between rounds.
    """

    def __init__(self, plan: Plan, *, layout: Layout, memory: Memory) -> None:
        self._plan, self._layout, self._memory = plan, layout, memory
        self._method = method_of(plan)

    def drift(self, adapter: Vector, server_round: int) -> Vector:
        """What each step adds to its gradient: the common variate minus the site's own.

        Zero in the first round of a phase, and after a round that this site missed.

        Returns
        -------
        float32 array
            Of every coordinate that the round trains.
        """
        common, own = self._variates(adapter, server_round)
        return common - own

    def learn(self, adapter: Vector, change: Vector, server_round: int) -> None:
        """Keep the own variate after a round that started at `adapter` and changed it by `change`."""
        common, own = self._variates(adapter, server_round)
        fresh = own - common - change / self._travel(server_round)
        self._memory.keep(server_round, {"adapter": adapter, "own": fresh})

    def _variates(self, adapter: Vector, server_round: int) -> tuple[Vector, Vector]:
        spans = self._layout.spans(self._method.trained(self._plan, server_round))
        found = self._memory.recall(before=server_round)
        before = server_round - 1
        fits = found is not None and found[0] == before
        if not fits or phase_of(self._plan, before) != phase_of(self._plan, server_round):
            nothing = np.zeros(sum(s.stop - s.start for s in spans), dtype=np.float32)
            return nothing, nothing
        assert found is not None
        moved = gathered(adapter, spans) - gathered(found[1]["adapter"], spans)
        return -moved / self._travel(before), np.asarray(found[1]["own"], dtype=np.float32)

    def _travel(self, server_round: int) -> Vector:
        """Sum of the learning rates of a round's steps, for each coordinate that it trains."""
        steps = self._plan.rounds.local_steps
        first = (server_round - 1) * steps
        travels: list[Vector] = []
        for span in self._layout.spans(self._method.trained(self._plan, server_round)):
            group: Group = "head" if span.part == "head" else "adapter"
            rates = [learning_rate(self._plan, group, step=n) for n in range(first, first + steps)]
            travels.append(np.full(span.stop - span.start, sum(rates), dtype=np.float32))
        return np.concatenate(travels)

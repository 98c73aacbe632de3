"""Parts of the adapter that stay at a site: put in before a round, taken out after it.

Under differential privacy these parts are trained under the same clipping, noise and charge as if they
were sent. Later releases are computed with them; noise on the sent parts alone would not cover that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from silotune.client.memory import Arrays, Memory
from silotune.models.layout import Layout, Span, gathered
from silotune.plan import Plan
from silotune.strategies import method_of
from silotune.strategies.server_optimizer import ServerOptimizer

Vector = NDArray[np.float32]


class Keeping:
    """What the plan's strategy keeps at this site.

    Parameters
    ----------
    plan : Plan
        Names the strategy.
    layout : Layout
        Of the site's adapter.
    memory : Memory
        Where the kept parts are between rounds.
    batch : float
        Expected units in a step: the divisor of gradient sums.
    """

    def __init__(self, plan: Plan, *, layout: Layout, memory: Memory, batch: float) -> None:
        self._plan, self._layout, self._memory, self._batch = plan, layout, memory, batch
        self._method = method_of(plan)
        self._kept = layout.spans(self._method.kept(plan))

    @property
    def any(self) -> bool:
        """Whether anything is kept."""
        return bool(self._kept)

    def personal(self, adapter: Vector, *, before: int) -> Vector:
        """The global adapter with the site's own parts in it, as they were before a round."""
        found = self._memory.recall(before=before) if self._kept else None
        return adapter if found is None else self._placed(adapter, found[1])

    def leave(self, own: Vector, update: Vector, server_round: int) -> Vector:
        """Keep the new own parts, and give the part of an update that is to be sent.

        Parameters
        ----------
        own : float32 array [layout.size]
            The adapter that the round started from at this site.
        update : float32 array
            Gradient sum, or change, of every part that the round trained.
        server_round : int
            From 1.
        """
        trained = self._layout.spans(self._method.trained(self._plan, server_round))
        sent = self._method.sent(self._plan, server_round)
        if len(trained) == len(self._layout.spans(sent)):
            return update
        whole = self._layout.spread(trained, update)
        kept = tuple(span for span in trained if span.part not in sent)
        self._memory.keep(server_round, self._moved(own, gathered(whole, kept), kept, server_round))
        return gathered(whole, self._layout.spans(sent))

    def _moved(
        self, own: Vector, update: Vector, spans: tuple[Span, ...], server_round: int
    ) -> Arrays:
        """The own parts after the round, and the state of the optimizer that moved them."""
        if not self._plan.sends_sums:
            moved = own + self._layout.spread(spans, update)
            return {"kept": gathered(moved, self._kept)}
        # One step a round: the coordinator's optimizer moves what is sent, its twin what is kept.
        optimizer = ServerOptimizer(self._plan, size=self._layout.size)
        found = self._memory.recall(before=server_round)
        if found is not None:
            optimizer.restore(found[1])
        gradient = update / np.float32(self._batch)
        moved = optimizer.step(own, gradient, spans, server_round=server_round)
        return {"kept": gathered(moved, self._kept), **optimizer.state()}

    def _placed(self, adapter: Vector, arrays: Arrays) -> Vector:
        own, start = np.array(adapter, dtype=np.float32), 0
        for span in self._kept:
            end = start + span.stop - span.start
            own[span.start : span.stop] = arrays["kept"][start:end]
            start = end
        return own

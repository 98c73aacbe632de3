"""What every aggregation method shares: messages out, replies folded into a running sum.

A strategy is additive by contract: a site's reply is one flat float32 vector that enters as one term
of a sum, so memory is O(adapter) whatever the cohort and the order of replies does not matter. Where
the term is the vector itself times a public factor the strategy is *linear* (`LinearStrategy`), and
the sum may as well be computed under secure aggregation.

A strategy's class methods say what a site trains, sends and keeps; the site's trainer asks the same
class that the coordinator aggregates with.

What an update counts for follows from public numbers: one rule for sites and coordinator.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from silotune.errors import UpdateRejected
from silotune.models.layout import Layout, Part, Span, Vector
from silotune.models.scores import metrics_of
from silotune.plan.plan import Plan
from silotune.privacy.errors import MessageMalformed
from silotune.protocol.replies import EvaluateReply, TrainReply
from silotune.protocol.requests import adapter_content, as_arrays
from silotune.strategies.averaging import TailAverage
from silotune.strategies.server_optimizer import ServerOptimizer, phase_of

if TYPE_CHECKING:  # with it come Flower's servers, of which a site uses nothing
    from flwr.serverapp import Grid


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a site declared in public when it joined.

    Attributes
    ----------
    node : int
        Flower's node id.
    site : str
        The site's name.
    declared_units : int
        Rounded number of privacy units, from the site's own configuration.
    rank : int or None
        Rank of the site's adapter; None for the plan's.
    sigma : float or None
        Its noise multiplier; None without privacy.
    """

    node: int
    site: str
    declared_units: int
    rank: int | None = None
    sigma: float | None = None


@dataclass(frozen=True, kw_only=True)
class Weight:
    """How a site's update enters the sum: public numbers, both.

    Attributes
    ----------
    factor : float
        The update is multiplied by it.
    mass : float
        What it adds to the divisor of the sum.
    """

    factor: float
    mass: float


class AdapterStrategy(Strategy):
    """Base of the strategies: one flat float32 vector a message, both ways.

    Parameters
    ----------
    plan : Plan
        The plan of the run.
    layout : Layout
        Of the global adapter: the vector that is broadcast.
    """

    def __init__(self, plan: Plan, *, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        self.optimizer = ServerOptimizer(plan, size=layout.size)
        self._average = TailAverage(plan, layout=layout, rounds=self._rounds_of_parts(plan))
        self.cohort: dict[int, Terms] = {}  # of the round: the sites that it asks

    @classmethod
    def _rounds_of_parts(cls, plan: Plan) -> Counter[Part]:
        """In how many rounds of a run each part is sent."""
        return Counter(p for n in range(1, plan.rounds.number + 1) for p in cls.sent(plan, n))

    # --- what a site trains, sends and keeps ---

    @classmethod
    def trained(cls, plan: Plan, server_round: int) -> frozenset[Part]:
        """Parts of the adapter that a site trains in a round (from 1)."""
        if phase_of(plan, server_round) == "head":
            return frozenset({"head"})
        return cls.joint(plan, server_round)

    @classmethod
    def joint(cls, plan: Plan, server_round: int) -> frozenset[Part]:
        """Parts that are trained in a round that trains more than the head."""
        del plan, server_round
        return frozenset({"A", "B", "head"})

    @classmethod
    def kept(cls, plan: Plan) -> frozenset[Part]:
        """Parts that never leave a site; the global adapter has them at their start."""
        return frozenset({"head"} if plan.aggregation.head == "local" else ())

    @classmethod
    def sent(cls, plan: Plan, server_round: int) -> frozenset[Part]:
        """Parts whose update a site sends in a round."""
        return cls.trained(plan, server_round) - cls.kept(plan)

    @classmethod
    def outgoing(cls, plan: Plan, update: Vector, *, declared_units: int) -> Vector:
        """What a site sends of its update: here the update as it is."""
        del plan, declared_units
        return update

    def spans(self, server_round: int) -> tuple[Span, ...]:
        """Where the sent parts lie in the global adapter, in the order of an update."""
        return self.layout.spans(self.sent(self.plan, server_round))

    def update_size(self, server_round: int) -> int:
        """Length of the update that a site of the plan's rank sends in a round."""
        return sum(span.size for span in self.spans(server_round))

    # --- the arithmetic of a method ---

    @abstractmethod
    def begin(self, server_round: int, adapter: Vector) -> None:
        """Start the sum of a round (from 1) that sites were sent `adapter` in."""

    @abstractmethod
    def fold(self, terms: Terms, update: Vector) -> None:
        """Add one site's update. Raises `UpdateRejected`; the sum is then unchanged."""

    @abstractmethod
    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """The next global adapter, from the sum of the round; `adapter` itself without replies."""

    def conclude(self, adapter: Vector, *, server_round: int) -> Vector:
        """What a finished round leaves; at the end of the run a mean, if the plan asks for one."""
        sent = self.sent(self.plan, server_round)
        return self._average.after(adapter, trained=sent, server_round=server_round)

    def settings(self) -> dict[str, float]:
        """Numbers that sites need beside plan and adapter in the coming round."""
        return {}

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays that `restore` takes back: all that a resumed run needs beside the adapter."""
        return self.optimizer.state() | self._average.state()

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a saved `state`."""
        self.optimizer.restore(state)
        self._average.restore(state)

    def step(self, adapter: Vector, mean: Vector, *, server_round: int) -> Vector:
        """The server optimizer's step with an aggregate of updates.

        Parameters
        ----------
        adapter : float32 array [layout.size]
            The global adapter.
        mean : float32 array [update_size]
            Mean gradient with one local step, mean change with several.
        server_round : int
            From 1.
        """
        gradient = mean if self.plan.sends_sums else -mean
        spans = self.spans(server_round)
        return self.optimizer.step(adapter, gradient, spans, server_round=server_round)

    # --- Flower's interface ---

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a site of the cohort."""
        del grid  # the cohort joined already; nothing is sampled
        return self._messages("train", server_round, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come; the step from an adapter of zeros."""
        start = np.zeros(self.layout.size, dtype=np.float32)
        self.begin(server_round, start)
        for reply in replies:
            if reply.has_content():
                update = TrainReply.read(reply.content).update
                self.fold(self.cohort[reply.metadata.src_node_id], update)
        return as_arrays(self.finish(start, server_round=server_round)), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for released metrics in the rounds that the plan names, if it gives them any epsilon."""
        del grid
        every = self.plan.rounds.evaluate_every
        asked = bool(every) and server_round % every == 0
        if not asked or not (self.plan.privacy.metrics_share or not self.plan.private):
            return []
        return self._messages("evaluate", server_round, arrays, config)

    def _messages(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        return [
            Message(content, dst_node_id=node, message_type=kind, group_id=str(server_round))
            for node, content in self.contents(arrays, config)
        ]

    def contents(
        self, arrays: ArrayRecord, config: ConfigRecord
    ) -> Iterator[tuple[int, RecordDict]]:
        """What each node of the cohort is sent: here the same for all."""
        content = adapter_content(arrays, config)
        for node in self.cohort:
            yield node, content

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The task's metrics from the sums of the released counts.

        Where sites keep parts of their own, metrics of the personal adapters have the prefix
        ``personal_`` and stand beside those of the shared one. Noisy counts are added up in the order
        of the nodes: that of the replies would change the last bit.
        """
        del server_round
        totals: dict[str, NDArray[np.float64]] = {}
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            for prefix, counts in _counts_of(reply):
                known = totals.get(prefix)
                if np.isfinite(counts).all() and (known is None or counts.shape == known.shape):
                    totals[prefix] = counts if known is None else known + counts
        metrics = {
            f"{prefix}{name}": value
            for prefix, total in totals.items()
            for name, value in metrics_of(self.plan, total).items()
            if np.isfinite(value)
        }
        return MetricRecord({**metrics}) if metrics else None

    def summary(self) -> None:
        """Nothing to log: the plan says it all."""


def _counts_of(reply: Message) -> Iterator[tuple[str, NDArray[Any]]]:
    """Tables of a reply, by the prefix of their metrics; none of one that can't be read."""
    if not reply.has_content():
        return
    with suppress(MessageMalformed):
        found = EvaluateReply.read(reply.content)
        for prefix, counts in (("", found.counts), ("personal_", found.personal)):
            if counts is not None:
                yield prefix, counts


def weight_in(plan: Plan, *, declared_units: int, largest: int) -> Weight:
    """Factor of a site's update in a sum, and what the site adds to the divisor.

    Parameters
    ----------
    declared_units : int
        The site's.
    largest : int
        The most that a member of the cohort declares.
    """
    equal = plan.aggregation.weights == "equal"
    if plan.sends_sums:
        batch = plan.expected_batch(declared_units)
        return Weight(factor=1.0 / batch, mass=1.0) if equal else Weight(factor=1.0, mass=batch)
    share = 1.0 if equal else declared_units / largest
    return Weight(factor=share, mass=share)


Rows = NDArray[np.float32]


class RobustStrategy(AdapterStrategy):
    """Base of strategies that withstand sites which lie: `combine` sees each update beside the others.

    Every site has one vote, whatever it declares (a liar would declare the most). Updates of one step
    are made commensurable first: a gradient sum is divided by its expected batch. All of them hold the
    cohort's updates in memory, a row a site in the order of their names, and none works under secure
    aggregation.
    """

    def begin(self, server_round: int, adapter: Vector) -> None:
        """Forget the updates of the round before."""
        del adapter
        self._size = self.update_size(server_round)
        self._rows: dict[str, Vector] = {}

    def fold(self, terms: Terms, update: Vector) -> None:
        """Keep one site's update."""
        if update.shape != (self._size,):
            raise UpdateRejected(
                f"site {terms.site}: expected {self._size} numbers, got {update.size}"
            )
        if not np.isfinite(update).all():
            raise UpdateRejected(f"site {terms.site}: a number is NaN or infinite")
        batch = self.plan.expected_batch(terms.declared_units) if self.plan.sends_sums else 1.0
        self._rows[terms.site] = update / np.float32(batch)

    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """The server optimizer's step with what the rule makes of the updates."""
        if not self._rows:
            return adapter.copy()
        rows = np.stack([self._rows[site] for site in sorted(self._rows)])
        found = np.asarray(self.combine(rows), dtype=np.float32)
        return self.step(adapter, found, server_round=server_round)

    @abstractmethod
    def combine(self, rows: Rows) -> NDArray[np.floating]:
        """One vector from the rows [sites, update_size]."""

"""What every aggregation method shares: messages out, replies folded into a running sum.

A strategy is additive by contract: a site's reply enters as one weighted term of a sum, so memory is
O(adapter) whatever the cohort, the order of replies does not matter, and the sum may as well be
computed under secure aggregation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from silotune.errors import UpdateRejected
from silotune.models.tasks import get_task
from silotune.plan import Plan
from silotune.strategies.schedule import Phase, phase_of
from silotune.strategies.server_optimizer import Group, ServerOptimizer

Vector = NDArray[np.float32]


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
    """

    node: int
    site: str
    declared_units: int


class AdapterStrategy(Strategy):
    """Base of the strategies: one flat float32 vector a message.

    Parameters
    ----------
    plan : Plan
        The plan of the run.
    slices : mapping of group to slice
        Where adapter and head lie in the flat vector.
    size : int
        Length of the flat vector.
    """

    def __init__(self, plan: Plan, *, slices: Mapping[Group, slice], size: int) -> None:
        self.plan, self.size = plan, size
        self.slices = dict(slices)
        self.optimizer = ServerOptimizer(plan, slices=slices, size=size)
        self.cohort: dict[int, Terms] = {}

    # --- the arithmetic of a method ---

    @abstractmethod
    def begin(self, server_round: int) -> None:
        """Start the sum of a round (from 1)."""

    @abstractmethod
    def fold(self, terms: Terms, update: Vector) -> None:
        """Add one site's update. Raises `UpdateRejected`; the sum is then unchanged."""

    @abstractmethod
    def finish(self, adapter: Vector, *, server_round: int) -> Vector:
        """The next global adapter, from the sum of the round."""

    # --- shared ---

    def groups(self, server_round: int) -> tuple[Group, ...]:
        """Groups that a round trains, in the order of the flat vector."""
        phase: Phase = phase_of(self.plan, server_round)
        return tuple(g for g in self.slices if phase == "adapter" or g == "head")

    def update_size(self, server_round: int) -> int:
        """Length of the update a site sends in a round."""
        spans = [self.slices[group] for group in self.groups(server_round)]
        return sum(span.stop - span.start for span in spans)

    # --- Flower's interface ---

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a site of the cohort; all carry the same content."""
        del grid  # the cohort joined already; nothing is sampled
        content = RecordDict({"arrays": arrays, "config": config})
        return [
            Message(content, dst_node_id=node, message_type="train", group_id=str(server_round))
            for node in self.cohort
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come; the aggregate alone, without the server optimizer's step."""
        self.begin(server_round)
        for reply in replies:
            if reply.has_content():
                self.fold(self.cohort[reply.metadata.src_node_id], update_of(reply))
        start = np.zeros(self.size, dtype=np.float32)
        return as_arrays(self.finish(start, server_round=server_round)), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for released metrics in the rounds that the plan names, if it grants them a budget."""
        del grid
        every = self.plan.rounds.evaluate_every
        asked = bool(every) and server_round % every == 0
        if not asked or not (self.plan.privacy.metrics_share or not self.plan.private):
            return []
        content = RecordDict({"arrays": arrays, "config": config})
        return [
            Message(content, dst_node_id=node, message_type="evaluate", group_id=str(server_round))
            for node in self.cohort
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The task's metrics from the sum of the released counts."""
        del server_round
        total: NDArray[np.float64] | None = None
        for reply in replies:
            if reply.has_content():
                counts = reply.content.array_records["counts"]["flat"].numpy()
                if np.isfinite(counts).all() and (total is None or counts.shape == total.shape):
                    total = counts if total is None else total + counts
        if total is None:
            return None
        found = get_task(self.plan.model.task).metrics(total)
        return MetricRecord({k: v for k, v in found.items() if np.isfinite(v)})

    def summary(self) -> None:
        """Nothing to log: the plan says it all."""


def as_arrays(flat: Vector) -> ArrayRecord:
    """A flat vector as the one array of a record."""
    return ArrayRecord({"flat": Array(np.ascontiguousarray(flat, dtype="<f4"))})


def update_of(reply: Message) -> Vector:
    """The flat update of a reply. Raises `UpdateRejected` if it isn't one float32 vector."""
    record = reply.content.array_records.get("update")
    if record is None or list(record) != ["flat"]:
        raise UpdateRejected("the reply has no single array named 'flat'")
    if record["flat"].dtype != "float32":
        raise UpdateRejected(f"the update is {record['flat'].dtype}, not float32")
    flat = record["flat"].numpy()
    if flat.ndim != 1:
        raise UpdateRejected(f"the update has {flat.ndim} dimensions, not one")
    return flat

"""Flower's link state inside our own process: who the nodes are, which runs there are; nothing else.

A contract test (``tests/flower/test_superlink.py``) holds each admitted version of Flower to what is
used here and is not promised. Flower's process model is left out: no FAB, no ServerApp subprocess, no
API of its SuperLink, which asks eleven requests and some forty statements for one exchange with a site.
Messages under way are in the same database, in tables of `silotune.flower.link_messages`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.util import CommandError
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    Status,
    SubStatus,
)
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from flwr.superlink.federation import NoOpFederationManager
from sqlalchemy import event

from silotune.errors import EnvironmentFault
from silotune.flower.earlier_link import EarlierMessages
from silotune.flower.link_messages import LinkMessages, Outgoing, Seals
from silotune.flower.message_frames import MessageFrame
from silotune.flower.messages import LinkRun
from silotune.protocol.errors import StoreUnusable


def flower_state(database: Path) -> Any:
    """Flower's link state in a SQLite file, made or migrated if need be.

    What it does at every call and nobody here needs is left out: it looks for processes whose token has
    expired (`LinkState.new_run` gives no tokens), and lets each of a dozen connections keep 64 MB of
    pages, for rows that are read once.

    Raises
    ------
    StoreUnusable
        A newer version of Flower wrote it.
    """
    objects = ObjectStoreFactory()  # in memory, and empty: messages are not Flower's
    try:
        state: Any = LinkStateFactory(str(database), NoOpFederationManager(), objects).state()
    except CommandError as exc:
        raise StoreUnusable(
            f"{database} was written by a newer version of Flower than the installed one",
            remedy=f"Install that version of Flower again, or remove {database.name}* in"
            f" {database.parent}: what is lost are messages under way.",
        ) from exc
    state._cleanup_expired_task_tokens = lambda: None
    event.listen(state._engine, "connect", _keep_little)
    state._engine.dispose()
    return state


def _keep_little(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("cache_size = -2000", "mmap_size = 0"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class Signal:
    """Something happened: threads wait for the next time, and miss none in between."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._count = 0

    @property
    def count(self) -> int:
        """How often it happened so far."""
        return self._count

    def fire(self) -> None:
        """It happened."""
        with self._condition:
            self._count += 1
            self._condition.notify_all()

    def wait(self, *, since: int, seconds: float) -> int:
        """Wait until it happened more than `since` times, or `seconds` are over; the count then."""
        with self._condition:
            self._condition.wait_for(lambda: self._count > since, timeout=seconds)
            return self._count


@dataclass(frozen=True, kw_only=True)
class NodeHealth:
    """How a node is doing: whether its heartbeats are current, and until when they were."""

    online: bool
    until: float


class LinkState:
    """Nodes, runs and messages over one SQLite file.

    Parameters
    ----------
    database : Path
        The link database: nodes, undelivered instructions, unread replies, nothing of lasting value.
        What is large of them lies in a folder beside it.
    vault : Vault
        Seals what messages hold.

    Raises
    ------
    StoreUnusable
        A newer version of Flower wrote the link state.

    Attributes
    ----------
    messages : LinkMessages
        Those under way.
    arrived : Signal
        Fired when a reply has come or a node was activated.
    """

    def __init__(self, database: Path, *, vault: Seals) -> None:
        self._state = flower_state(database)
        folder = database.with_suffix(".pieces")
        self.messages = LinkMessages(database, folder=folder, vault=vault)
        earlier = EarlierMessages(self._state, database.with_suffix(".objects"), vault)
        self.messages.adopt(earlier)
        earlier.remove()
        self.arrived = Signal()
        self._kick: Callable[[int], None] = lambda node: None
        # Flower lets only a process with a task construct a `Message`; `push` sets the real numbers.
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    # --- nodes ---

    def register(self, node_key: str, name: str) -> int:
        """Let a node key in (PEM); returns its node id, the same at each call.

        Raises
        ------
        EnvironmentFault
            The key is not one that Flower takes.
        """
        pem = node_key.encode()
        if not uses_nist_ec_curve(bytes_to_public_key(pem)):
            raise EnvironmentFault("Flower takes keys over NIST curves only")
        known = self._state.get_node_id_by_public_key(pem)
        if known is not None:
            return int(known)
        interval = HEARTBEAT_DEFAULT_INTERVAL
        return int(
            self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, pem, interval, name=name)
        )

    def unregister(self, node: int) -> None:
        """Shut a node out for good; its key can't come back."""
        if self._state.get_node_info(node_ids=[node]):
            self._state.delete_node(NOOP_FLWR_AID, node)

    def sightings(self) -> dict[int, NodeHealth]:
        """Every node that is or was there."""
        rows, now = self._state.query("SELECT node_id, status, online_until FROM node"), time.time()
        return {
            int64_to_uint64(row["node_id"]): NodeHealth(
                online=row["status"] == NodeStatus.ONLINE and (row["online_until"] or 0.0) > now,
                until=float(row["online_until"] or 0.0),
            )
            for row in rows
        }

    def activate(self, node: int, *, heartbeat: float) -> bool:
        """A node begins a session, and will give a sign of life every `heartbeat` seconds.

        The guard knows by its certificate that it is the node. So an older session is dead, or has to
        be (the guard sees to it), and the node need not wait until two of its heartbeats are missing.
        """
        self._state.deactivate_node(node)
        done = bool(self._state.activate_node(node, heartbeat))
        self.arrived.fire()
        return done

    def heartbeat(self, node: int, *, seconds: float) -> None:
        """A sign of life; the next comes within `seconds`."""
        self._state.acknowledge_node_heartbeat(node, seconds)

    def deactivate(self, node: int) -> None:
        """A node says goodbye."""
        self._state.deactivate_node(node)

    def on_push(self, kick: Callable[[int], None]) -> None:
        """Have `kick(node)` called when an instruction for a node was stored."""
        self._kick = kick

    # --- runs ---

    def new_run(self) -> LinkRun:
        """A run that is running and needs no heartbeat of its own."""
        run_id = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        run = self._state.get_run_info(run_ids=[run_id])[0]
        self._state.claim_task(run.primary_task_id)
        self._state.activate_task(run.primary_task_id)
        # Without a token nobody can speak for the task, and without a deadline the run outlives any
        # pause of this process.
        self._state.query(
            "UPDATE task SET token=NULL, active_until=NULL WHERE task_id=:t",
            {"t": uint64_to_int64(run.primary_task_id)},
        )
        return LinkRun(int(run_id), int(run.primary_task_id))

    def find_run(self, run_id: int) -> LinkRun | None:
        """A run from before a restart, if it is still running."""
        for run in self._state.get_run_info(run_ids=[run_id]):
            if run.status.status == Status.RUNNING:
                return LinkRun(int(run.run_id), int(run.primary_task_id))
        return None

    def finish_run(self, run: LinkRun) -> None:
        """End a run and remove all its messages."""
        self._state.finish_task(run.task_id, SubStatus.COMPLETED, "")
        self.messages.forget_run(run)

    # --- messages ---

    def push(self, run: LinkRun, outgoing: Sequence[Outgoing]) -> list[str]:
        """Store instructions; their message ids, or "" for a node that was never there."""
        there = {node for node, health in self.sightings().items() if health.until}
        stored = [one for one in outgoing if one.node in there]
        ids = iter(self.messages.send(run, stored))
        for one in stored:
            self._kick(one.node)
        return [next(ids) if one.node in there else "" for one in outgoing]

    def take(self, node: int, frame: MessageFrame) -> bool:
        """Keep a frame of the node's reply; False if nobody waits for it.

        Raises
        ------
        ValueError
            It is no reply, or a frame before it is missing.
        """
        whole = self.messages.take(node, frame)
        if whole:
            self.arrived.fire()
        return whole is not None

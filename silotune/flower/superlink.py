"""Flower's SuperLink inside our own process: its fleet API, its link state, and nothing else of it.

A contract test (``tests/flower/test_superlink.py``) holds each admitted version of Flower to what is
used here and is not promised. Flower's process model is left out: no FAB, no ServerApp subprocess, no
control or runtime API. What is used is the fleet API's request handlers, on the same link state that
`LinkState` reads and writes directly.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.util import CommandError
from fastapi import FastAPI
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    Status,
    SubStatus,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    iterate_object_tree,
)
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from sqlalchemy import event
from starlette.middleware.base import BaseHTTPMiddleware

from silotune.errors import EnvironmentFault
from silotune.flower import messages
from silotune.flower.messages import LinkRun
from silotune.flower.objects import ObjectFiles, Seals
from silotune.protocol.errors import StoreUnusable

REQUESTS: Mapping[str, Any] = {
    f"/v1/fleet/{name}": kind
    for name, kind in (
        ("activate-node", ActivateNodeRequest),
        ("deactivate-node", DeactivateNodeRequest),
        ("send-node-heartbeat", SendNodeHeartbeatRequest),
        ("pull-messages", PullMessagesRequest),
        ("push-messages", PushMessagesRequest),
        ("pull-object", PullObjectRequest),
        ("push-object", PushObjectRequest),
        ("confirm-message-received", ConfirmMessageReceivedRequest),
    )
}
"""The paths of the fleet API that sites need, and the message that each takes."""

MEDIA_TYPE = PROTOBUF_MEDIA_TYPE

ACTIVATE, DEACTIVATE, HEARTBEAT, PULL, PUSH, PULL_OBJECT, PUSH_OBJECT, CONFIRM = REQUESTS

NOT_STORED = PushObjectResponse(stored=False)
NOT_FOUND = PullObjectResponse(object_found=False, object_available=False)
CONFIRMED = ConfirmMessageReceivedResponse()
"""Answers about what is not the caller's: as if it did not exist."""

_NEEDED: tuple[Any, ...] = (
    BaseHTTPMiddleware,
    ProtobufTranslationMiddleware,
    NodeAuthMiddleware,
)


def superlink_app(database: Path) -> FastAPI:
    """The SuperLink's fleet API over a link state in a SQLite file, without any process of Flower's.

    Its other APIs are taken out, with the six of nine layers around every request that are there for
    them or for logs: each costs a task and a stream a request. The first that is kept translates errors.

    Raises
    ------
    StoreUnusable
        A newer version of Flower wrote the link state.
    """
    # The package attribute of that name is a function, so the module is asked for by name.
    lifespan = importlib.import_module("flwr.superlink.cli.flower_superlink").SuperLinkLifespan
    try:
        app = create_app(_config(database), lifespan)
    except CommandError as exc:
        raise StoreUnusable(
            f"{database} was written by a newer version of Flower than the installed one",
            remedy=f"Install that version of Flower again, or remove {database.name}* in"
            f" {database.parent}: what is lost are messages under way.",
        ) from exc
    included = [(route, getattr(route, "original_router", None)) for route in app.router.routes]
    app.router.routes[:] = [route for route, router in included if router is fleet_router]
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls in _NEEDED]
    return app


def lighten(state: Any, objects: ObjectStore) -> None:
    """Leave out of a link state what Flower does at every request and nobody here needs.

    Parts of messages go to `objects` instead of tables. Flower looks twice for processes whose token has
    expired (`Link.new_run` gives no tokens), and adds up bytes for a bill: four writing statements a
    request. And it lets each of a dozen connections keep 64 MB of pages, for rows that are read once.
    """
    state._cleanup_expired_task_tokens = lambda: None
    state.store_traffic = lambda run_id, *, bytes_sent, bytes_recv: None
    state.object_store._engine.dispose()
    state._object_store = objects
    event.listen(state._engine, "connect", _keep_little)
    state._engine.dispose()


def _keep_little(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("cache_size = -2000", "mmap_size = 0"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _config(database: Path) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=False,
        certificates=None,
        superexec_auth_secret=os.urandom(32),  # nobody knows it: no task can be acquired
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",  # no child process
        runtime_dependency_install=False,
    )


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
class Instruction:
    """A message to a node that is not forgotten yet."""

    message_id: str
    node: int
    kind: str
    group: str
    delivered: bool
    expired: bool


@dataclass(frozen=True, kw_only=True)
class NodeHealth:
    """How a node is doing: whether its heartbeats are current, and until when they were."""

    online: bool
    until: float


class LinkState:
    """Flower's fleet API over a SQLite file.

    Parameters
    ----------
    database : Path
        The link state. It holds undelivered instructions and unread replies, nothing of lasting value.
        What they are made of lies in a folder beside it.
    vault : Vault
        Seals that folder's files.

    Raises
    ------
    StoreUnusable
        A newer version of Flower wrote the link state.

    Attributes
    ----------
    app : ASGI application
        The whole SuperLink; only a guard may stand in front of it.
    arrived : Signal
        Fired when a reply may have come or a node was activated.
    """

    def __init__(self, database: Path, *, vault: Seals) -> None:
        self.app = superlink_app(database)
        self._state: Any = self.app.state.linkstate_factory.state()
        self._store = ObjectFiles(database.with_suffix(".objects"), vault)
        lighten(self._state, self._store)
        known = "SELECT message_id FROM message_ins UNION SELECT message_id FROM message_res"
        self._store.retain({row["message_id"] for row in self._state.query(known)})
        self.arrived = Signal()
        self._kick: Callable[[int], None] = lambda node: None
        self._listeners: list[Callable[[int, bool], None]] = []
        self._take_over()
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
        return {
            int(info.node_id): NodeHealth(
                online=info.status == NodeStatus.ONLINE, until=float(info.online_until or 0.0)
            )
            for info in self._state.get_node_info(owner_aids=[NOOP_FLWR_AID])
        }

    def on_activation(self, listener: Callable[[int, bool], None]) -> None:
        """Have `listener(node, was_online)` called when a node starts a session."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[int, bool], None]) -> None:
        """Undo `on_activation`."""
        self._listeners.remove(listener)

    def on_push(self, kick: Callable[[int], None]) -> None:
        """Have `kick(node)` called when an instruction for a node was stored."""
        self._kick = kick

    def _take_over(self) -> None:
        """Let a node that was killed come back at once, not after two missed heartbeats.

        Flower refuses to activate a node that still counts as online. The handler runs after node
        authentication, so whoever gets here holds the node's key: the old session is dead, or has
        to be (the guard sees to it).
        """
        original = self._state.activate_node

        def activate(node_id: int, heartbeat_interval: float) -> bool:
            was_online = bool(self._state.deactivate_node(node_id))
            done = bool(original(node_id, heartbeat_interval))
            if done:
                for listener in list(self._listeners):
                    listener(node_id, was_online)
                self.arrived.fire()
            return done

        self._state.activate_node = activate

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
        """End a run and remove all its messages and objects."""
        self._state.finish_task(run.task_id, SubStatus.COMPLETED, "")
        self._state.cleanup_run(run.run_id)

    # --- instructions ---

    def push(
        self, run: LinkRun, *, node: int, kind: str, group: str, ttl: float, content: RecordDict
    ) -> str:
        """Store an instruction; its message id, or "" if the node was never there.

        Objects go first and the message last, so that a node never sees a half-stored message.
        """
        message = messages.instruction(
            run, node=node, kind=kind, group=group, ttl=ttl, content=content
        )
        packed = messages.pack(message)
        for object_id in self._store.preregister(run.run_id, packed.tree):
            self._store.put(object_id, packed.deflate(object_id))
        stored = self._state.store_message_ins(remove_content_from_message(message))
        if not stored:
            self._store.delete(message.metadata.message_id)
            return ""
        self._kick(node)
        return str(message.metadata.message_id)

    def instructions(self, run: LinkRun) -> list[Instruction]:
        """Every instruction of a run that was not forgotten, oldest first."""
        rows = self._state.query(
            "SELECT message_id, dst_node_id, message_type, group_id, delivered_at, created_at, ttl "
            "FROM message_ins WHERE run_id=:r ORDER BY created_at",
            {"r": uint64_to_int64(run.run_id)},
        )
        now = time.time()
        return [
            Instruction(
                message_id=row["message_id"],
                node=int64_to_uint64(row["dst_node_id"]),
                kind=row["message_type"],
                group=row["group_id"],
                delivered=row["delivered_at"] != "",
                expired=row["created_at"] + row["ttl"] <= now,
            )
            for row in rows
        ]

    def requeue_unconfirmed(self, run: LinkRun) -> None:
        """After a crash: hand out again what was handed out and perhaps never arrived.

        A node confirms by having the message's own object deleted; the site drops duplicates.
        """
        self._hand_out_again(
            "SELECT message_id FROM message_ins WHERE run_id=:r AND delivered_at!=''",
            {"r": uint64_to_int64(run.run_id)},
        )

    def _hand_out_again(self, query: str, values: dict[str, int]) -> None:
        for row in self._state.query(query, values):
            if row["message_id"] in self._store:
                self._state.query(
                    "UPDATE message_ins SET delivered_at='' WHERE message_id=:m",
                    {"m": row["message_id"]},
                )

    def has_work(self, node: int) -> bool:
        """Whether an instruction waits to be pulled by the node.

        A node works on one instruction at a time and confirms it before it works. One that asks for
        the next without having confirmed never got it (the response was lost): it gets it again.
        """
        self._hand_out_again(
            "SELECT message_id FROM message_ins WHERE dst_node_id=:n AND delivered_at!=''",
            {"n": uint64_to_int64(node)},
        )
        found = self._state.query(
            "SELECT 1 AS x FROM message_ins WHERE dst_node_id=:n AND delivered_at='' "
            "AND created_at + ttl > :now LIMIT 1",
            {"n": uint64_to_int64(node), "now": time.time()},
        )
        return bool(found)

    def replies(self, run: LinkRun, wanted: Collection[str]) -> Iterator[tuple[str, int, Message]]:
        """Complete replies to the wanted instructions: ``(instruction, node, reply)``, one by one.

        Not Flower's `get_message_res`: that one turns a reply into an error, and drops it, if the
        node is offline at this instant, as all are when this process has just come back.
        """
        rows = self._state.query(
            "SELECT message_id, reply_to_message_id, src_node_id FROM message_res WHERE run_id=:r",
            {"r": uint64_to_int64(run.run_id)},
        )
        for row in rows:
            instruction, source = row["reply_to_message_id"], int64_to_uint64(row["src_node_id"])
            if instruction not in wanted:
                continue
            message = self._inflated(row["message_id"])
            if message is not None:
                yield instruction, source, message

    def _inflated(self, message_id: str) -> Message | None:
        """A stored message; None while parts of it are missing."""
        if not self._store.get(message_id):
            return None  # the root comes last, so this is the common case
        try:
            tree = self._store.get_object_tree(message_id)
        except NoObjectInStoreError:
            return None
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            content = self._store.get(part.object_id)
            if not content:
                return None
            contents[part.object_id] = content
        try:
            return messages.unpack(message_id, contents)
        except TypeError:
            return None

    def forget(self, instructions: Collection[str]) -> None:
        """Delete instructions, their replies, and the objects of both."""
        for instruction in instructions:
            replies = self._state.query(
                "SELECT message_id FROM message_res WHERE reply_to_message_id=:i",
                {"i": instruction},
            )
            self._state.delete_messages({instruction})
            for object_id in (instruction, *(row["message_id"] for row in replies)):
                self._store.delete(object_id)

    # --- what a node may touch ---

    def addressed_to(self, node: int) -> dict[str, frozenset[str]]:
        """Objects of each instruction to a node, by message id: all that it may read."""
        rows = self._state.query(
            "SELECT message_id FROM message_ins WHERE dst_node_id=:n",
            {"n": uint64_to_int64(node)},
        )
        found: dict[str, frozenset[str]] = defaultdict(frozenset)
        for row in rows:
            try:
                tree = self._store.get_object_tree(row["message_id"])
            except NoObjectInStoreError:
                found[row["message_id"]] = frozenset()  # confirmed: only the reply is still awaited
                continue
            found[row["message_id"]] = object_ids(tree)
        return dict(found)

    def announced_by(self, node: int) -> frozenset[str]:
        """Objects of the replies that a node has begun to push: all that it may write."""
        rows = self._state.query(
            "SELECT message_id FROM message_res WHERE src_node_id=:n",
            {"n": uint64_to_int64(node)},
        )
        found: set[str] = set()
        for row in rows:
            with suppress(NoObjectInStoreError):
                found |= object_ids(self._store.get_object_tree(row["message_id"]))
        return frozenset(found)


def object_ids(tree: ObjectTree) -> frozenset[str]:
    """All ids of a tree."""
    return frozenset(part.object_id for part in iterate_object_tree(tree))

"""Flower's fleet protocol from a site's side: the only module here that knows Flower's internals.

It speaks the protocol of flwr 1.41 and 1.42 directly, outward over HTTPS: activate, heartbeat, pull a
message and its objects, push a reply. No Flower process, no FAB and no listening port is involved, so
nothing that comes from outside is ever run. What comes is bounded before it is built: the size of
every reply, the number and depth of objects, their hashes, and the bytes an array is assembled from.

References
----------
The lifecycle is that of ``flwr.supernode.fleet_http_connection``; the differences are an own TLS
context, an own heartbeat interval, retries that never end the process, and the bounds.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    get_object_id,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient

from silotune.flower import messages
from silotune.protocol.envelope import OBJECT_KINDS
from silotune.protocol.errors import CoordinatorUnavailable, MessageRefused, SessionTaken
from silotune.protocol.http import SESSION_HEADER
from silotune.protocol.https import connection_errors, failure, https_client

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""The shortest interval that the protocol has; a site counts as gone after two of them."""

_MOST_OBJECTS, _MOST_LEVELS = 4096, 8
_PULL_TRIES, _PUSH_TRIES = 20, 5

_T = TypeVar("_T")


class RunGone(Exception):
    """The run isn't running (any more): its message is dropped."""


@dataclass(frozen=True)
class Delivery:
    """A message that waits to be fetched: metadata only, nothing of its content.

    Attributes
    ----------
    outline : Message
        With metadata, without content.
    tree : ObjectTree
        Ids of the objects that it consists of.
    """

    outline: Message
    tree: ObjectTree

    @property
    def message_id(self) -> str:
        """Flower's id of the message: the hash of its content."""
        return str(self.outline.metadata.message_id)

    @property
    def kind(self) -> str:
        """The message type, as claimed."""
        return str(self.outline.metadata.message_type)


class _SignedByNode:
    """Puts the node's key and its signature of the time into every request.

    What ``flwr.supernode.node_auth_http_interceptor`` does, whose package imports FastAPI and requests:
    10 MB of a daemon that is idle most of the time.
    """

    def __init__(self, key: EllipticCurvePrivateKey) -> None:
        self._key, public = key, public_key_to_bytes(key.public_key())
        self._public = b64encode(public).decode("ascii")

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        timestamp = now().isoformat()
        signature = sign_message(self._key, timestamp.encode("ascii"))
        context.request.headers.update(
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: self._public,
                TIMESTAMP_HEADER: timestamp,
                FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
            }
        )
        return call_next(context)


class Fleet:
    """A site's connection to the coordinator.

    Parameters
    ----------
    url : str
        ``https://host:port``.
    tls : ssl.SSLContext
        With the site's certificate.
    node_key : EllipticCurvePrivateKey
        The key that the coordinator has registered.
    session : str
        Names this process (`silotune.protocol.http.SESSION_HEADER`).
    heartbeat : float
        Seconds between signs of life; 10 at least.

    Attributes
    ----------
    node_id : int
        The id that the coordinator gave; 0 before `connect`.
    """

    def __init__(
        self,
        url: str,
        *,
        tls: ssl.SSLContext,
        node_key: EllipticCurvePrivateKey,
        session: str,
        heartbeat: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._url, self._heartbeat = url, heartbeat
        self._public = public_key_to_bytes(node_key.public_key())
        self._client = FleetHttpClient(
            url,
            # Not Flower's check of versions: at an answer that says they differ it ends the process.
            interceptors=[_SignedByNode(node_key)],
            verify=tls,
        )
        # Flower's own client follows redirects and reads replies of any size.
        self._client._client.close()
        headers = {SESSION_HEADER: session}
        self._client._client = https_client(url, tls=tls, headers=headers)
        self._node: Node | None = None
        self._stop, self._closing = threading.Event(), threading.Lock()
        self._beating: threading.Thread | None = None

    @property
    def node_id(self) -> int:
        """The id that the coordinator gave; 0 before `connect`."""
        return int(self._node.node_id) if self._node is not None else 0

    def connect(self) -> None:
        """Activate the node and begin to send heartbeats, from a thread of their own.

        Raises
        ------
        PortUnreachable, ProxyFailed, ServerUntrusted, CoordinatorUnavailable
            Try again later.
        CoordinatorRefused
            The site is unknown or revoked there.
        """
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=self._heartbeat)
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._beating.start()

    def receive(self) -> Delivery | None:
        """The next message for this site, or None; may be held by the coordinator for a while.

        Raises
        ------
        MessageRefused
            What came is no message.
        Others
            As `connect`.
        """
        reply = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not reply.messages_list:
            return None
        if len(reply.message_object_trees) != len(reply.messages_list):
            raise MessageRefused("a message came without its list of objects")
        try:
            outline = message_from_proto(reply.messages_list[0])
        except Exception as exc:
            raise MessageRefused("what came is no message of the protocol") from exc
        return Delivery(outline, reply.message_object_trees[0])

    def fetch(self, delivery: Delivery, *, limit: int) -> Message:
        """Pull a message's objects, at most `limit` bytes of them, and build it.

        Raises
        ------
        MessageRefused
            Too large, too many objects, wrong hashes or an unknown kind of object.
        RunGone
            The run is over.
        Others
            As `connect`.
        """
        contents = self._pull(delivery, limit)
        try:
            _require_plain(contents)
            message = messages.unpack(delivery.tree.object_id, contents)
        except MessageRefused:
            raise
        except Exception as exc:
            raise MessageRefused("the objects don't make up a message") from exc
        if not message.has_content():
            raise MessageRefused("the objects make up something else than a message with content")
        if message.metadata.message_type != delivery.kind:
            raise MessageRefused("the message is of another type than announced")
        message.metadata.__dict__["_message_id"] = delivery.message_id
        self.confirm(delivery)
        return message

    def confirm(self, delivery: Delivery) -> None:
        """Tell the coordinator that the message has been received."""
        request = ConfirmMessageReceivedRequest(
            node=self._node,
            run_id=delivery.outline.metadata.run_id,
            message_object_id=delivery.tree.object_id,
        )
        self._call(self._client.ConfirmMessageReceived, request)

    def send(self, reply: Message, *, seconds: float) -> bool:
        """Push a reply: all objects, the root last, which makes it complete.

        Returns
        -------
        bool
            Whether the coordinator took it; it refuses replies to what it has withdrawn.

        Raises
        ------
        RunGone
            The run is over.
        Others
            As `connect`.
        """
        packed = messages.pack(reply)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[packed.tree],
            clientapp_runtime_list=[seconds],
        )
        for attempt in range(_PUSH_TRIES):
            answer = self._call(self._client.PushMessages, request)
            wanted = set(answer.objects_to_push)
            if packed.root not in wanted:
                return attempt > 0  # taken before, or never wanted
            stored = all(
                self._push(reply, answer.session_id, key, packed.deflate(key))
                for key in packed.objects
                if key in wanted
            )
            if stored:
                return True
        raise CoordinatorUnavailable("the coordinator does not store the objects of a reply")

    def close(self, *, goodbye: bool = True) -> None:
        """Stop the heartbeats, say goodbye if asked to and if the coordinator listens, and close."""
        with self._closing:
            if self._stop.is_set():
                return
            self._stop.set()
        if self._node is not None and goodbye:
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (httpx.HTTPError, ValueError, MessageRefused):
                logger.debug("the coordinator was not told of the end", exc_info=True)
        self._client.close()

    # --- plumbing ---

    def _pull(self, delivery: Delivery, limit: int) -> dict[str, bytes]:
        ids = _object_ids(delivery.tree)
        run_id, contents, total = delivery.outline.metadata.run_id, dict[str, bytes](), 0
        for object_id in ids:
            content = self._pull_object(run_id, object_id)
            total += len(content)
            if total > limit:
                raise MessageRefused(f"the message has more than {limit} bytes")
            if get_object_id(content) != object_id:
                raise MessageRefused("an object is not the one that was announced")
            contents[object_id] = content
        return contents

    def _pull_object(self, run_id: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        for attempt in range(_PULL_TRIES):
            reply = self._call(self._client.PullObject, request)
            if not reply.object_found:
                raise MessageRefused("an object of the message is not there")
            if reply.object_available:
                return bytes(reply.object_content)
            time.sleep(min(0.05 * 2**attempt, 1.0))
        raise CoordinatorUnavailable("an object of the message is still not there")

    def _push(self, reply: Message, session: str, object_id: str, content: bytes) -> bool:
        request = PushObjectRequest(
            node=self._node,
            run_id=reply.metadata.run_id,
            object_id=object_id,
            object_content=content,
            session_id=session,
        )
        return bool(self._call(self._client.PushObject, request).stored)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._heartbeat)
        while not self._stop.wait(0.8 * self._heartbeat):
            try:
                self._client.SendNodeHeartbeat(request)
            except (httpx.HTTPError, ValueError, MessageRefused) as exc:
                logger.warning("a heartbeat failed: %s", exc or type(exc).__name__)

    def _call(self, call: Callable[[Any], _T], request: Any) -> _T:
        """One request; every failure becomes one of silotune's errors, or `RunGone`."""
        try:
            with connection_errors(self._url):
                return call(request)
        except httpx.HTTPStatusError as exc:
            if _run_is_over(exc.response):
                raise RunGone from exc
            if exc.response.status_code == httpx.codes.CONFLICT:
                raise SessionTaken from exc
            raise failure(exc.response) from exc
        except ValueError as exc:
            raise CoordinatorUnavailable("the answer is not of the fleet protocol") from exc


def _object_ids(tree: ObjectTree) -> list[str]:
    """Every object of a tree once, children first. Raises `MessageRefused` for absurd trees."""
    pending, found = [(tree, 1)], dict[str, None]()
    while pending:
        part, level = pending.pop()
        if level > _MOST_LEVELS or len(found) + len(pending) + len(part.children) > _MOST_OBJECTS:
            raise MessageRefused("the message has too many objects")
        found[part.object_id] = None
        pending += [(child, level + 1) for child in part.children]
    return list(reversed(found))


def _require_plain(contents: dict[str, bytes]) -> None:
    """Refuse objects of kinds that no sealed message has.

    Arrays among them: one names its chunks by number, and may name one a million times.
    """
    for content in contents.values():
        kind, _, length = get_object_head_values_from_object_content(content)
        if kind not in OBJECT_KINDS or not 0 <= length <= len(content):
            raise MessageRefused("an object is of an unknown kind")


def _run_is_over(response: httpx.Response) -> bool:
    return response.status_code == httpx.codes.FORBIDDEN and b"ST-" not in response.content

"""The guard in front of everything that listens: who may ask what, before anything else sees it.

An allow-list. Three of our own routes answer without a certificate; every other one, and the eight
paths of Flower's fleet API that sites need, ask for the certificate of an active site over the TLS
connection itself. What Flower's own authentication leaves open is closed here: a reply in another
node's name, objects read or written by id across nodes, a second session of one key, requests of any
size from anybody. Flower's control and runtime API are refused whoever asks.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import DecodeError, Message
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from silotune.flower import superlink
from silotune.flower.superlink import LinkState, object_ids
from silotune.protocol import http
from silotune.protocol.envelope import OBJECT_KINDS
from silotune.server.long_poll import LongPoll
from silotune.trust.errors import BodyInvalid, BooksDisagree, FederationError, IdentityInvalid

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PEER = "silotune.peer"
"""Key of the scope under which the TLS layer puts the client's certificate (DER)."""

CALLER = "silotune.caller"
"""Key of the scope under which our own routes find the `Caller`."""

_SMALL, _LIST, _OBJECT = 16 << 10, 1 << 20, 5 << 20  # a seal's pieces are of 4 MB
_LIMITS = {
    superlink.PUSH: _LIST,
    superlink.PUSH_OBJECT: _OBJECT,
    http.AUDIT: http.MOST_BOOKS_BYTES,
    http.RESTORED: http.MOST_BOOKS_BYTES,
}
_BODY_SECONDS = 60.0
_KIND = 32  # bytes of an object that its kind is looked for in
_SESSION = re.compile(r"[0-9a-f]{32}")
_MOST_OBJECTS = 256  # some 1 GB at most


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The site at the other end of a connection."""

    site: str
    node: int
    node_key: str


class Admission(Protocol):
    """Who belongs to the federation at this moment."""

    def caller(self, certificate: bytes) -> Caller | None:
        """The active site that a certificate (DER) speaks for; None for anybody else."""
        ...


class _Nothing(Exception):
    """A request about something that is not the caller's: answered as if it did not exist.

    It need not be an attack: a message may have been withdrawn while a site was fetching it.
    """

    def __init__(self, answer: Message) -> None:
        super().__init__()
        self.answer = answer


class _Refused(Exception):
    """A request that the guard answers itself."""

    def __init__(self, status: int, error: FederationError) -> None:
        super().__init__(error.detail)
        self.status, self.error = status, error


class Guard:
    """ASGI application: Flower's fleet API and our own routes, guarded.

    Parameters
    ----------
    link : Link
        Has Flower's app, and knows what is addressed to whom.
    routes : ASGI application
        Our own routes, under `http.PREFIX`.
    admission : Admission
        Who may come in.
    alarm : callable
        ``alarm(kind, site=…)``: called for what only an attack or a mistake explains.
    serves : callable
        Whether an active site's books are the newest; one whose are not gets no message.
    """

    def __init__(
        self,
        *,
        link: LinkState,
        routes: App,
        admission: Admission,
        alarm: Callable[..., None],
        serves: Callable[[str], bool] = lambda site: True,
    ) -> None:
        self._serves = serves
        self._link, self._routes, self._admission = link, routes, admission
        self._alarm = alarm
        self._sessions: dict[int, str] = {}
        self._announced: dict[int, frozenset[str]] = {}
        self._roots: dict[int, str] = {}
        self._readable: dict[int, frozenset[str]] = {}
        self.long_poll = LongPoll()
        link.on_push(self.long_poll.wake)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of ASGI."""
        if scope["type"] == "lifespan":
            await self._link.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._serve(scope, receive, send)
        except _Nothing as nothing:
            content = nothing.answer.SerializeToString()
            await Response(content, media_type=superlink.MEDIA_TYPE)(scope, receive, send)
        except _Refused as refused:
            _log.info("refused %s: %s", scope["path"], refused.error.detail)
            body = http.Failure(code=refused.error.code, detail=refused.error.detail)
            response = Response(
                body.model_dump_json(), refused.status, media_type="application/json"
            )
            await response(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in http.OPEN_PATHS:
            body = await _read(receive, limit=http.MOST_BYTES)
            await self._routes(scope, _replay(body, receive), send)
            return
        fleet = path in superlink.REQUESTS
        if not fleet and path not in http.SITE_PATHS:
            raise _Refused(404, FederationError("there is no such path here"))
        caller = self._caller(scope)
        if fleet and not self._serves(caller.site):
            raise _Refused(403, BooksDisagree(f"{caller.site} showed older books than were signed"))
        usual = _SMALL if fleet else http.MOST_BYTES
        body = await _read(receive, limit=_LIMITS.get(path, usual))
        if not fleet:
            scope[CALLER] = caller
            await self._routes(scope, _replay(body, receive), send)
            return
        if scope["method"] != "POST":
            raise _Refused(405, BodyInvalid("the fleet API takes POST only"))
        request = _parse(path, body)
        await self._judge(path, request, caller, _session(scope))
        if path == superlink.PULL and not await self._hold(caller, receive):
            return
        await self._link.app(scope, _replay(body, receive), send)
        if path == superlink.PUSH_OBJECT and request.object_id == self._roots.get(
            caller.node, request.object_id
        ):
            self._link.arrived.fire()  # the root comes last: the reply is complete

    def _caller(self, scope: Scope) -> Caller:
        certificate = scope.get(PEER)
        if not certificate:
            raise _Refused(401, IdentityInvalid("this needs a site's certificate"))
        caller = self._admission.caller(certificate)
        if caller is None:
            raise _Refused(403, IdentityInvalid("the certificate is not of an active site"))
        return caller

    async def _hold(self, caller: Caller, receive: Receive) -> bool:
        async def ready() -> bool:
            return await run_in_threadpool(self._link.has_work, caller.node)

        # A client that left must not claim a message: it would never arrive anywhere.
        return await self.long_poll.wait(caller.node, ready=ready, receive=receive)

    # --- Flower's fleet API ---

    async def _judge(self, path: str, request: Any, caller: Caller, session: str) -> None:
        """Raise `_Refused` unless this site may ask this."""
        if path == superlink.ACTIVATE:
            if request.public_key != caller.node_key.encode():
                raise self._forged(caller, "a node key that is not the certificate's")
            self._sessions[caller.node] = session
            return
        node = request.node_id if path == superlink.DEACTIVATE else request.node.node_id
        if node != caller.node:
            raise self._forged(caller, "the node id of another site")
        if self._sessions.setdefault(caller.node, session) != session:
            self._alarm("second_session", site=caller.site)
            raise _Refused(
                409, IdentityInvalid("a newer process of this site took over; stop one of the two")
            )
        if path == superlink.PUSH:
            self._judge_reply(request, caller)
        elif path == superlink.PUSH_OBJECT:
            await self._judge_write(request, caller)
        elif path in {superlink.PULL_OBJECT, superlink.CONFIRM}:
            await self._judge_read(path, request, caller)

    def _judge_reply(self, request: Any, caller: Caller) -> None:
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise _Refused(400, BodyInvalid("one reply at a time"))
        if request.messages_list[0].metadata.src_node_id != caller.node:
            raise self._forged(caller, "a reply in another site's name")
        announced = object_ids(request.message_object_trees[0])
        if len(announced) > _MOST_OBJECTS:
            raise _Refused(413, BodyInvalid("the reply has too many objects"))
        self._announced[caller.node] = announced
        self._roots[caller.node] = request.message_object_trees[0].object_id

    async def _judge_write(self, request: Any, caller: Caller) -> None:
        if request.object_id not in self._announced.get(caller.node, frozenset()):
            # This process may be younger than the upload.
            known = await run_in_threadpool(self._link.announced_by, caller.node)
            if request.object_id not in known:
                raise _Nothing(superlink.NOT_STORED)
            self._announced[caller.node] = known
        if request.object_content[:_KIND].partition(b" ")[0].decode("latin-1") not in OBJECT_KINDS:
            # An array names its chunks, may name one a million times, and would be built here.
            raise _Refused(400, BodyInvalid("an object of a kind that no sealed message has"))

    async def _judge_read(self, path: str, request: Any, caller: Caller) -> None:
        confirms = path == superlink.CONFIRM
        asked = request.message_object_id if confirms else request.object_id
        if not confirms and asked in self._readable.get(caller.node, frozenset()):
            return
        own = await run_in_threadpool(self._link.addressed_to, caller.node)
        self._readable[caller.node] = frozenset().union(*own.values())
        if confirms and asked not in own:
            raise _Nothing(superlink.CONFIRMED)
        if not confirms and asked not in self._readable[caller.node]:
            raise _Nothing(superlink.NOT_FOUND)

    def _forged(self, caller: Caller, what: str) -> _Refused:
        self._alarm("forged_request", site=caller.site, detail=what)
        return _Refused(403, IdentityInvalid(f"{caller.site} sent {what}"))


def _session(scope: Scope) -> str:
    wanted = http.SESSION_HEADER.encode()
    found = next((v.decode("latin-1") for k, v in scope["headers"] if k == wanted), "")
    if not _SESSION.fullmatch(found):
        raise _Refused(400, BodyInvalid(f"the header {http.SESSION_HEADER} names no session"))
    return found


def _parse(path: str, body: bytes) -> Any:
    try:
        return superlink.REQUESTS[path].FromString(body)
    except DecodeError as exc:
        raise _Refused(400, BodyInvalid("not the message that this path takes")) from exc


async def _read(receive: Receive, *, limit: int) -> bytes:
    """The whole body, if it comes in time and is not too large."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise _Refused(400, BodyInvalid("the request was cut off"))
                parts.append(event.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _Refused(413, BodyInvalid(f"the request has more than {limit} bytes"))
                if not event.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as exc:
        raise _Refused(408, BodyInvalid("the request came too slowly")) from exc


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then whatever comes."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

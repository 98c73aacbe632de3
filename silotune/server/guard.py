"""The guard in front of everything that listens: who may ask what, before anything else sees it.

An allow-list. Three routes answer without a certificate; every other one asks for the certificate of
an active site over the TLS connection itself. It says alone who asks: nothing in a request can name
another site, so that none reads another's messages or answers in its name. A second session of one key
and requests of any size from anybody are refused here too. Messages are handed over by the guard itself,
with no layer between it and the link state: what an exchange costs is what two requests cost.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from silotune.errors import SilotuneError
from silotune.flower.message_frames import MOST_FRAME, read_frame
from silotune.flower.superlink import LinkState
from silotune.protocol import http
from silotune.protocol.asgi import replay
from silotune.protocol.errors import VersionsDiffer
from silotune.server.long_poll import LongPoll
from silotune.trust.errors import BodyInvalid, BooksDisagree, FederationError, IdentityInvalid

_log = logging.getLogger(__name__)

PEER = "silotune.peer"
"""Key of the scope under which the TLS layer puts the client's certificate (DER)."""

CALLER = "silotune.caller"
"""Key of the scope under which our own routes find the `Caller`."""

_SMALL = 16 << 10
_LIMITS = {
    http.PUSH: MOST_FRAME,
    http.AUDIT: http.MOST_BOOKS_BYTES,
    http.RESTORED: http.MOST_BOOKS_BYTES,
}
_BODY_SECONDS = 60.0
_AT_ONCE = 4  # requests on messages that are answered: each sealing its megabytes holds them twice
_SESSION = re.compile(r"[0-9a-f]{32}")
_JSON, _BYTES = "application/json", "application/octet-stream"


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


class _Refused(Exception):
    """A request that the guard answers itself."""

    def __init__(self, status: int, error: SilotuneError) -> None:
        super().__init__(error.detail)
        self.status, self.error = status, error


class Guard:
    """ASGI application: messages and our other routes, guarded.

    Parameters
    ----------
    link : LinkState
        Has the messages.
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
        routes: ASGIApp,
        admission: Admission,
        alarm: Callable[..., None],
        serves: Callable[[str], bool] = lambda site: True,
    ) -> None:
        self._serves = serves
        self._link, self._routes, self._admission = link, routes, admission
        self._alarm = alarm
        self._sessions: dict[int, str] = {}
        self._answering = asyncio.Semaphore(_AT_ONCE)
        self.long_poll = LongPoll()
        link.on_push(self.long_poll.wake)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event of ASGI."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._serve(scope, receive, send)
        except _Refused as refused:
            _log.info("refused %s: %s", scope["path"], refused.error.detail)
            body = http.Failure(code=refused.error.code, detail=refused.error.detail)
            response = Response(body.model_dump_json(), refused.status, media_type=_JSON)
            await response(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in http.OPEN_PATHS:
            body = await _read(receive, limit=http.MOST_BYTES)
            await self._routes(scope, replay(body, receive), send)
            return
        messages = path in http.LINK_PATHS
        if not messages and path not in http.SITE_PATHS:
            raise self._unknown(path)
        caller = self._caller(scope)
        if messages and not self._serves(caller.site):
            raise _Refused(403, BooksDisagree(f"{caller.site} showed older books than were signed"))
        usual = _SMALL if messages else http.MOST_BYTES
        body = await _read(receive, limit=_LIMITS.get(path, usual))
        if not messages:
            scope[CALLER] = caller
            await self._routes(scope, replay(body, receive), send)
            return
        if scope["method"] != "POST":
            raise _Refused(405, BodyInvalid("messages are asked for with POST only"))
        self._require_session(path, caller, _session(scope))
        if path == http.PULL:
            await self._pull(caller, receive, send)
            return
        try:
            async with self._answering:
                answer = await run_in_threadpool(self._answer, path, body, caller)
        except (BodyInvalid, ValueError) as exc:
            detail = exc.detail if isinstance(exc, BodyInvalid) else str(exc)
            raise _Refused(400, BodyInvalid(detail)) from exc
        await _send(send, answer, kind=_BYTES if path == http.PIECE else _JSON)

    def _unknown(self, path: str) -> _Refused:
        if path.startswith(http.EARLIER_PATHS):
            return _Refused(426, VersionsDiffer("this site is older than the coordinator"))
        return _Refused(404, FederationError("there is no such path here"))

    def _caller(self, scope: Scope) -> Caller:
        certificate = scope.get(PEER)
        if not certificate:
            raise _Refused(401, IdentityInvalid("this needs a site's certificate"))
        caller = self._admission.caller(certificate)
        if caller is None:
            raise _Refused(403, IdentityInvalid("the certificate is not of an active site"))
        return caller

    # --- messages ---

    def _require_session(self, path: str, caller: Caller, session: str) -> None:
        """Refuse every session but the one that began last."""
        if path == http.ACTIVATE:
            self._sessions[caller.node] = session
        elif self._sessions.setdefault(caller.node, session) != session:
            self._alarm("second_session", site=caller.site)
            raise _Refused(
                409, IdentityInvalid("a newer process of this site took over; stop one of the two")
            )

    async def _pull(self, caller: Caller, receive: Receive, send: Send) -> None:
        """Hold the request until there is an instruction, and answer with its first frame."""
        link = self._link.messages

        async def ready() -> bool:
            return link.waits_for(caller.node)

        if not await self.long_poll.wait(caller.node, ready=ready, receive=receive):
            return
        async with self._answering:  # a piece that is not in memory is read and unsealed
            frame = await run_in_threadpool(link.first_frame, caller.node)
        await _send(send, *(frame or (b"",)), kind=_BYTES)

    def _answer(self, path: str, body: bytes, caller: Caller) -> bytes:
        """What is asked of the link state; from a thread of its own."""
        done: http.Body = http.Done(status="done")
        if path == http.PUSH:
            done = http.Pushed(taken=self._link.take(caller.node, read_frame(body)))
        elif path == http.PIECE:
            query = http.parse(http.PieceQuery, body)
            return b"".join(self._link.messages.pieces(caller.node, query.message, query.number))
        elif path in {http.ACTIVATE, http.HEARTBEAT}:
            alive = http.parse(http.Activation, body)
            if abs(time.time() - alive.sent_at) > http.MOST_SKEW_SECONDS:
                raise _Refused(401, IdentityInvalid(f"the clock of {caller.site} is wrong"))
            if path == http.HEARTBEAT:
                self._link.heartbeat(caller.node, seconds=alive.seconds)
            else:
                self._link.activate(caller.node, heartbeat=alive.seconds)
                done = http.Activated(node=caller.node)
        else:
            self._link.deactivate(caller.node)
        return done.model_dump_json().encode()


async def _live(receive: Receive, send: Send) -> None:
    """There is nothing to be started or ended with the server."""
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def _send(send: Send, *parts: bytes, kind: str) -> None:
    """Answer with bytes in parts, none of which is copied to put them together."""
    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % sum(map(len, parts)))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})


def _session(scope: Scope) -> str:
    wanted = http.SESSION_HEADER.encode()
    found = next((v.decode("latin-1") for k, v in scope["headers"] if k == wanted), "")
    if not _SESSION.fullmatch(found):
        raise _Refused(400, BodyInvalid(f"the header {http.SESSION_HEADER} names no session"))
    return found


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

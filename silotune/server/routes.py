"""Our own routes for sites: thin handlers around the registrar, the conductor and the books."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from silotune.errors import SilotuneError
from silotune.federation import identity, wire
from silotune.federation.errors import BodyInvalid
from silotune.server.books import Books
from silotune.server.certificates import Certificates
from silotune.server.conductor import Conductor
from silotune.server.doorbell import Doorbell
from silotune.server.enrolment import Registrar
from silotune.server.guard import CALLER, Caller
from silotune.server.keys import Keys

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[BaseModel]]


class SiteRoutes:
    """The handlers, and what they answer from.

    Parameters
    ----------
    registrar, conductor, keys, books, certificates
        The coordinator's.
    """

    def __init__(
        self,
        *,
        registrar: Registrar,
        conductor: Conductor,
        keys: Keys,
        books: Books,
        certificates: Certificates,
    ) -> None:
        self._certificates, self._books = certificates, books
        self._registrar, self._conductor, self._keys = registrar, conductor, keys
        self.doorbell = Doorbell()

    def app(self) -> Starlette:
        """An ASGI application, to be put behind a guard."""
        table: list[tuple[str, str, Handler]] = [
            (wire.AUTHORITY, "GET", self._authority),
            (wire.ENROL, "POST", self._enrol),
            (wire.ENROLMENT, "POST", self._enrolment),
            (wire.RENEW, "POST", self._renew),
            (wire.ROSTER, "GET", self._roster),
            (wire.NEWS, "GET", self._news),
            (wire.PLANS, "GET", self._plans),
            (wire.DECISION, "POST", self._decision),
            (wire.AUDIT, "POST", self._exchange_heads),
            (wire.HEADS, "GET", self._heads),
            (wire.RESTORED, "POST", self._restored),
            (wire.CERTIFICATE, "POST", self._certificate),
            (wire.LEAVE, "POST", self._leave),
        ]
        return Starlette(
            routes=[Route(path, answering(handler), methods=[m]) for path, m, handler in table]
        )

    # --- without a certificate ---

    async def _authority(self, request: Request) -> wire.AuthorityReply:
        del request
        pem = identity.chain_pem([self._keys.authority.certificate])
        return wire.AuthorityReply(federation=self._registrar.federation, certificate=pem)

    async def _enrol(self, request: Request) -> wire.EnrolReply:
        asked = wire.parse(wire.EnrolRequest, await request.body())
        return await run_in_threadpool(self._registrar.enrol, asked)

    async def _enrolment(self, request: Request) -> wire.EnrolmentReply:
        asked = wire.parse(wire.EnrolmentQuery, await request.body())
        return await run_in_threadpool(self._registrar.enrolment, asked)

    # --- with one ---

    async def _renew(self, request: Request) -> wire.RenewReply:
        asked = wire.parse(wire.RenewRequest, await request.body())
        return await run_in_threadpool(self._registrar.renew, _caller(request), asked)

    async def _roster(self, request: Request) -> wire.RosterReply:
        after = _number(request, "after")
        return wire.RosterReply(
            rosters=await run_in_threadpool(self._registrar.rosters, after=after)
        )

    async def _news(self, request: Request) -> wire.NewsReply:
        known = (_number(request, "roster"), _number(request, "plans"))

        async def changed() -> bool:
            return known != (self._registrar.roster.version, self._conductor.version)

        site = _caller(request).site
        await self.doorbell.wait(site, ready=changed, receive=request.receive)
        return wire.NewsReply(roster=self._registrar.roster.version, plans=self._conductor.version)

    async def _plans(self, request: Request) -> wire.PlansReply:
        return await run_in_threadpool(self._conductor.plans_for, _caller(request).site)

    async def _decision(self, request: Request) -> wire.Done:
        decision = wire.parse(wire.Decision, await request.body())
        await run_in_threadpool(self._conductor.decide, _caller(request).site, decision)
        return wire.Done(status="done")

    async def _certificate(self, request: Request) -> wire.Done:
        handed = wire.parse(wire.HandedIn, await request.body())
        await run_in_threadpool(self._certificates.take, _caller(request).site, handed)
        return wire.Done(status="done")

    async def _leave(self, request: Request) -> wire.Done:
        asked = wire.parse(wire.Leave, await request.body())
        await run_in_threadpool(self._registrar.leave, _caller(request), asked)
        return wire.Done(status="done")

    async def _exchange_heads(self, request: Request) -> wire.HeadExchange:
        content = await request.body()
        theirs = wire.parse(wire.HeadExchange, content, limit=wire.MOST_BOOKS_BYTES)
        return await run_in_threadpool(self._books.exchange, _caller(request).site, theirs)

    async def _heads(self, request: Request) -> wire.SignedHeads:
        return await run_in_threadpool(self._books.heads, _caller(request).site)

    async def _restored(self, request: Request) -> wire.Done:
        content = await request.body()
        asked = wire.parse(wire.Restored, content, limit=wire.MOST_BOOKS_BYTES)
        await run_in_threadpool(self._books.restore, _caller(request).site, asked)
        return wire.Done(status="done")


def answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A Starlette endpoint that answers with the handler's body, or with its error's code."""

    async def endpoint(request: Request) -> Response:
        try:
            return _json(await handler(request), 200)
        except SilotuneError as error:
            _log.info("refused %s: %s", request.url.path, error)
            failure = wire.Failure(code=error.code, detail=error.detail[:2000])
            return _json(failure, 400 if isinstance(error, BodyInvalid) else 409)
        except Exception:
            # What went wrong inside is for the log; the other side learns that something did.
            _log.exception("failed to answer %s", request.url.path)
            failure = wire.Failure(code=SilotuneError.code, detail="internal error")
            return _json(failure, 500)

    return endpoint


def _json(body: BaseModel, status: int) -> Response:
    return Response(body.model_dump_json(), status, media_type="application/json")


def _caller(request: Request) -> Caller:
    caller: Any = request.scope[CALLER]
    assert isinstance(caller, Caller)  # the guard put it there
    return caller


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise BodyInvalid(f"{name} is not a number")
    return int(text)

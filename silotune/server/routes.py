"""Our own routes for sites: thin handlers around the registrar, the runs and the books."""

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
from silotune.protocol import http
from silotune.server.books import Books, Certificates
from silotune.server.config import CoordinatorKeys
from silotune.server.enrolment import Registrar
from silotune.server.guard import CALLER, Caller
from silotune.server.long_poll import LongPoll
from silotune.server.run_control import RunControl
from silotune.trust import identity
from silotune.trust.errors import BodyInvalid

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[BaseModel]]


class SiteRoutes:
    """The handlers, and what they answer from.

    Parameters
    ----------
    registrar, run_control, keys, books, certificates
        The coordinator's.
    """

    def __init__(
        self,
        *,
        registrar: Registrar,
        run_control: RunControl,
        keys: CoordinatorKeys,
        books: Books,
        certificates: Certificates,
    ) -> None:
        self._certificates, self._books = certificates, books
        self._registrar, self._run_control, self._keys = registrar, run_control, keys
        self.long_poll = LongPoll()

    def app(self) -> Starlette:
        """An ASGI application, to be put behind a guard."""
        table: list[tuple[str, str, Handler]] = [
            (http.AUTHORITY, "GET", self._authority),
            (http.ENROL, "POST", self._enrol),
            (http.ENROLMENT, "POST", self._enrolment),
            (http.RENEW, "POST", self._renew),
            (http.ROSTER, "GET", self._roster),
            (http.NEWS, "GET", self._news),
            (http.PLANS, "GET", self._plans),
            (http.DECISION, "POST", self._decision),
            (http.AUDIT, "POST", self._exchange_heads),
            (http.HEADS, "GET", self._heads),
            (http.RESTORED, "POST", self._restored),
            (http.CERTIFICATE, "POST", self._certificate),
            (http.LEAVE, "POST", self._leave),
        ]
        return Starlette(
            routes=[Route(path, answering(handler), methods=[m]) for path, m, handler in table]
        )

    # --- without a certificate ---

    async def _authority(self, request: Request) -> http.AuthorityReply:
        del request
        pem = identity.chain_pem([self._keys.authority.certificate])
        return http.AuthorityReply(federation=self._registrar.federation, certificate=pem)

    async def _enrol(self, request: Request) -> http.EnrolReply:
        asked = http.parse(http.EnrolRequest, await request.body())
        return await run_in_threadpool(self._registrar.enrol, asked)

    async def _enrolment(self, request: Request) -> http.EnrolmentReply:
        asked = http.parse(http.EnrolmentQuery, await request.body())
        return await run_in_threadpool(self._registrar.enrolment, asked)

    # --- with one ---

    async def _renew(self, request: Request) -> http.RenewReply:
        asked = http.parse(http.RenewRequest, await request.body())
        return await run_in_threadpool(self._registrar.renew, _caller(request), asked)

    async def _roster(self, request: Request) -> http.RosterReply:
        after = _number(request, "after")
        return http.RosterReply(
            rosters=await run_in_threadpool(self._registrar.rosters, after=after)
        )

    async def _news(self, request: Request) -> http.NewsReply:
        known = (_number(request, "roster"), _number(request, "plans"))

        async def changed() -> bool:
            return known != (self._registrar.roster.version, self._run_control.version)

        site = _caller(request).site
        await self.long_poll.wait(site, ready=changed, receive=request.receive)
        return http.NewsReply(
            roster=self._registrar.roster.version, plans=self._run_control.version
        )

    async def _plans(self, request: Request) -> http.PlansReply:
        return await run_in_threadpool(self._run_control.plans_for, _caller(request).site)

    async def _decision(self, request: Request) -> http.Done:
        decision = http.parse(http.Decision, await request.body())
        await run_in_threadpool(self._run_control.decide, _caller(request).site, decision)
        return http.Done(status="done")

    async def _certificate(self, request: Request) -> http.Done:
        handed = http.parse(http.HandedIn, await request.body())
        await run_in_threadpool(self._certificates.take, _caller(request).site, handed)
        return http.Done(status="done")

    async def _leave(self, request: Request) -> http.Done:
        asked = http.parse(http.Leave, await request.body())
        await run_in_threadpool(self._registrar.leave, _caller(request), asked)
        return http.Done(status="done")

    async def _exchange_heads(self, request: Request) -> http.HeadExchange:
        content = await request.body()
        theirs = http.parse(http.HeadExchange, content, limit=http.MOST_BOOKS_BYTES)
        return await run_in_threadpool(self._books.exchange, _caller(request).site, theirs)

    async def _heads(self, request: Request) -> http.SignedHeads:
        return await run_in_threadpool(self._books.heads, _caller(request).site)

    async def _restored(self, request: Request) -> http.Done:
        content = await request.body()
        asked = http.parse(http.Restored, content, limit=http.MOST_BOOKS_BYTES)
        await run_in_threadpool(self._books.restore, _caller(request).site, asked)
        return http.Done(status="done")


def answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A Starlette endpoint that answers with the handler's body, or with its error's code."""

    async def endpoint(request: Request) -> Response:
        try:
            return _json(await handler(request), 200)
        except SilotuneError as error:
            _log.info("refused %s: %s", request.url.path, error)
            failure = http.Failure(code=error.code, detail=error.detail[:2000])
            return _json(failure, 400 if isinstance(error, BodyInvalid) else 409)
        except Exception:
            # What went wrong inside is for the log; the other side learns that something did.
            _log.exception("failed to answer %s", request.url.path)
            failure = http.Failure(code=SilotuneError.code, detail="internal error")
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

"""The gRPC admin API: mutual TLS, two roles, every action audited (``control.proto``)."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from silotune.errors import FileNotOffered, PlanError, RunNotFound, SilotuneError
from silotune.events.source import Batch, Feed, Row, RunFacts, Views
from silotune.server.admin.client import SERVICE, compiled
from silotune.server.admin.operations import Operations
from silotune.server.config import CoordinatorKeys
from silotune.server.errors import PortTaken
from silotune.trust import identity
from silotune.trust.errors import IdentityInvalid, NotPermitted, SignInNeeded
from silotune.trust.identity import Person

_log = logging.getLogger(__name__)

_PIECE = 1 << 20
_RECHECK_SECONDS = 30.0
_START_SECONDS = 30.0
_SHARED = 64
_STATUS: tuple[tuple[type[SilotuneError], grpc.StatusCode], ...] = (
    (SignInNeeded, grpc.StatusCode.UNAUTHENTICATED),
    (NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (RunNotFound, grpc.StatusCode.NOT_FOUND),
    (FileNotOffered, grpc.StatusCode.NOT_FOUND),
    (PlanError, grpc.StatusCode.INVALID_ARGUMENT),
    (SilotuneError, grpc.StatusCode.FAILED_PRECONDITION),
)

Method = Callable[..., Any]


class ControlServer:
    """The API, served from a thread of its own.

    Parameters
    ----------
    operations : Operations
        Answers and acts, and knows whose certificates count.
    keys : CoordinatorKeys
        The federation's: the server's certificate, and the authority that client certificates need.
    host, port
        Where to listen; port 0 takes a free one.

    Attributes
    ----------
    port : int
        The port, once started.
    """

    def __init__(
        self, *, operations: Operations, keys: CoordinatorKeys, host: str, port: int
    ) -> None:
        self._operations, self._keys = operations, keys
        self._address, self.port = f"[{host}]" if ":" in host else host, port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._ready = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._main, daemon=True, name="control")

    def start(self) -> None:
        """Serve. Raises `PortTaken`."""
        self._thread.start()
        if not self._ready.wait(_START_SECONDS) or self._error is not None:
            raise PortTaken(f"{self._address}:{self.port}: {self._error or 'no answer'}")

    def stop(self) -> None:
        """End every stream, and stop."""
        if self._loop is not None and self._ending is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(timeout=10.0)

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as exc:
            self._error = exc
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        _, stubs = compiled()
        servicer = _servicer(stubs.ControlServicer, self._operations, self._person)
        stubs.add_ControlServicer_to_server(servicer, server)
        checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        self.port = server.add_secure_port(f"{self._address}:{self.port}", self._credentials())
        await server.start()
        self._ready.set()
        await self._ending.wait()
        await server.stop(grace=0.5)

    def _credentials(self) -> grpc.ServerCredentials:
        chain = identity.chain_pem([self._keys.server_certificate]).encode()
        pair = (identity.private_pem(self._keys.server_key), chain)
        authority = identity.chain_pem([self._keys.authority.certificate]).encode()
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=True)

    def _person(self, context: Any) -> Person:
        """Who asks; TLS has proved possession of the key. Raises `SignInNeeded`."""
        shown = context.auth_context().get("x509_pem_cert") or [b""]
        try:
            certificate = identity.certificate_from_pem(shown[0])
        except IdentityInvalid as exc:
            raise SignInNeeded("no certificate was shown") from exc
        return self._operations.holder(certificate)


def _servicer(base: type[Any], operations: Operations, person_of: Callable[[Any], Person]) -> Any:
    """The service's methods over the operations, on the class that was compiled."""
    methods = {name: method for name, method in vars(_Methods).items() if not name.startswith("__")}
    return type("Servicer", (base,), methods)()._bind(operations, person_of)


def _answers(method: Method) -> Method:
    """A unary method: ``method(self, person, request)``, run in a thread."""

    @functools.wraps(method)
    async def handler(self: Any, request: Any, context: Any) -> Any:
        def answer() -> Any:
            return method(self, self._person_of(context), request)

        return await _told(asyncio.to_thread(answer), context)

    return handler


async def _told(work: Awaitable[Any], context: Any) -> Any:
    """The result; an error ends the call with its status, code and remedy."""
    try:
        return await work
    except SilotuneError as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        said = {"code": error.code, "detail": error.detail[:1500], "remedy": error.remedy}
        await context.abort(status, json.dumps(said))
    except Exception as exc:
        if isinstance(exc, grpc.aio.AbortError | asyncio.CancelledError):
            raise
        _log.exception("a call of the admin API failed")
        said = {"code": SilotuneError.code, "detail": type(exc).__name__}
        await context.abort(grpc.StatusCode.INTERNAL, json.dumps(said))


class _Methods:
    """One method a call of the service; `_servicer` puts them on the compiled class."""

    def _bind(self, operations: Operations, person_of: Callable[[Any], Person]) -> Any:
        self._operations, self._person_of = operations, person_of
        self._source = operations.source
        self._feed, self._views = Feed(operations.source), Views(operations.source)
        self._federation = Feed(operations.log)
        # Every watcher gets the same message; it is made once.
        self._reply = functools.lru_cache(maxsize=_SHARED)(self._reply_of)
        self._messages: Any = compiled()[0]
        return self

    # --- runs ---

    @_answers
    def ListRuns(self, person: Person, request: Any) -> Any:  # noqa: N802 - the .proto's name
        """Every run, newest first."""
        del person, request
        rows = [self._run(facts) for facts in self._source.runs()]
        return self._messages.ListRunsReply(runs=rows)

    @_answers
    def GetRun(self, person: Person, request: Any) -> Any:  # noqa: N802
        """One run, with its sites and files."""
        del person
        return self._shown(request.run)

    @_answers
    def SubmitRun(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Propose a plan; refused for viewers, as each action below."""
        quorum = request.quorum if request.HasField("quorum") else None
        return self._shown(self._operations.submit(person, request.plan, quorum=quorum)["run"])

    @_answers
    def PauseRun(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Hold a run after its round."""
        self._operations.pause(person, request.run)
        return self._shown(request.run)

    @_answers
    def ResumeRun(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Go on with a run."""
        self._operations.resume(person, request.run)
        return self._shown(request.run)

    @_answers
    def StopRun(self, person: Person, request: Any) -> Any:  # noqa: N802
        """End a run for good."""
        self._operations.stop(person, request.run)
        return self._shown(request.run)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream batches; a certificate that was revoked meanwhile ends it."""
        await _told(asyncio.to_thread(self._person_of, context), context)
        checked = time.monotonic()
        feed = self._feed if request.run else self._federation
        batches = feed.follow(request.run, after=request.after)
        try:
            while True:
                batch = await _told(anext(batches, None), context)
                if batch is None:
                    return
                if time.monotonic() - checked > _RECHECK_SECONDS:
                    await _told(asyncio.to_thread(self._person_of, context), context)
                    checked = time.monotonic()
                yield self._reply(batch)
        finally:
            await batches.aclose()

    # --- sites ---

    @_answers
    def ListSites(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Every site that is or was a member."""
        del person, request
        rows = [self._messages.Site(**asdict(row)) for row in self._operations.sites()]
        return self._messages.ListSitesReply(sites=rows)

    @_answers
    def RevokeSite(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Shut a site out."""
        self._operations.revoke(person, request.site, reason=request.reason[:500])
        return self._messages.Done(target=request.site)

    @_answers
    def ListEnrolments(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Requests to be enrolled."""
        del person, request
        rows = [self._messages.Enrolment(**asdict(row)) for row in self._operations.requests()]
        return self._messages.ListEnrolmentsReply(enrolments=rows)

    @_answers
    def ApproveEnrolment(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Let a site in."""
        found = self._operations.approve(person, request.request)
        return self._messages.Done(target=found["site"])

    @_answers
    def RefuseEnrolment(self, person: Person, request: Any) -> Any:  # noqa: N802
        """Turn a site away."""
        reason = request.reason[:500]
        found = self._operations.refuse(person, request.request, reason=reason)
        return self._messages.Done(target=found["site"])

    # --- files and actions ---

    async def Download(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream a file."""

        def read() -> bytes:
            return self._operations.download(self._person_of(context), request.run, request.file)

        content: bytes = await _told(asyncio.to_thread(read), context)
        for start in range(0, len(content), _PIECE):
            yield self._messages.Piece(content=content[start : start + _PIECE])

    @_answers
    def ListActions(self, person: Person, request: Any) -> Any:  # noqa: N802
        """What people did."""
        del person, request
        rows = [self._messages.Action(**row) for row in self._operations.actions()]
        return self._messages.ListActionsReply(actions=rows)

    # --- parts ---

    def _run(self, facts: RunFacts, **more: Any) -> Any:
        shown = {key: value for key, value in vars(facts).items() if key != "plan"}
        shown["proposed_at"] = facts.proposed_at or 0.0
        return self._messages.Run(**shown, **more)

    def _shown(self, run: str) -> Any:
        facts = self._source.facts(run)
        files = [offer.name for offer in self._source.files(run)]
        with self._views.lock:
            sites = [
                self._messages.RunSite(
                    site=site.name,
                    state=site.state,
                    code=site.code,
                    detail=site.detail,
                    replied=site.replied,
                    failed=site.failed,
                    epsilon=site.epsilon,
                )
                for site in self._views.get(run).sites.values()
            ]
        return self._run(facts, sites=sites, files=files)

    def _reply_of(self, batch: Batch) -> Any:
        return self._messages.WatchReply(events=map(self._event, batch.rows), state=batch.state)

    def _event(self, row: Row) -> Any:
        text = json.dumps(row, separators=(",", ":"))
        return self._messages.Event(id=row["id"], time=row["time"], event=row["event"], json=text)

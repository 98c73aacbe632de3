"""The pages and their routes, over any source of runs and, for a coordinator, its operations.

A simulation has no operations. People sign in with a password, a person's certificate, or the link that
a command printed.
"""

from __future__ import annotations

import hmac
import json
import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Protocol
from urllib.parse import quote

from fastapi import FastAPI
from jinja2 import DictLoader, Environment, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.types import ASGIApp, Scope

from silotune.dashboard import run_page as words
from silotune.dashboard.accounts import AttemptLimit, Session
from silotune.dashboard.errors import PageUnknown, TooManyAttempts
from silotune.dashboard.page_guard import FORM, SESSION, Access, PageGuard, certificate_of
from silotune.dashboard.run_page import RunPage, RunRow, Spending, run_page, run_row
from silotune.errors import FileNotOffered, RunNotFound, SilotuneError
from silotune.events.source import (
    OVER,
    Batch,
    Feed,
    RequestFacts,
    Row,
    RunFacts,
    SiteFacts,
    Source,
    Views,
)
from silotune.percents import percent
from silotune.plan.plan import stored_plan_in_words
from silotune.trust.errors import SignInNeeded
from silotune.trust.identity import Person
from silotune.version import __version__


class SignIn:
    """Routes of signing in and out.

    Parameters
    ----------
    access : Access
        Accounts, certificates and sessions.
    templates : Templates
        The page.
    title : str
        The federation's name.
    operations : PageOperations or None
        Told who came in.
    """

    def __init__(
        self, access: Access, templates: Templates, *, title: str, operations: PageOperations | None
    ) -> None:
        self._access, self._templates, self._title = access, templates, title
        self._operations = operations
        self._limit = AttemptLimit()

    def add_to(self, app: FastAPI) -> None:
        """Register the routes."""
        page: dict[str, Any] = {"response_class": HTMLResponse}
        app.add_api_route("/signin", self.show, methods=["GET"], **page)
        app.add_api_route("/signin", self.enter, methods=["POST"], **page)
        app.add_api_route("/signout", self.leave, methods=["POST"], **page)

    def show(self, request: Request, link: str = "") -> Response:
        """The form; a right link needs none."""
        if link:
            address = _address(request)
            self._limit.require_open(address)
            if self._access.link is not None and self._access.link.fits(link[:200]):
                return self._welcome(request, self._access.link.person, how="link")
            self._limit.failed(address)
            return self._form("This link is not valid any more.", 401)
        return self._form("", 200)

    def enter(self, request: Request) -> Response:
        """Check a password or a certificate."""
        form = request.scope[FORM]
        if form.get("how") == "certificate":
            return self._by_certificate(request)
        name, password = form.get("name", "")[:63], form.get("password", "")
        keys = (f"account {name}", _address(request))
        try:
            self._limit.require_open(*keys)
        except TooManyAttempts as exc:
            return self._form(f"Too many attempts: {exc.detail}.", 429)
        accounts = self._access.accounts
        person = accounts.check(name, password) if accounts else None
        if accounts is None or person is None:
            self._limit.failed(*keys)
            return self._form("Name or password is wrong.", 401)
        self._limit.succeeded(*keys)
        return self._welcome(
            request, person, how="password", valid=lambda: accounts.current(person)
        )

    def leave(self, request: Request) -> Response:
        """Sign out."""
        self._access.sessions.end(request.cookies.get(self._access.cookie, ""))
        response = RedirectResponse("/signin", 303)
        response.delete_cookie(self._access.cookie, path="/")
        return response

    def _by_certificate(self, request: Request) -> Response:
        certificate, holder = certificate_of(request.scope), self._access.holder
        try:
            if certificate is None or holder is None:
                raise SignInNeeded("the browser showed no certificate")
            person = holder(certificate)
        except SignInNeeded as exc:
            return self._form(f"Not signed in: {exc.detail}.", 401)

        def valid() -> bool:
            with suppress(SignInNeeded):
                return holder(certificate) == person
            return False

        return self._welcome(request, person, how="certificate", valid=valid)

    def _welcome(
        self,
        request: Request,
        person: Person,
        *,
        how: str,
        valid: Callable[[], bool] = lambda: True,
    ) -> Response:
        if request.scope[SESSION] is not None:  # a new session for a new sign-in, always
            self._access.sessions.end(request.cookies.get(self._access.cookie, ""))
        if self._operations is not None:
            self._operations.signed_in(person, how=how)
        response = RedirectResponse("/", 303)
        self._access.set_cookie(response, self._access.sessions.begin(person, valid=valid))
        return response

    def _form(self, message: str, status: int) -> Response:
        text = self._templates.render(
            "signin.html",
            title=self._title,
            session=None,
            coordinator=False,
            message=message,
            passwords=self._access.accounts is not None,
            certificates=self._access.holder is not None,
        )
        return HTMLResponse(text, status)


def _address(request: Request) -> str:
    return f"address {request.client.host if request.client else 'unknown'}"


_STATIC = ("dashboard.css", "dashboard.js", "icon.svg")
_MOST_COMPARED = 4
_RECENT_SECONDS = 24 * 3600.0
_SECTIONS = ("head", "lanes", "charts", "sites", "troubles")


@dataclass(frozen=True, kw_only=True)
class Content:
    """What the pages show.

    Attributes
    ----------
    title : str
        The federation's name, or that of a folder of simulations.
    source : Source
        Runs.
    operations : PageOperations or None
        A running coordinator's; None for simulations.
    metrics : callable or None
        Prometheus's text.
    metrics_token : str
        What Prometheus has to show; empty: it needs a session, as everybody.
    """

    title: str
    source: Source
    operations: PageOperations | None = None
    metrics: Callable[[], bytes] | None = None
    metrics_token: str = ""


class Templates:
    """The package's own templates; every value is escaped."""

    def __init__(self) -> None:
        # Files of this package, and autoescape is on for every value they print.
        self._environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._environment.filters |= {"ago": words.ago, "clock": words.clock, "percent": percent}
        self._environment.filters["path"] = lambda text: quote(str(text), safe="")
        folder = files("silotune.dashboard") / "templates"
        sources = {
            f.name: f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith("html")
        }
        self._environment.loader = DictLoader(sources)

    def render(self, template: str, **values: Any) -> str:
        """A page as text."""
        return self._environment.get_template(template).render(version=__version__, **values)


def build(content: Content, access: Access) -> ASGIApp:
    """The whole application, with the doorman in front."""
    templates = Templates()
    pages = Pages(content, access, templates)
    app = FastAPI(title="silotune dashboard", docs_url=None, redoc_url=None, openapi_url=None)
    pages.add_to(app)
    SignIn(access, templates, title=content.title, operations=content.operations).add_to(app)
    app.state.pages = pages

    def failure(scope: Scope, error: SilotuneError, status: int) -> Response:
        return pages.failure(scope.get(SESSION), error, status)

    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, SilotuneError)
        status = 404 if isinstance(error, RunNotFound | FileNotOffered | PageUnknown) else 409
        return failure(dict(request.scope), error, status)

    app.add_exception_handler(SilotuneError, told)
    return PageGuard(app, access=access, failure=failure)


class Pages:
    """Handlers of the pages about runs, sites and people."""

    def __init__(self, content: Content, access: Access, templates: Templates) -> None:
        self._content, self._access, self._templates = content, access, templates
        self._source, self._operations = content.source, content.operations
        self._views, self._spending = Views(content.source), Spending()
        self._glances: dict[tuple[str, str, int], RunRow] = {}
        self._feed: Feed | None = None

    def add_to(self, app: FastAPI) -> None:
        """Register every route."""
        get: dict[str, Any] = {"methods": ["GET"], "response_class": HTMLResponse}
        app.add_api_route("/", self.overview, **get)
        app.add_api_route("/runs/{run}", self.run, **get)
        app.add_api_route("/runs/{run}/live", self.live, methods=["GET"])
        app.add_api_route("/runs/{run}/stream", self.stream, methods=["GET"])
        app.add_api_route("/runs/{run}/files/{name}", self.file, methods=["GET"])
        app.add_api_route("/compare", self.compare, **get)
        app.add_api_route("/static/{name}", self.static, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        if self._operations is not None:
            app.add_api_route("/sites", self.sites, **get)
            app.add_api_route("/actions", self.actions, **get)
            post: dict[str, Any] = {"methods": ["POST"], "openapi_extra": FORM_BODY}
            app.add_api_route("/runs/{run}/{action}", self.act, **post)
            app.add_api_route("/enrolments/{number}/{action}", self.decide, **post)
            app.add_api_route("/sites/{site}/revoke", self.revoke, **post)

    # --- pages ---

    def overview(self, request: Request) -> Response:
        """Every run, and who is there."""
        asked = self._operations
        sites = asked.sites() if asked else []
        recent = time.time() - _RECENT_SECONDS
        alarms = [row for row in asked.alarms() if row["time"] > recent] if asked else []
        waiting = [r for r in asked.requests() if r.state == "waiting"] if asked else []
        return self._page(
            request,
            "overview.html",
            runs=(runs := self._source.runs()),
            glances=[self._glance(facts) for facts in runs],
            sites=[site for site in sites if site.status == "active"],
            waiting=waiting,
            alarms=alarms,
        )

    def run(self, request: Request, run: str) -> Response:
        """One run."""
        page = self._run_page(run)
        return self._page(
            request,
            "run.html",
            page=page,
            sections=self._sections(page),
            plan=stored_plan_in_words(page.facts.plan),
            files=self._source.files(run),
        )

    def live(self, run: str) -> Response:
        """The parts of the run page that change, as HTML."""
        page = self._run_page(run)
        return JSONResponse(
            {"id": page.last_id, "state": page.state, "sections": self._sections(page)}
        )

    async def stream(self, request: Request, run: str, after: int = 0) -> Response:
        """Server-sent events: each event of the run as it comes, as in ``events.jsonl``."""
        last = request.headers.get("last-event-id", "")
        after = int(last) if last.isdecimal() and len(last) < 19 else max(0, after)
        await run_in_threadpool(self._source.facts, run)
        self._feed = self._feed or Feed(self._source)
        messages = self._messages(self._feed, request, run, min(after, 2**62))
        return StreamingResponse(messages, media_type="text/event-stream")

    async def _messages(
        self, feed: Feed, request: Request, run: str, after: int
    ) -> AsyncIterator[str]:
        cookie = request.cookies.get(self._access.cookie, "")
        batches = feed.follow(run, after=after, keep_alive=15.0)
        try:
            async for batch in batches:
                if self._access.sessions.find(cookie, touch=False) is None:
                    return
                yield _as_messages(batch)
            yield "event: over\ndata: {}\n\n"
        finally:
            await batches.aclose()

    def file(self, request: Request, run: str, name: str) -> Response:
        """A file to keep; never shown in the page's own origin."""
        person = self._session(request).person
        if self._operations is not None:
            content = self._operations.download(person, run, name)
        else:
            content = self._source.read(run, name)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"content-disposition": f'attachment; filename="{quote(run)}-{quote(name)}"'}
        return Response(content, media_type=kind, headers=headers)

    def compare(self, request: Request) -> Response:
        """Several runs side by side."""
        chosen = list(dict.fromkeys(request.query_params.getlist("run")))[:_MOST_COMPARED]
        pages = [self._run_page(run, wait=True) for run in chosen]  # it does not follow the runs
        with self._views.lock:
            views = {run: self._views.get(run) for run in chosen}
            compared = words.compared(pages, views)
        return self._page(
            request, "compare.html", runs=self._source.runs(), chosen=chosen, **compared
        )

    def sites(self, request: Request) -> Response:
        """Sites, and requests to be enrolled."""
        assert self._operations is not None
        return self._page(
            request,
            "sites.html",
            sites=self._operations.sites(),
            requests=self._operations.requests(),
        )

    def actions(self, request: Request) -> Response:
        """What people did."""
        assert self._operations is not None
        done, alarms = self._operations.actions(), self._operations.alarms()
        return self._page(request, "actions.html", actions=done, alarms=alarms)

    @staticmethod
    def static(name: str) -> Response:
        """Our own style sheet and script."""
        if name not in _STATIC:
            raise PageUnknown(f"{name[:80]!r}")
        return Response(_asset(name), media_type=mimetypes.guess_type(name)[0])

    def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        token, given = self._content.metrics_token, request.headers.get("authorization", "")
        known = bool(token) and hmac.compare_digest(given.encode(), f"Bearer {token}".encode())
        if not known and request.scope[SESSION] is None:
            return Response("a token or a session is needed\n", 401)
        if self._content.metrics is None:
            raise PageUnknown("there are no metrics here")
        return Response(self._content.metrics(), media_type="text/plain; version=0.0.4")

    # --- actions ---

    def act(self, request: Request, run: str, action: str) -> Response:
        """Pause, resume or stop a run."""
        asked = self._operations
        assert asked is not None
        known = {"pause": asked.pause, "resume": asked.resume, "stop": asked.stop}
        if action not in known:
            raise PageUnknown(f"{action[:40]!r} is nothing that can be done with a run")
        known[action](self._session(request).person, run)
        return RedirectResponse(f"/runs/{quote(run, safe='')}", 303)

    def decide(self, request: Request, number: str, action: str) -> Response:
        """Approve or refuse a request to be enrolled."""
        assert self._operations is not None
        person = self._session(request).person
        if action == "approve":
            self._operations.approve(person, number)
        elif action == "refuse":
            reason = request.scope[FORM].get("reason", "")[:500]
            self._operations.refuse(person, number, reason=reason)
        else:
            raise PageUnknown(f"{action[:40]!r} is nothing that can be done with a request")
        return RedirectResponse("/sites", 303)

    def revoke(self, request: Request, site: str) -> Response:
        """Shut a site out."""
        assert self._operations is not None
        reason = request.scope[FORM].get("reason", "")[:500]
        self._operations.revoke(self._session(request).person, site, reason=reason)
        return RedirectResponse("/sites", 303)

    # --- parts ---

    def failure(self, session: Session | None, error: SilotuneError, status: int) -> Response:
        """A page that tells an error with its cause and remedy."""
        return HTMLResponse(self._render("error.html", session, error=error), status)

    def _run_page(self, run: str, *, wait: bool = False) -> RunPage:
        facts = self._source.facts(run)
        with self._views.lock:
            view = self._views.get(run)
            return run_page(facts, view, self._spending.curves(facts, view, wait=wait))

    def _glance(self, facts: RunFacts) -> RunRow:
        """A run's line in the list; of a run that is over it is kept, whatever else is watched."""
        key = (facts.run, facts.state, facts.round)
        if key in self._glances:
            return self._glances[key]
        with self._views.lock:
            view = self._views.get(facts.run)
            spent = self._spending.spent(facts, view)
            found = run_row(facts, view, spent)
        if facts.state in OVER and (spent or facts.planned_epsilon is None):
            self._glances[key] = found
        return found

    def _sections(self, page: RunPage) -> dict[str, str]:
        return {name: self._templates.render(f"part_{name}.html", page=page) for name in _SECTIONS}

    def _session(self, request: Request) -> Session:
        session = request.scope[SESSION]
        assert isinstance(session, Session)  # the doorman lets nobody else through
        return session

    def _page(self, request: Request, template: str, **values: Any) -> Response:
        return HTMLResponse(self._render(template, self._session(request), **values))

    def _render(self, template: str, session: Session | None, **values: Any) -> str:
        coordinator = self._operations is not None
        return self._templates.render(
            template, title=self._content.title, session=session, coordinator=coordinator, **values
        )


FORM_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "properties": {"token": {"type": "string"}, "reason": {"type": "string"}},
                }
            }
        }
    }
}


@lru_cache(maxsize=64)
def _as_messages(batch: Batch) -> str:
    """Server-sent events of a batch, made once for all who watch; a comment if there are none."""
    lines = (f"id: {row['id']}\ndata: {json.dumps(row)}\n\n" for row in batch.rows)
    return "".join(lines) or ": still here\n\n"


@cache
def _asset(name: str) -> bytes:
    return (files("silotune.dashboard") / "static" / name).read_bytes()


class PageOperations(Protocol):
    """Those of the coordinator's operations that pages have: each act judges and notes who did it."""

    def sites(self) -> Sequence[SiteFacts]:
        """Every site."""
        ...

    def requests(self) -> Sequence[RequestFacts]:
        """Requests to be enrolled, newest first."""
        ...

    def alarms(self) -> Sequence[Row]:
        """Events of kind ``alarm``, newest first."""
        ...

    def actions(self) -> Sequence[Row]:
        """What people did, newest first."""
        ...

    def pause(self, person: Person, run: str, /) -> object:
        """Hold a run."""
        ...

    def resume(self, person: Person, run: str, /) -> object:
        """Go on with a run."""
        ...

    def stop(self, person: Person, run: str, /) -> object:
        """End a run."""
        ...

    def approve(self, person: Person, request: str, /) -> object:
        """Let a site in."""
        ...

    def refuse(self, person: Person, request: str, /, *, reason: str) -> object:
        """Turn a site away."""
        ...

    def revoke(self, person: Person, site: str, /, *, reason: str) -> object:
        """Shut a site out."""
        ...

    def download(self, person: Person, run: str, name: str, /) -> bytes:
        """A file of a run."""
        ...

    def signed_in(self, person: Person, *, how: str) -> None:
        """Note that somebody came in."""
        ...

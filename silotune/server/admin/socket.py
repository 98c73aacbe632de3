"""The operator's interface: JSON over a Unix socket that only the coordinator's account may open.

Routes of the admin socket for people: issue a certificate, list, revoke.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from silotune.errors import SilotuneError
from silotune.plan.plan import Plan
from silotune.plan.sections import Name
from silotune.protocol.http import Body, Failure, parse
from silotune.rounds.exchange import packed
from silotune.server.enrolment import INVITE_SECONDS
from silotune.server.errors import NotPossibleNow
from silotune.server.long_poll import HOLD_SECONDS
from silotune.server.store.people import People
from silotune.trust import identity
from silotune.trust.roster import Pem

if TYPE_CHECKING:
    from silotune.server.coordinator import Coordinator


class PersonBody(Body):
    """Who asks for a certificate, and for which key."""

    name: Name
    role: Literal["viewer", "operator"]
    request: Pem


class PeopleRoutes:
    """Handlers over a running coordinator, for who may open its socket."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._people = People(coordinator.store)

    def all(self) -> list[dict[str, Any]]:
        """Everybody who has or had a certificate."""
        return [dict(row) for row in self._people.all()]

    async def issue(self, request: Request) -> Response:
        """Sign a person's certificate request."""
        asked = parse(PersonBody, await request.body())
        return JSONResponse(await run_in_threadpool(self._issue, asked))

    async def revoke(self, request: Request) -> Response:
        """Let a person's certificate count no more."""
        name = request.path_params["name"]
        await run_in_threadpool(self._people.revoke, name)
        self._coordinator.audit.append("person_revoked", name=name)
        return JSONResponse({"name": name, "status": "revoked"})

    def _issue(self, asked: PersonBody) -> dict[str, Any]:
        coordinator = self._coordinator
        authority = coordinator.keys.authority
        certificate = self._people.issue(authority, asked.request, name=asked.name, role=asked.role)
        coordinator.audit.append("person_added", name=asked.name, role=asked.role)
        return {
            "certificate": identity.chain_pem([certificate]),
            "authority": identity.chain_pem([authority.certificate]),
            "address": coordinator.control_address,
            "server_name": coordinator.config.listen.hosts[0],
        }


_MOST_PLAN_BYTES = 1 << 20
_LOOK_SECONDS = 1.0

Answer = Callable[..., Any]


class InviteBody(Body):
    """Whom to invite, and for how long."""

    site: Name
    lifetime: float = Field(INVITE_SECONDS, gt=0.0)
    rotate: bool = False


class ReasonBody(Body):
    """Why, for the other side and the audit log."""

    reason: str = Field("", max_length=500)


class RunBody(Body):
    """A plan to propose: its canonical JSON."""

    plan: str
    quorum: int | None = Field(None, ge=1)


class AdminRoutes:
    """Handlers over a running coordinator.

    Parameters
    ----------
    coordinator : Coordinator
        Answers and acts.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._closing = False

    def close(self) -> None:
        """Hold no request any longer."""
        self._closing = True
        self._coordinator.conductor.events.fire()

    def app(self) -> Starlette:
        """An ASGI application for a socket that nobody else can open."""
        people = PeopleRoutes(self._coordinator)
        table: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/status", _plain(self._coordinator.status)),
            ("POST", "/invites", self._invite),
            ("GET", "/requests", _plain(self._requests)),
            ("POST", "/requests/{name}/approve", self._approve),
            ("POST", "/requests/{name}/refuse", self._refuse),
            ("GET", "/sites", _plain(self._sites)),
            ("POST", "/sites/{name}/revoke", self._revoke),
            ("POST", "/runs", self._propose),
            ("GET", "/runs", _plain(self._runs)),
            ("GET", "/runs/{name}", self._run),
            ("GET", "/runs/{name}/events", self._events),
            ("GET", "/runs/{name}/plan", self._plan),
            ("GET", "/runs/{name}/adapter", self._adapter),
            ("POST", "/runs/{name}/{action:str}", self._act),
            ("GET", "/people", _plain(people.all)),
            ("POST", "/people", people.issue),
            ("POST", "/people/{name}/revoke", people.revoke),
        ]
        return Starlette(
            routes=[Route(path, _safe(handler), methods=[m]) for m, path, handler in table]
        )

    # --- sites ---

    async def _invite(self, request: Request) -> Response:
        asked = parse(InviteBody, await request.body())
        code = await run_in_threadpool(
            self._coordinator.registrar.invite,
            asked.site,
            url=self._coordinator.url,
            lifetime=asked.lifetime,
            rotate=asked.rotate,
        )
        return JSONResponse(
            {"site": asked.site, "code": code, "expires": time.time() + asked.lifetime}
        )

    def _requests(self) -> list[dict[str, Any]]:
        from silotune.trust.identity import six_words

        return [
            {
                "request": row["id"],
                "site": row["site"],
                "state": row["state"],
                "reason": row["reason"],
                "requested_at": row["requested_at"],
                "words": six_words(
                    name=row["site"], signing_key=row["signing_key"], node_key=row["node_key"]
                ),
            }
            for row in self._coordinator.registrar.requests()
        ]

    async def _approve(self, request: Request) -> Response:
        number = self._find_request(request.path_params["name"])
        member = await run_in_threadpool(self._coordinator.registrar.approve, number)
        return JSONResponse({"site": member.name, "state": "approved", "words": member.words})

    async def _refuse(self, request: Request) -> Response:
        number = self._find_request(request.path_params["name"])
        asked = parse(ReasonBody, await request.body())
        site = await run_in_threadpool(
            self._coordinator.registrar.refuse, number, reason=asked.reason
        )
        return JSONResponse({"site": site, "state": "refused"})

    def _find_request(self, name: str) -> str:
        """A request by its id, or by its site's name if one waits."""
        rows = self._coordinator.registrar.requests()
        waiting = [r["id"] for r in rows if r["site"] == name and r["state"] == "waiting"]
        if len(waiting) > 1:
            raise NotPossibleNow(
                f"{len(waiting)} requests of {name!r} wait",
                remedy="Give the id of one: `silotune coordinator requests` lists them.",
            )
        return waiting[0] if waiting else name

    def _sites(self) -> list[dict[str, Any]]:
        registrar, sightings = self._coordinator.registrar, self._coordinator.link.sightings()
        enrolled = registrar.enrolled
        found = []
        for member in registrar.roster.members:
            active = enrolled.get(member.name)
            seen = sightings.get(active.node) if active else None
            found.append(
                {
                    "site": member.name,
                    "status": member.status,
                    "online": bool(seen and seen.online),
                    "last_seen": seen.until if seen and seen.until else None,
                    "words": member.words,
                    "certificate_sha256": member.certificate,
                    "books": self._coordinator.books.of(member.name).halted,
                }
            )
        return found

    async def _revoke(self, request: Request) -> Response:
        asked = parse(ReasonBody, await request.body())
        site = request.path_params["name"]
        await run_in_threadpool(self._coordinator.registrar.revoke, site, reason=asked.reason)
        return JSONResponse({"site": site, "status": "revoked"})

    # --- runs ---

    async def _propose(self, request: Request) -> Response:
        asked = parse(RunBody, await request.body(), limit=_MOST_PLAN_BYTES)
        plan = Plan.from_canonical(asked.plan)
        run = await run_in_threadpool(
            self._coordinator.conductor.propose, plan, quorum=asked.quorum
        )
        return JSONResponse(self._shown(run))

    def _runs(self) -> list[dict[str, Any]]:
        return [_summary(row) for row in self._coordinator.conductor.runs.newest()]

    async def _run(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._shown, request.path_params["name"]))

    def _shown(self, run: str) -> dict[str, Any]:
        runs = self._coordinator.conductor.runs
        decisions = runs.decisions(run)
        sites = sorted({*self._coordinator.registrar.enrolled, *decisions})
        return {
            **_summary(runs.get(run)),
            "decisions": [
                {
                    "site": site,
                    "verdict": decisions[site]["verdict"] if site in decisions else "waiting",
                    "reason": decisions[site]["reason"] if site in decisions else "",
                }
                for site in sites
            ],
        }

    async def _events(self, request: Request) -> Response:
        """Events behind an id; with ``wait`` held until there is one, or the run is over."""
        run, after = request.path_params["name"], int(request.query_params.get("after", "0"))
        patience = HOLD_SECONDS if request.query_params.get("wait") else 0.0
        return JSONResponse(await run_in_threadpool(self._events_after, run, after, patience))

    def _events_after(self, run: str, after: int, patience: float) -> dict[str, Any]:
        conductor = self._coordinator.conductor
        ends = time.monotonic() + patience
        while True:
            seen = conductor.events.count
            state = conductor.runs.get(run)["state"]
            events = conductor.runs.events(run, after=after)
            over = state in {"finished", "stopped", "failed"}
            if events or over or self._closing or time.monotonic() >= ends:
                return {"state": state, "events": [event.as_dict() for event in events]}
            conductor.events.wait(since=seen, seconds=_LOOK_SECONDS)

    async def _plan(self, request: Request) -> Response:
        runs = self._coordinator.conductor.runs
        plan = await run_in_threadpool(runs.plan_of, request.path_params["name"])
        return Response(plan.canonical(), media_type="application/json")

    async def _adapter(self, request: Request) -> Response:
        run = request.path_params["name"]
        found = await run_in_threadpool(self._coordinator.conductor.runs.newest_adapter, run)
        if found is None:
            raise NotPossibleNow(f"{run} has no adapter yet: no round is finished")
        number, digest, arrays = found
        headers = {"silotune-round": str(number), "silotune-sha256": digest}
        content = packed(arrays, {"round": number})
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def _act(self, request: Request) -> Response:
        run, action = request.path_params["name"], request.path_params["action"]
        conductor = self._coordinator.conductor
        actions = {"pause": conductor.pause, "resume": conductor.resume, "stop": conductor.stop}
        if action not in actions:
            raise NotPossibleNow(f"{action!r} is nothing that can be done with a run")
        await run_in_threadpool(actions[action], run)
        return JSONResponse(await run_in_threadpool(self._shown, run))


def _summary(row: Any) -> dict[str, Any]:
    hidden = {"plan", "link_run"}
    return {key: value for key, value in row.items() if key not in hidden}


def _plain(function: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def handler(request: Request) -> Response:
        del request
        return JSONResponse(await run_in_threadpool(function))

    return handler


def _safe(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except SilotuneError as error:
            body = Failure(code=error.code, detail=error.detail[:2000]).model_dump()
            return JSONResponse({**body, "remedy": error.remedy}, 409)

    return endpoint

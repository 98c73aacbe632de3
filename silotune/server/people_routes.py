"""Routes of the admin socket for people: issue a certificate, list, revoke."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from silotune.federation import identity
from silotune.federation.roster import Pem
from silotune.federation.wire import Body, parse
from silotune.plan import Name
from silotune.server.people import People

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

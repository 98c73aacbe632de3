"""The coordinator's own command line: JSON over a Unix socket that only its account may open.

The socket lies in a folder that is its owner's alone and has mode 0600, and the kernel says which
account is at the other end: in its name is written down what it does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from silotune.errors import SilotuneError
from silotune.events.source import OVER
from silotune.protocol.http import Failure
from silotune.server.admin.operations import Operations
from silotune.server.listener import ACCOUNT
from silotune.server.long_poll import HOLD_SECONDS
from silotune.trust.errors import BodyInvalid, NotPermitted
from silotune.trust.identity import account_of

_ROOT = 0
_MOST_BYTES = 1 << 20
_LOOK_SECONDS = 0.2

Handler = Callable[[Request], Awaitable[Response]]


class AdminRoutes:
    """Requests over the socket to a coordinator's operations.

    Parameters
    ----------
    operations : Operations
        Answers and acts.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._closing = False

    def close(self) -> None:
        """Hold no request any longer."""
        self._closing = True

    def app(self) -> Starlette:
        """An ASGI application for a socket that nobody else can open."""
        operations = self._operations
        questions: dict[str, Callable[..., Any]] = {
            "/status": operations.status,
            "/requests": operations.requests,
            "/sites": operations.sites,
            "/runs": operations.runs,
            "/runs/{run}": operations.run,
            "/people": operations.people,
        }
        actions: dict[str, Callable[..., Any]] = {
            "/invites": operations.invite,
            "/requests/{request}/approve": operations.approve,
            "/requests/{request}/refuse": operations.refuse,
            "/sites/{site}/rotate": operations.rotate,
            "/sites/{site}/revoke": operations.revoke,
            "/runs": operations.submit,
            "/runs/{run}/pause": operations.pause,
            "/runs/{run}/resume": operations.resume,
            "/runs/{run}/stop": operations.stop,
            "/runs/{run}/files/{name}": operations.download,
            "/people": operations.add_person,
            "/people/{name}/revoke": operations.revoke_person,
            "/people/{name}/password": operations.set_password,
        }
        asked = [Route(path, _answered(question)) for path, question in questions.items()]
        acted = [
            Route(path, self._acted(action), methods=["POST"]) for path, action in actions.items()
        ]
        return Starlette(
            routes=[*asked, Route("/runs/{run}/events", self._events), *acted],
            exception_handlers={SilotuneError: _told},
        )

    def _acted(self, action: Callable[..., Any]) -> Handler:
        """An action by the fields of path and body."""
        parameters = inspect.signature(action).parameters.values()
        names = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]

        async def endpoint(request: Request) -> Response:
            person = account_of(request.scope[ACCOUNT])
            try:
                _require_own(request)
                given = {**_fields(await request.body()), **request.path_params}
            except SilotuneError as error:
                asked = "/".join(request.path_params.values())
                self._operations.refused(person, action.__name__, asked, code=error.code)
                raise
            target = [given.pop(name, "") for name in names]
            found = await run_in_threadpool(action, person, *target, **given)
            return Response(found) if isinstance(found, bytes) else JSONResponse(found)

        return endpoint

    async def _events(self, request: Request) -> Response:
        """Events behind an id; with ``wait`` held until there is one, or the run is over."""
        _require_own(request)
        run, after = request.path_params["run"], int(request.query_params.get("after", "0"))
        ends = time.monotonic() + (HOLD_SECONDS if request.query_params.get("wait") else 0.0)
        while True:
            found = await run_in_threadpool(self._operations.events, run, after=after)
            held = not found["events"] and found["state"] not in OVER
            if not held or self._closing or time.monotonic() >= ends:
                return JSONResponse(found)
            await asyncio.sleep(_LOOK_SECONDS)


def _require_own(request: Request) -> None:
    """The socket's mode says the same; this holds if somebody changed it. Raises `NotPermitted`."""
    if request.scope[ACCOUNT] not in {os.geteuid(), _ROOT}:
        raise NotPermitted("the socket is for the coordinator's own account")


def _fields(body: bytes) -> dict[str, Any]:
    """The fields of a body; none if it is empty. Raises `BodyInvalid`."""
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        found = None
    if len(body) > _MOST_BYTES or not isinstance(found, dict):
        raise BodyInvalid(f"{len(body)} bytes that are no JSON object, or too many")
    return found


def _answered(question: Callable[..., Any]) -> Handler:
    async def endpoint(request: Request) -> Response:
        _require_own(request)
        return JSONResponse(_plain(await run_in_threadpool(question, **request.path_params)))

    return endpoint


def _plain(found: Any) -> Any:
    if isinstance(found, list):
        return [_plain(item) for item in found]
    return found if isinstance(found, dict) else dataclasses.asdict(found)


async def _told(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, SilotuneError)
    body = Failure(code=error.code, detail=error.detail[:2000]).model_dump()
    return JSONResponse({**body, "remedy": error.remedy}, 409)

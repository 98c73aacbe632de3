"""What every guard in front of a page or a model begins with: bounds, names, and listening.

Plain ASGI, so that nothing behind a guard can be reached around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names under which what listens on this machine alone is asked for."""


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers of a request, by name in lower case; of several of one name the last."""
    return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}


def host_named(header: str) -> str:
    """The name, without the port, that a Host header asks for; "" if it is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def whole_body(receive: Receive, *, most: int) -> bytes | None:
    """The whole body; None if it has more than `most` bytes or was cut off."""
    parts, size = [], 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not event.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, and then whatever comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def listen(
    app: ASGIApp, *, host: str, port: int, said: Callable[[int], None], **settings: Any
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Parameters
    ----------
    app : ASGI application
        With its guard in front.
    host, port : str, int
        Where to listen; port 0 takes a free one.
    said : callable
        Given the port once requests are taken.
    **settings
        Further ones of `uvicorn.Config`.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        **settings,
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        if server.started:
            said(server.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(run())

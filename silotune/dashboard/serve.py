"""Serving the pages of a folder of simulations, or of a site, to whoever sits at this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from silotune.dashboard.doorman import Door
from silotune.dashboard.link import Link
from silotune.federation.person import Person, PersonRole

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names under which a page on this machine alone is asked for."""


def serve_here(
    build: Callable[[Door], ASGIApp],
    *,
    port: int,
    role: PersonRole,
    said: Callable[[str], None],
) -> None:
    """Serve on loopback until Ctrl-C; only the link that `said` is given lets anybody in.

    Other accounts of the machine can reach a loopback port too, so the link carries a secret.
    """
    link = Link(Person(name="you", role=role))
    app = build(Door(hosts=LOOPBACK, link=link))
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        if server.started:
            bound = server.servers[0].sockets[0].getsockname()[1]
            said(f"http://127.0.0.1:{bound}/signin?link={link.secret}")
        await serving

    asyncio.run(run())

"""Listening: TLS 1.3 with optional client certificates, and bounds on who may just hold a socket.

uvicorn serves; what it lacks is added here: the client's certificate in the ASGI scope, a limit on
connections that show none (in number and in time), and on connections of one certificate.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from silotune.server.config import (
    AUTHORITY_CERTIFICATE,
    SERVER_CERTIFICATE,
    CoordinatorKeys,
    Home,
)
from silotune.server.errors import PortTaken
from silotune.server.guard import PEER
from silotune.trust.files import socket_address

_HANDSHAKE_SECONDS = 10.0
_LAST_SECONDS = 5.0
_START_SECONDS = 30.0
_SHUTDOWN_SECONDS = 3
_KEPT_SECONDS = 45  # longer than a site keeps a silent connection

MOST_ANONYMOUS, ANONYMOUS_SECONDS = 64, 20.0
"""Connections without a certificate: how many at a time, and how long each may last."""

MOST_PER_CERTIFICATE = 24
"""Connections with one and the same certificate."""

ACCOUNT = "silotune.account"
"""Key of the scope under which `AccountProtocol` puts the uid of who connected."""

_CREDENTIALS = "iII"  # struct ucred of unix(7): process, user, group


def tls_context(*, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.3 only; a client's certificate is not needed, but one that is shown must be valid."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(str(certificate), str(key))
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def server_tls(home: Home, keys: CoordinatorKeys) -> ssl.SSLContext:
    """TLS with the coordinator's own certificate, for clients of its authority."""
    with keys.key_file() as key:
        return tls_context(
            certificate=home.keys / SERVER_CERTIFICATE,
            key=key,
            authority=home.keys / AUTHORITY_CERTIFICATE,
        )


class Loop(asyncio.SelectorEventLoop):
    """An event loop that gives a TLS handshake ten seconds, not asyncio's sixty."""

    async def create_server(self, *arguments: Any, **settings: Any) -> Any:
        """As asyncio's, with the shorter time limit."""
        if settings.get("ssl"):
            settings["ssl_handshake_timeout"] = _HANDSHAKE_SECONDS
        return await super().create_server(*arguments, **settings)


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with the client's certificate (DER) in the scope, and bounds."""

    anonymous_seconds: ClassVar[float | None] = ANONYMOUS_SECONDS
    _open: ClassVar[Counter[bytes]] = Counter()
    _peer: bytes = b""
    _counted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note who it is; drop it if there are too many of its kind."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is None:
            return  # pages on loopback
        self._peer = tls.getpeercert(binary_form=True) or b""
        limit = MOST_PER_CERTIFICATE if self._peer else MOST_ANONYMOUS
        if self._open[self._peer] >= limit:
            transport.abort()
            return
        self._open[self._peer] += 1
        self._counted = True
        if not self._peer:
            self.loop.call_later(ANONYMOUS_SECONDS, self._time_is_over, transport)
        self.app = _with(self.app, **{PEER: self._peer})

    def _time_is_over(self, transport: asyncio.Transport) -> None:
        """Answer what is being answered, if that is soon, and close."""
        self.shutdown()
        self.loop.call_later(_LAST_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Uncount it."""
        super().connection_lost(exc)
        if self._counted:
            self._counted = False
            self._open[self._peer] -= 1
            if not self._open[self._peer]:
                del self._open[self._peer]


class AccountProtocol(HttpToolsProtocol):
    """For a Unix socket: uvicorn's HTTP/1.1, with the account (uid) at the other end in the scope."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ask the kernel who it is."""
        super().connection_made(transport)
        connection: socket.socket = transport.get_extra_info("socket")
        found = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_CREDENTIALS)
        )
        _, uid, _ = struct.unpack(_CREDENTIALS, found)
        self.app = _with(self.app, **{ACCOUNT: uid})


class BrowserProtocol(PeerProtocol):
    """For pages: a browser without a certificate may stay and listen for news."""

    anonymous_seconds: ClassVar[float | None] = None
    _open: ClassVar[Counter[bytes]] = Counter()


def _with(app: ASGIApp, **known: object) -> ASGIApp:
    """The application, with what is known of the other end in every scope."""

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, **known}, receive, send)

    return told


class _Uvicorn(uvicorn.Server):
    """Looks once a second whether it is to stop, or when it is told; uvicorn's own looks ten times."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    async def main_loop(self) -> None:
        """Until `end`, or as long as uvicorn would."""
        event = asyncio.Event()
        self._told = asyncio.get_running_loop(), event
        while not await self.on_tick(0):  # which also sets the time that responses are dated with
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), 1.0)

    def end(self) -> None:
        """Stop soon; from another thread."""
        self.should_exit = True
        if self._told is not None and not self._told[0].is_closed():
            self._told[0].call_soon_threadsafe(self._told[1].set)


class Listener:
    """An ASGI application served from a thread of its own.

    Parameters
    ----------
    app : ASGI application
        What to serve.
    bound : socket
        Bound already, so that a taken address is known before anything starts.
    tls : ssl.SSLContext or None
        None for a Unix socket.
    protocol : type of HttpToolsProtocol
        Who may connect, and what the application is told of them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        bound: socket.socket,
        tls: ssl.SSLContext | None,
        protocol: type[HttpToolsProtocol] = PeerProtocol,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=protocol,
            loop=f"{__name__}:Loop",
            ws="none",
            lifespan="on" if tls else "off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEPT_SECONDS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        config.load()
        config.ssl = tls
        self._bound = bound
        self._server = _Uvicorn(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [bound]}, daemon=True, name="listener"
        )

    def start(self) -> None:
        """Serve. Raises `PortTaken` if the server does not come up."""
        self._thread.start()
        ends = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > ends:
                raise PortTaken("the server did not start; its log says why")
            time.sleep(0.01)

    def stop(self) -> None:
        """Finish what is being answered, and end."""
        self._server.end()
        self._thread.join(timeout=_SHUTDOWN_SECONDS + 5.0)
        self._bound.close()


def bind_public(host: str, port: int) -> socket.socket:
    """A TCP socket. Raises `PortTaken`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol's number: asyncio turns Nagle's algorithm off only for sockets that say TCP, and
    # with it every answer waits 40 ms for the client's delayed acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as exc:
        bound.close()
        raise PortTaken(f"{host}:{port}: {exc.strerror or exc}") from exc
    return bound


def bind_private(path: Path) -> socket.socket:
    """A Unix socket of mode 0600 at `path`; the one of an earlier process is replaced."""
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # the mode is right from the first instant
    try:
        with socket_address(path) as address:
            bound.bind(address)
    except OSError as exc:
        bound.close()
        raise PortTaken(f"{path}: {exc.strerror or exc}") from exc
    finally:
        os.umask(before)
    return bound

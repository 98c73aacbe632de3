"""Listening: on this machine alone, unless there is TLS; until Ctrl-C or SIGTERM."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from silotune.api.model import Model
from silotune.protocol.asgi import LOOPBACK, listen
from silotune.serving.app import Limits, build
from silotune.serving.errors import ServingRefused
from silotune.trust.files import create_file, require_private

_LEAST_TOKEN = 16  # characters
_MOST_CONNECTIONS = 1024
_LAST_SECONDS = 10  # that requests under way have when the server is ended


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is served.

    Attributes
    ----------
    host : str
        Address to listen on.
    port : int
        0 takes a free one.
    certificate, key : Path or None
        Of TLS, in PEM; needed beyond this machine.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None

    @property
    def here(self) -> bool:
        """Whether only this machine can ask."""
        try:
            return self.host in LOOPBACK or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def names(self) -> frozenset[str] | None:
        """Under which it may be asked, where only this machine can; None for any."""
        return LOOPBACK | {self.host.lower()} if self.here else None

    def require_allowed(self, *, own_token: bool) -> None:
        """Refuse what others could read along. `own_token`: whether the token is of a file.

        Raises
        ------
        ServingRefused
            Beyond this machine without TLS or token file, or half of a certificate.
        """
        if (self.certificate is None) != (self.key is None):
            raise ServingRefused("TLS takes a certificate and its key, both")
        if not self.here and (self.certificate is None or not own_token):
            raise ServingRefused(f"{self.host} is not this machine alone")


def token_of(path: Path | None) -> tuple[str, bool]:
    """The token of a file (made, mode 0600, if it isn't there), or a new one; and whether it is new.

    Raises
    ------
    FileExposed
        Others may read the file.
    ServingRefused
        Its first line is too short to be a token.
    """
    new = secrets.token_urlsafe(32)
    if path is None or create_file(path, f"{new}\n".encode()):
        return new, True
    require_private(path)
    token = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    if len(token) < _LEAST_TOKEN or not token.isascii():
        raise ServingRefused(
            f"{path} holds no token",
            remedy=f"Its first line is {_LEAST_TOKEN} ASCII characters or more; without the file, "
            "one is made.",
        )
    return token, False


def serve(
    model: Model,
    *,
    token: str,
    place: Place,
    said: Callable[[str], None],
    limits: Limits | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; requests under way are answered first.

    Parameters
    ----------
    model : Model
        What is asked.
    token : str
        What every request but ``/health`` must show.
    place : Place
        Where to listen; judged before by `Place.require_allowed`.
    said : callable
        Given the URL once requests are taken.
    limits : Limits, optional
        What the server takes on.
    """
    shown = f"[{place.host}]" if ":" in place.host else place.host
    listen(
        build(model, token=token, limits=limits, hosts=place.names),
        host=place.host,
        port=place.port,
        said=lambda port: said(f"{'https' if place.certificate else 'http'}://{shown}:{port}"),
        ssl_certfile=None if place.certificate is None else str(place.certificate),
        ssl_keyfile=None if place.key is None else str(place.key),
        lifespan="on",
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )

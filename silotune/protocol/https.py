"""HTTPS to the coordinator: bounded, without redirects, through the proxy that the machine names.

The coordinator is not trusted with this process: a reply has a size limit that holds while it is
read, compression (and with it decompression bombs) is refused, redirects are not followed, and the
only server certificates that count are those of the federation's authority. What fails is one of three
things: the coordinator can't be reached (try again), it does not let this site in, or it refuses what
was asked.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from silotune.errors import SilotuneError
from silotune.protocol import http
from silotune.protocol.errors import (
    ClockWrong,
    CoordinatorRefused,
    CoordinatorUnavailable,
    MessageRefused,
    PortUnreachable,
    ProxyFailed,
    ServerUntrusted,
)
from silotune.trust.errors import BodyInvalid, BooksDisagree, InviteInvalid, RequestDeclined

MOST_REPLY = 16 << 20
"""Bytes of one reply: a piece of a sealed content has 4 MB."""

CONNECT_SECONDS, READ_SECONDS = 10.0, 45.0
"""A long poll is held for at most 25 s, so a silent connection is a dead one."""

KEPT_SECONDS = 30.0
"""A connection without a request is kept so long: longer than between two heartbeats, so that there is
no handshake for each, and shorter than the coordinator keeps it, so that no request meets its end."""

_NO_HEADERS: Mapping[str, str] = {}


def proxy_for(url: str) -> str | None:
    """The proxy that ``HTTPS_PROXY`` (or ``ALL_PROXY``) names for `url`, unless ``NO_PROXY`` says no."""
    host = urlsplit(url).hostname or ""
    proxies = getproxies()
    if proxy_bypass(host):
        return None
    return proxies.get("https") or proxies.get("all")


def https_client(
    url: str,
    *,
    tls: ssl.SSLContext,
    limit: int = MOST_REPLY,
    headers: Mapping[str, str] = _NO_HEADERS,
) -> httpx.Client:
    """A client for the coordinator at `url` and nobody else.

    Parameters
    ----------
    url : str
        ``https://host:port``.
    tls : ssl.SSLContext
        Whom to trust, and the site's certificate.
    limit : int
        Most bytes of a reply.
    headers : mapping
        Sent with every request.
    """
    kept = httpx.Limits(keepalive_expiry=KEPT_SECONDS)
    inner = httpx.HTTPTransport(verify=tls, proxy=proxy_for(url), retries=0, limits=kept)
    return httpx.Client(
        transport=_Bounded(inner, limit),
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        headers={"accept-encoding": "identity", **headers},
        follow_redirects=False,
        trust_env=False,
    )


class _Bounded(httpx.BaseTransport):
    """Refuses replies that are compressed or too large, while they come."""

    def __init__(self, inner: httpx.BaseTransport, limit: int) -> None:
        self._inner, self._limit = inner, limit

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise MessageRefused("the reply is compressed, which this site never asks for")
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Counted(response.stream, self._limit)
        return response

    def close(self) -> None:
        self._inner.close()


class _Counted(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, limit: int) -> None:
        self._inner, self._limit = inner, limit

    def __iter__(self) -> Iterator[bytes]:
        total = 0
        for part in self._inner:
            total += len(part)
            if total > self._limit:
                raise MessageRefused(f"a reply has more than {self._limit} bytes")
            yield part

    def close(self) -> None:
        self._inner.close()


_UNWANTED = {401, 403}


@contextmanager
def connection_errors(url: str) -> Iterator[None]:
    """Say of a failed connection what failed, as one of silotune's errors."""
    try:
        yield
    except httpx.ProxyError as exc:
        raise ProxyFailed(f"{url}: {exc}") from exc
    except httpx.TransportError as exc:
        if "CERTIFICATE_VERIFY_FAILED" in str(exc):
            raise ServerUntrusted(f"{url}: {exc}") from exc
        if "alert" in str(exc).lower():  # the server closed the handshake: our certificate
            raise CoordinatorRefused(f"{url} refuses the site's certificate: {exc}") from exc
        raise PortUnreachable(f"{url}: {exc or type(exc).__name__}") from exc


def clock_skew(response: httpx.Response) -> float | None:
    """Seconds that this machine's clock is ahead of the server's, by its Date header."""
    try:
        there = parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
    return time.time() - there


def failure(response: httpx.Response) -> SilotuneError:
    """What a reply with an error status means."""
    skew = clock_skew(response)
    if (
        response.status_code in _UNWANTED
        and skew is not None
        and abs(skew) > http.MOST_SKEW_SECONDS - 2.0
    ):
        return ClockWrong(f"this machine's clock is {skew:+.0f} s off the coordinator's")
    code = ""
    try:
        said = http.parse(http.Failure, response.content)
        code, detail = said.code, f"the coordinator said {said.code}: {said.detail}"
    except BodyInvalid:
        detail = f"the coordinator answered with status {response.status_code}"
    if response.status_code in _UNWANTED:
        return CoordinatorRefused(detail)
    if response.status_code >= 500:
        return CoordinatorUnavailable(detail)
    if code == InviteInvalid.code:
        return InviteInvalid(detail)
    if code == BooksDisagree.code:
        return BooksDisagree(detail)
    return RequestDeclined(
        detail, remedy=f"`silotune errors {code}` explains it." if code else None
    )

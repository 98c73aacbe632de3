"""The coordinator's routes beside the fleet protocol, as a site calls them.

Bodies are `silotune.federation.wire`'s; what fails is one of three things: the coordinator can't be
reached (try again), it does not let this site in, or it refuses what was asked.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx

from silotune.client.enrolled import Enrolment
from silotune.client.errors import (
    ClockWrong,
    CoordinatorRefused,
    CoordinatorUnavailable,
    PortUnreachable,
    ServerUntrusted,
)
from silotune.client.transport import https_client
from silotune.errors import SilotuneError
from silotune.federation import wire
from silotune.federation.errors import (
    BodyInvalid,
    BooksDisagree,
    InviteInvalid,
    RequestDeclined,
)
from silotune.federation.identity import make_request
from silotune.federation.roster import SignedRoster

_B = TypeVar("_B", bound=wire.Body)

_UNWANTED = {401, 403}
_FAST, _SLOW = 4.0, 295.0  # Flower signs requests with the time, and takes -5 s to +305 s of age


@contextmanager
def connection_errors(url: str) -> Iterator[None]:
    """Say of a failed connection what failed, as one of silotune's errors."""
    try:
        yield
    except httpx.ProxyError as exc:
        from silotune.client.errors import ProxyFailed

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
    if response.status_code in _UNWANTED and skew is not None and not -_SLOW < skew < _FAST:
        return ClockWrong(f"this machine's clock is {skew:+.0f} s off the coordinator's")
    code = ""
    try:
        said = wire.parse(wire.Failure, response.content)
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


class CoordinatorApi:
    """One site's calls to its coordinator.

    Parameters
    ----------
    url : str
        ``https://host:port``.
    tls : ssl.SSLContext
        Whom to trust, and the site's certificate where there is one.
    """

    def __init__(self, url: str, tls: ssl.SSLContext) -> None:
        self._url = url
        self._client = https_client(url, tls=tls, limit=wire.MOST_REPLY_BYTES)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # --- enrolment: before there is a certificate ---

    def authority(self) -> wire.AuthorityReply:
        """The federation's name and authority, to be believed only by its fingerprint."""
        return self._get(wire.AUTHORITY, wire.AuthorityReply)

    def enrol(self, request: wire.EnrolRequest) -> wire.EnrolReply:
        """Ask to be let in."""
        return self._post(wire.ENROL, request, wire.EnrolReply)

    def enrolment(self, query: wire.EnrolmentQuery) -> wire.EnrolmentReply:
        """Ask how it stands."""
        return self._post(wire.ENROLMENT, query, wire.EnrolmentReply)

    # --- membership ---

    def news(self, *, roster: int, plans: int) -> wire.NewsReply:
        """Wait until roster or plans have changed, some 25 seconds at most."""
        return self._get(f"{wire.NEWS}?roster={roster}&plans={plans}", wire.NewsReply)

    def rosters(self, *, after: int) -> tuple[SignedRoster, ...]:
        """Versions behind that one."""
        return self._get(f"{wire.ROSTER}?after={after}", wire.RosterReply).rosters

    def plans(self) -> wire.PlansReply:
        """What is proposed, under way or finished lately."""
        return self._get(wire.PLANS, wire.PlansReply)

    def decide(self, decision: wire.Decision) -> None:
        """Send the site's signed word on a run."""
        self._post(wire.DECISION, decision, wire.Done)

    def hand_in(self, handed: wire.HandedIn) -> None:
        """Give the coordinator the privacy certificate of a run."""
        self._post(wire.CERTIFICATE, handed, wire.Done)

    def renew(self, enrolment: Enrolment) -> str:
        """Ask for the next certificate; returns it as PEM."""
        facts, keys = enrolment.facts, enrolment.keys
        request = wire.RenewRequest.make(
            keys.signing,
            name=facts.site,
            request=make_request(facts.site, keys.node),
            sent_at=int(time.time()),
        )
        return self._post(wire.RENEW, request, wire.RenewReply).certificate

    def leave(self, enrolment: Enrolment) -> None:
        """Leave the federation: the coordinator revokes the certificate."""
        facts = enrolment.facts
        goodbye = wire.Leave.make(
            enrolment.keys.signing,
            federation=facts.federation,
            name=facts.site,
            sent_at=int(time.time()),
        )
        self._post(wire.LEAVE, goodbye, wire.Done)

    def exchange_heads(self, mine: wire.HeadExchange) -> wire.HeadExchange:
        """Exchange audit heads and counter-signatures."""
        return self._post(wire.AUDIT, mine, wire.HeadExchange)

    def heads(self) -> wire.SignedHeads:
        """The newest heads of this site that the coordinator signed."""
        return self._get(wire.HEADS, wire.SignedHeads)

    def restored(self, restored: wire.Restored) -> None:
        """Tell that older books are in the place of lost ones."""
        self._post(wire.RESTORED, restored, wire.Done)

    # --- plumbing ---

    def _get(self, path: str, reply: type[_B]) -> _B:
        with connection_errors(self._url):
            response = self._client.get(self._url + path)
        return self._read(response, reply)

    def _post(self, path: str, body: wire.Body, reply: type[_B]) -> _B:
        content = body.model_dump_json().encode()
        headers = {"content-type": "application/json"}
        with connection_errors(self._url):
            response = self._client.post(self._url + path, content=content, headers=headers)
        return self._read(response, reply)

    def _read(self, response: httpx.Response, reply: type[_B]) -> _B:
        if response.status_code != httpx.codes.OK:
            raise failure(response)
        return wire.parse(reply, response.content, limit=wire.MOST_REPLY_BYTES)


@contextmanager
def closing_api(url: str, tls: ssl.SSLContext) -> Iterator[CoordinatorApi]:
    """A connection for a few calls."""
    api = CoordinatorApi(url, tls)
    try:
        yield api
    finally:
        api.close()

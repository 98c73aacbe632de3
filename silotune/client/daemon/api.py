"""The coordinator's routes beside those of messages, as a site calls them: `silotune.protocol.http`."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx

from silotune.protocol import http
from silotune.protocol.https import connection_errors, failure, https_client
from silotune.trust.roster import SignedRoster

_B = TypeVar("_B", bound=http.Body)


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
        self._client = https_client(url, tls=tls, limit=http.MOST_REPLY_BYTES)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # --- enrolment: before there is a certificate ---

    def authority(self) -> http.AuthorityReply:
        """The federation's name and authority, to be believed only by its fingerprint."""
        return self._get(http.AUTHORITY, http.AuthorityReply)

    def enrol(self, request: http.EnrolRequest) -> http.EnrolReply:
        """Ask to be let in."""
        return self._post(http.ENROL, request, http.EnrolReply)

    def enrolment(self, query: http.EnrolmentQuery) -> http.EnrolmentReply:
        """Ask how it stands."""
        return self._post(http.ENROLMENT, query, http.EnrolmentReply)

    # --- membership ---

    def news(self, *, roster: int, plans: int) -> http.NewsReply:
        """Wait until roster or plans have changed, some 25 seconds at most."""
        return self._get(f"{http.NEWS}?roster={roster}&plans={plans}", http.NewsReply)

    def rosters(self, *, after: int) -> tuple[SignedRoster, ...]:
        """Versions behind that one."""
        return self._get(f"{http.ROSTER}?after={after}", http.RosterReply).rosters

    def plans(self) -> http.PlansReply:
        """What is proposed, under way or finished lately."""
        return self._get(http.PLANS, http.PlansReply)

    def decide(self, decision: http.Decision) -> None:
        """Send the site's signed word on a run."""
        self._post(http.DECISION, decision, http.Done)

    def hand_in(self, handed: http.HandedIn) -> None:
        """Give the coordinator the privacy certificate of a run."""
        self._post(http.CERTIFICATE, handed, http.Done)

    def renew(self, request: http.RenewRequest) -> str:
        """Ask for the next certificate; returns it as PEM."""
        return self._post(http.RENEW, request, http.RenewReply).certificate

    def leave(self, goodbye: http.Leave) -> None:
        """Leave the federation: the coordinator revokes the certificate."""
        self._post(http.LEAVE, goodbye, http.Done)

    def exchange_heads(self, mine: http.HeadExchange) -> http.HeadExchange:
        """Exchange audit heads and counter-signatures."""
        return self._post(http.AUDIT, mine, http.HeadExchange)

    def heads(self) -> http.SignedHeads:
        """The newest heads of this site that the coordinator signed."""
        return self._get(http.HEADS, http.SignedHeads)

    def restored(self, restored: http.Restored) -> None:
        """Tell that older books are in the place of lost ones."""
        self._post(http.RESTORED, restored, http.Done)

    # --- plumbing ---

    def _get(self, path: str, reply: type[_B]) -> _B:
        with connection_errors(self._url):
            response = self._client.get(self._url + path)
        return self._read(response, reply)

    def _post(self, path: str, body: http.Body, reply: type[_B]) -> _B:
        content = body.model_dump_json().encode()
        headers = {"content-type": "application/json"}
        with connection_errors(self._url):
            response = self._client.post(self._url + path, content=content, headers=headers)
        return self._read(response, reply)

    def _read(self, response: httpx.Response, reply: type[_B]) -> _B:
        if response.status_code != httpx.codes.OK:
            raise failure(response)
        return http.parse(reply, response.content, limit=http.MOST_REPLY_BYTES)


@contextmanager
def closing_api(url: str, tls: ssl.SSLContext) -> Iterator[CoordinatorApi]:
    """A connection for a few calls."""
    api = CoordinatorApi(url, tls)
    try:
        yield api
    finally:
        api.close()

"""The client of the admin socket: what `silotune coordinator` talks through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from silotune.errors import told_again
from silotune.events.source import OVER
from silotune.server.config import Home
from silotune.server.errors import CoordinatorNotRunning
from silotune.server.long_poll import HOLD_SECONDS
from silotune.trust.files import socket_address

_SECONDS = 60.0


class AdminClient:
    """Requests to the coordinator that runs on a folder.

    Parameters
    ----------
    home : Home
        The folder.
    """

    def __init__(self, home: Home) -> None:
        self._home = home

    def get(self, path: str, **query: Any) -> Any:
        """The answer to a question. Raises the error that the coordinator names."""
        return self._read(self._send("GET", path, query=query)).json()

    def post(self, path: str, **body: Any) -> Any:
        """The result of an action. Raises the error that the coordinator names."""
        return self._read(self._send("POST", path, body=body)).json()

    def download(self, run: str, file: str) -> bytes:
        """A file of a run. Raises the error that the coordinator names."""
        return self._read(self._send("POST", f"/runs/{run}/files/{file}")).content

    def watch(self, run: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Events of a run as they come, until it is over; from an id on, to go on watching."""
        while True:
            found = self.get(f"/runs/{run}/events", after=after, wait=1)
            for event in found["events"]:
                after = event["id"]
                yield event
            if not found["events"] and found["state"] in OVER:
                return

    def _send(
        self, method: str, path: str, *, query: Any = None, body: Any = None
    ) -> httpx.Response:
        try:
            with self._connected() as client:
                return client.request(method, path, params=query, json=body)
        except (httpx.TransportError, OSError) as exc:
            self._home.load()  # a wrong folder is a likelier reason than a stopped daemon
            raise CoordinatorNotRunning(
                f"nothing answers in {self._home.root.resolve()} ({type(exc).__name__})",
                remedy=f"Start it: silotune coordinator start --dir {self._home.root.resolve()}",
            ) from exc

    @contextmanager
    def _connected(self) -> Iterator[httpx.Client]:
        with (
            socket_address(self._home.socket_path) as address,
            httpx.Client(
                # No TLS in it: certificates would be read in vain, at each request.
                transport=httpx.HTTPTransport(uds=address, verify=False),
                base_url="http://coordinator",
                timeout=_SECONDS + HOLD_SECONDS,
                trust_env=False,
            ) as client,
        ):
            yield client

    def _read(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            said = response.json()
        except ValueError:
            said = {"detail": f"status {response.status_code}"}
        raise told_again(said)

"""The client of the admin socket: what `silotune coordinator` talks through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx

from silotune.errors import told_again
from silotune.events.source import OVER
from silotune.server.config import Home
from silotune.server.errors import CoordinatorNotRunning
from silotune.server.long_poll import HOLD_SECONDS

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
        transport = httpx.HTTPTransport(uds=str(home.socket_path))
        timeout = httpx.Timeout(_SECONDS + HOLD_SECONDS)
        self._client = httpx.Client(
            transport=transport, base_url="http://coordinator", timeout=timeout, trust_env=False
        )

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
            return self._client.request(method, path, params=query, json=body)
        except httpx.TransportError as exc:
            self._home.load()  # a wrong folder is a likelier reason than a stopped daemon
            raise CoordinatorNotRunning(
                f"nothing answers in {self._home.root.resolve()} ({type(exc).__name__})",
                remedy=f"Start it: silotune coordinator start --dir {self._home.root.resolve()}",
            ) from exc

    def _read(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            said = response.json()
        except ValueError:
            said = {"detail": f"status {response.status_code}"}
        raise told_again(said)

"""The client of the admin API: what `silotune admin` talks through, from any machine.

Messages and stubs are compiled from ``control.proto`` when they are first needed. grpcio's own run-time
compiler (`grpc.protos_and_services`) does it in memory in some 50 ms: there is no generated code to
commit, to ship in a wheel, or to fall out of step with the ``.proto``, which lies in the package.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from silotune.errors import SilotuneError, told_again
from silotune.plan.sections import Section
from silotune.server.errors import AdminUnreachable
from silotune.trust.errors import SignInNeeded
from silotune.trust.files import create_private_folder, replace_file, require_private

SERVICE = "silotune.admin.v1.Control"
"""Full name of the service."""

_ROOT = Path(__file__).parents[3]
_PROTO = str(Path(__file__).with_name("control.proto").relative_to(_ROOT))
_SECONDS = 30.0
_LONGEST_WAIT = 15.0
_ADDRESS, _KEY, _CERTIFICATE, _AUTHORITY = (
    *("address.json", "key.pem"),
    *("certificate.pem", "authority.pem"),
)


@lru_cache(maxsize=1)
def compiled() -> tuple[ModuleType, ModuleType]:
    """The module of the messages, and that of stub, servicer and registration."""
    # The compiler looks for files along sys.path, where an editable installation need not be.
    sys.path.append(str(_ROOT))
    try:
        found: tuple[Any, Any] = grpc.protos_and_services(_PROTO)
    finally:
        sys.path.remove(str(_ROOT))
    return found


class AdminAddress(Section):
    """Where the admin API is, and the name in the certificate that it has to show."""

    address: str
    server_name: str


def save_credentials(
    folder: Path, *, address: AdminAddress, key: bytes, certificate: str, authority: str
) -> None:
    """Write what a person needs to a folder of mode 0700."""
    create_private_folder(folder)
    replace_file(folder / _KEY, key)
    replace_file(folder / _CERTIFICATE, certificate.encode())
    replace_file(folder / _AUTHORITY, authority.encode())
    replace_file(folder / _ADDRESS, address.model_dump_json().encode())


class ControlClient:
    """Calls of the admin API in one person's name.

    Parameters
    ----------
    folder : Path
        The person's credentials (`save_credentials`).

    Raises
    ------
    SignInNeeded
        They are missing or not readable.
    FileExposed
        Others may read the private key.
    """

    def __init__(self, folder: Path) -> None:
        try:
            require_private(folder / _KEY)
            key, certificate, authority = (
                (folder / name).read_bytes() for name in (_KEY, _CERTIFICATE, _AUTHORITY)
            )
            self._to = AdminAddress.model_validate_json((folder / _ADDRESS).read_bytes())
        except (OSError, ValidationError) as exc:
            raise SignInNeeded(f"{folder} holds no credentials for the admin API") from exc
        secrets = grpc.ssl_channel_credentials(authority, key, certificate)
        options = (
            ("grpc.ssl_target_name_override", self._to.server_name),
            ("grpc.keepalive_time_ms", 20_000),  # a watcher must find out that the other end died
            ("grpc.max_reconnect_backoff_ms", 3000),
        )
        self._channel = grpc.secure_channel(self._to.address, secrets, options=options)
        messages, stubs = compiled()
        self.messages: Any = messages
        self._stub: Any = stubs.ControlStub(self._channel)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def call(self, name: str, request: Any) -> dict[str, Any]:
        """A unary call's reply as plain data. Raises the error that the coordinator names."""
        try:
            reply = getattr(self._stub, name)(request, timeout=_SECONDS)
        except grpc.RpcError as exc:
            raise self._error(exc) from exc
        return plain(reply)

    def download(self, run: str, file: str) -> bytes:
        """A file of a run. Raises the error that the coordinator names."""
        try:
            pieces = self._stub.Download(self.messages.DownloadRequest(run=run, file=file))
            return b"".join(piece.content for piece in pieces)
        except grpc.RpcError as exc:
            raise self._error(exc) from exc

    def watch(
        self, run: str, *, after: int = 0, waiting: Callable[[str], None] = lambda why: None
    ) -> Iterator[dict[str, Any]]:
        """Events of a run as they come, until it is over.

        A broken connection, as when the coordinator restarts, is made again for as long as it takes,
        and the watch goes on behind the last event that was seen.

        Parameters
        ----------
        run : str
            The run's name.
        after : int
            Events behind this id.
        waiting : callable
            Told, in a sentence, that the connection is lost and is being made again.
        """
        pause = 0.25
        while True:
            try:
                request = self.messages.WatchRequest(run=run, after=after)
                for reply in self._stub.Watch(request):
                    pause = 0.25
                    for event in reply.events:
                        after = int(event.id)
                        yield json.loads(event.json)
            except grpc.RpcError as exc:
                if exc.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
                    raise self._error(exc) from exc
                waiting(f"no connection to {self._to.address}, trying again in {pause:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
            else:
                return

    def _error(self, error: Any) -> SilotuneError:
        details = str(error.details() or "")
        try:
            said = json.loads(details)
        except ValueError:
            said = {}
        if not isinstance(said, dict) or "code" not in said:
            return AdminUnreachable(f"{self._to.address}: {error.code().name.lower()}: {details}")
        return told_again(said)


def plain(message: Any) -> dict[str, Any]:
    """A message as plain data: every field present, names as in the ``.proto``, numbers numbers."""
    found: dict[str, Any] = _numbers(
        MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    )
    return found


def _numbers(value: Any) -> Any:
    """JSON of protobuf has 64-bit integers as text; ids become numbers again."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {
            key: int(item) if key == "id" and isinstance(item, str) else _numbers(item)
            for key, item in value.items()
        }
    return value

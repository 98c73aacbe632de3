"""The daemon's Unix socket: one JSON request, one JSON answer, for the site's own account only.

The socket lies in the state folder, which is its owner's alone, has mode 0600, and the kernel says
who is at the other end. It is the daemon's only listening end, and no network leads to it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from silotune.client.errors import DaemonAbsent, SiteCommandFailed
from silotune.errors import SilotuneError
from silotune.trust.files import socket_address

logger = logging.getLogger(__name__)

SOCKET = "daemon.sock"

_MOST_BYTES = 1 << 20
_SECONDS = 10.0

Request = Mapping[str, Any]
Handler = Callable[[Request, int], Mapping[str, Any]]


class ControlSocket:
    """Serves requests from a thread of its own until closed.

    Parameters
    ----------
    state : Path
        The state folder.
    handle : callable
        ``handle(request, uid)`` gives the answer; a `SilotuneError` is answered by its code.
    """

    def __init__(self, state: Path, handle: Handler) -> None:
        self._state, self._handle = state, handle
        (state / SOCKET).unlink(missing_ok=True)  # the lock file says that no daemon has it
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with socket_address(state / SOCKET) as address:
            self._socket.bind(address)
        (state / SOCKET).chmod(0o600)
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket."""
        self._socket.close()
        (self._state / SOCKET).unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection:
                connection.settimeout(_SECONDS)
                try:
                    connection.sendall(json.dumps(self._answer(connection)).encode() + b"\n")
                except OSError:
                    logger.debug("a control connection broke", exc_info=True)

    def _answer(self, connection: socket.socket) -> Mapping[str, Any]:
        uid = _peer(connection)
        if uid not in {os.getuid(), 0}:
            return {"code": "ST-000", "detail": "this socket is for the daemon's own account"}
        try:
            request = json.loads(_read_line(connection))
            if not isinstance(request, dict):
                raise ValueError("not an object")
            return {"answer": self._handle(request, uid)}
        except SilotuneError as exc:
            return {"code": exc.code, "detail": exc.detail, "remedy": exc.remedy}
        except Exception as exc:
            logger.exception("a control request failed")
            return {"code": SilotuneError.code, "detail": f"{type(exc).__name__}: {exc}"}


def ask(state: Path, command: str, **fields: Any) -> dict[str, Any]:
    """Put a request to the running daemon.

    Raises
    ------
    DaemonAbsent
        No daemon answers.
    SiteCommandFailed
        It answered with an error.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(6 * _SECONDS)
            with socket_address(state / SOCKET) as address:
                connection.connect(address)
            connection.sendall(json.dumps({"command": command, **fields}).encode() + b"\n")
            found = json.loads(_read_line(connection))
    except (OSError, ValueError) as exc:
        raise DaemonAbsent(f"nothing answers at {state / SOCKET}") from exc
    if "answer" not in found:
        detail = f"{found.get('code')}: {found.get('detail')}"
        raise SiteCommandFailed(detail, remedy=found.get("remedy"))
    return dict(found["answer"])


def _peer(connection: socket.socket) -> int:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[1])


def _read_line(connection: socket.socket) -> bytes:
    content = b""
    while not content.endswith(b"\n"):
        part = connection.recv(65536)
        content += part
        if not part or len(content) > _MOST_BYTES:
            break
    return content

"""The launcher: a small process that starts trainers, so that the daemon itself need not be able to.

A daemon shuts itself out from the records, and whatever a process starts is shut out with it. So at its
start, before it has read a byte from the network, the daemon starts this process and tells it what each
dataset and each base model may have a trainer open. Later it asks by their names alone: whoever takes
the daemon over can have a trainer started as confined as ever, and neither another program, nor one
that reads records and reaches the network.

It reads nothing but its one socket, and imports nothing but Python's own library.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_MOST = 1 << 16
_TRAINER = "silotune.client.training.child"


def python_path() -> str:
    """``PYTHONPATH`` for a process that is to run this very package, wherever it is."""
    package = str(Path(__file__).resolve().parents[3])
    given = [
        str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p
    ]
    installed = package in site.getsitepackages()
    return os.pathsep.join(given if installed else [package, *given])


class Launcher:
    """The daemon's end of the launcher.

    Parameters
    ----------
    table : mapping
        ``datasets`` and ``models``: what a trainer may open, by name; ``resources``: what every one may
        use; ``scratch``: where their folders are made; ``environment``: theirs.
    program : tuple of str
        The module that a trainer is.

    Attributes
    ----------
    pid : int
        Of the launcher.
    """

    def __init__(self, table: Mapping[str, Any], *, program: str = _TRAINER) -> None:
        self._lock = threading.Lock()
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": python_path()},
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._ask(dict(table))

    def start(self, connection: socket.socket, **wanted: str) -> int:
        """Start a trainer at the other end of a connection; its process id.

        Parameters
        ----------
        connection : socket
            The trainer's end.
        **wanted : str
            ``work``: ``train`` or ``costs``; ``model`` and ``dataset``, names of the table, empty for
            none; ``style`` and ``level`` of its log.

        Raises
        ------
        OSError
            It could not be started.
        """
        found = self._ask({"ask": "start", **wanted}, [connection.fileno()])
        return int(found["pid"])

    def ended(self, pid: int, *, seconds: float = 0.0) -> int | None:
        """How a trainer ended, waited for so long: its exit code, or minus the signal; None if not."""
        code = self._ask({"ask": "ended", "pid": pid, "seconds": seconds})["code"]
        return None if code is None else int(code)

    def end(self, pid: int) -> None:
        """End a trainer, and remove what it wrote; it may have ended by itself."""
        with suppress(OSError):
            self._ask({"ask": "end", "pid": pid})

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the launcher, and every trainer with it."""
        self._connection.close()
        self._process.wait()

    def _ask(self, question: dict[str, Any], descriptors: list[int] | None = None) -> Any:
        with self._lock:
            socket.send_fds(self._connection, [json.dumps(question).encode()], descriptors or [])
            content = self._connection.recv(_MOST)
        if not content:
            raise OSError("the launcher came to an end")
        answer = json.loads(content)
        if answer.get("error"):
            raise OSError(answer["error"])
        return answer


class _Served:
    """The launcher's own end."""

    def __init__(self, connection: socket.socket, program: str) -> None:
        self._connection, self._program = connection, program
        self._table: dict[str, Any] = {}
        self._running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}

    def serve(self) -> None:
        """Until the daemon is gone."""
        while True:
            content, descriptors, _, _ = socket.recv_fds(self._connection, _MOST, 1)
            if not content:
                break
            try:
                answer = self._answer(json.loads(content), descriptors)
            except (OSError, LookupError, ValueError) as exc:
                answer = {"error": f"{type(exc).__name__}: {exc}"}
            for descriptor in descriptors:
                os.close(descriptor)
            self._connection.send(json.dumps(answer).encode())
        for pid in list(self._running):
            self._end(pid)

    def _answer(self, asked: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if not self._table:
            self._table = asked  # the first frame
            shutil.rmtree(asked["scratch"], ignore_errors=True)
            return {}
        match asked["ask"]:
            case "start":
                return {"pid": self._start(asked, descriptors[0])}
            case "ended":
                process, _ = self._running[asked["pid"]]
                with suppress(subprocess.TimeoutExpired):
                    process.wait(asked["seconds"])
                return {"code": process.returncode}
            case "end":
                self._end(asked["pid"])
                return {}
        raise ValueError("there is no such question")

    def _start(self, asked: dict[str, Any], descriptor: int) -> int:
        table = self._table
        bounds = {"read": [], "reach": None, "url": "", **table["resources"]}
        if asked["model"]:
            bounds["read"] = list(table["models"][asked["model"]])
        if asked["dataset"]:
            records = table["datasets"][asked["dataset"]]
            bounds |= {"reach": records["reach"], "url": records["url"]}
            bounds["read"] = [*bounds["read"], *records["read"]]
        else:
            bounds["devices"] = 1  # only steps on records are shared
        Path(table["scratch"]).mkdir(mode=0o700, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=table["scratch"]))
        own = {**table["environment"], "HOME": str(folder), "TMPDIR": str(folder)}
        told, tell = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: S603 - our own program
                [
                    *(sys.executable, "-P", "-m", self._program),
                    *(str(descriptor), str(told)),
                    *(asked["work"], asked["style"], asked["level"]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor, told],
                env={**own, "HF_HOME": str(folder)},
                cwd=folder,
                start_new_session=True,
            )
            with os.fdopen(tell, "wb") as pipe:
                pipe.write(json.dumps({**bounds, "write": [str(folder)]}).encode())
        finally:
            os.close(told)
        self._running[process.pid] = process, folder
        return process.pid

    def _end(self, pid: int) -> None:
        process, folder = self._running.pop(pid)
        if process.poll() is None:
            os.killpg(pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the daemon ends it
    _Served(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).serve()

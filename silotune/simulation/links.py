"""The simulator's end of a worker: start it, send it frames, hear it, end it.

A worker is a fresh Python process (nothing is forked, nothing is pickled: it is told what to import
as JSON) or, for tests and debugging, the calling thread itself, which plays the sites whenever it
waits for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.simulation.frames import Frame, receive_frame, send_frame, through_bytes
from silotune.simulation.memory import keep_freed_memory
from silotune.simulation.workers import Assignment, Host, Inbox, start

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from silotune.simulation.workers import main; main()"
)
# Set before the child imports a numerical library; each reads its own name.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_MOST_STALE_BYTES = 1 << 28
_CLOSING_SECONDS = 5.0
_BUFFER_BYTES = 1 << 22  # asked for; the kernel has a limit of its own

OnFrame = Callable[[int, Frame], None]
OnEnd = Callable[[int, str], None]


class Link(ABC):
    """A worker, seen from the simulator.

    Parameters
    ----------
    index : int
        The worker's number.
    sites : Sequence[int]
        Indices of the sites it plays.
    """

    def __init__(self, index: int, sites: Sequence[int]) -> None:
        self.index, self.sites = index, tuple(sites)
        self._lock = threading.RLock()
        self._held: dict[str, int] = {}  # bytes of each object that the worker still has

    @abstractmethod
    def begin(self, assignment: Assignment, *, on_frame: OnFrame, on_end: OnEnd) -> None:
        """Give the worker its assignment, and hear it until it ends."""

    @abstractmethod
    def step(self) -> bool:
        """Advance a worker that can't by itself; whether it did anything."""

    @abstractmethod
    def hang_up(self) -> None:
        """Make the worker end."""

    @abstractmethod
    def join(self) -> None:
        """Wait until the worker has ended."""

    @abstractmethod
    def _write(self, frame: Frame) -> None: ...

    def send(self, frame: Frame) -> None:
        """Send a frame. A worker that is gone is noticed by whoever hears it, not here."""
        with self._lock, contextlib.suppress(OSError):
            self._write(frame)

    def deliver(
        self,
        header: Mapping[str, Any],
        *,
        objects: Sequence[str],
        deflate: Callable[[str], bytes],
    ) -> int:
        """Send a message's objects, leaving out those that the worker still has.

        Returns
        -------
        int
            Bytes of all its objects: what a site over a network would have pulled.
        """
        with self._lock:
            here = sum(self._held.get(object_id, 0) for object_id in objects)
            if sum(self._held.values()) - here > _MOST_STALE_BYTES:
                self.forget()  # content of messages that overlap without end
            new = [object_id for object_id in objects if object_id not in self._held]
            blobs = [deflate(object_id) for object_id in new]
            self._held |= {object_id: len(blob) for object_id, blob in zip(new, blobs, strict=True)}
            frame = Frame("message", {**header, "objects": list(objects), "new": new}, blobs)
            self.send(frame)
            return sum(self._held[object_id] for object_id in objects)

    def forget(self) -> None:
        """Have the worker drop the objects it holds."""
        with self._lock:
            if self._held:
                self._held.clear()
                self.send(Frame("forget"))


class ProcessLink(Link):
    """A worker process, heard on a thread of its own.

    Parameters
    ----------
    log : Path, optional
        File for what the worker logs, prints or dies with (mode 0600); standard error if absent.
    """

    def __init__(self, index: int, sites: Sequence[int], *, log: Path | None) -> None:
        super().__init__(index, sites)
        keep_freed_memory()
        environment = {**os.environ, **_ONE_THREAD}
        self._connection, theirs = socket.socketpair()
        for end in (self._connection, theirs):  # a worker goes on while its last reply is read
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        with theirs, _opened(log) as errors:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
                stdin=theirs.fileno(),
                stdout=errors,  # nothing a library prints mixes with the simulator's own output
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the simulator alone
            )

    def begin(self, assignment: Assignment, *, on_frame: OnFrame, on_end: OnEnd) -> None:
        """Send the assignment; `on_end` is called when the process has ended, and how."""

        def hear() -> None:
            try:
                while True:
                    on_frame(self.index, receive_frame(self._connection))
            except (EOFError, OSError):
                pass
            finally:
                on_end(self.index, self._ending())

        self._hearing = threading.Thread(
            target=hear, name=f"silotune-worker-{self.index}", daemon=True
        )
        self._hearing.start()
        self.send(Frame("start", assignment.to_header()))

    def step(self) -> bool:
        """A process advances by itself."""
        return False

    def hang_up(self) -> None:
        """Close the connection in both directions, which makes the process end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait for the process to end, and make it end if it doesn't."""
        for insist in (self.process.terminate, self.process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_CLOSING_SECONDS)
                break
            insist()
        self.process.wait()
        self._hearing.join()
        self._connection.close()

    def _write(self, frame: Frame) -> None:
        send_frame(self._connection, frame)

    def _ending(self) -> str:
        try:
            code = self.process.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            return "hung up"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


class InlineLink(Link):
    """A worker that is the calling thread: each `step` carries out one task.

    A thread of its own would be no help: it can't run at the same time, a debugger would stop in
    the wrong one, and NumPy can't read arrays on two threads at once before Python 3.12 (the parser
    behind ``ast.literal_eval`` is not safe there).
    """

    def __init__(self, index: int, sites: Sequence[int]) -> None:
        super().__init__(index, sites)
        self._box = Inbox()
        self._host: Host | None = None

    def begin(self, assignment: Assignment, *, on_frame: OnFrame, on_end: OnEnd) -> None:
        """Keep the assignment; the first step loads the program."""
        del on_end  # it lives as long as its caller
        self._on_frame = on_frame
        self._assignment: Assignment | None = assignment

    def step(self) -> bool:
        """Do one thing, if there is one to do."""
        if self._assignment:
            self._host, frame = start(self._assignment)
            self._assignment = None
            self._on_frame(self.index, frame)
            return True
        if not self._host or self._box.tasks.empty():
            return False
        if task := self._box.tasks.get():
            for frame in self._host.frames(task):
                self._on_frame(self.index, through_bytes(frame))
        return True

    def hang_up(self) -> None:
        """Drop what was not done."""
        self._host = self._assignment = None

    def join(self) -> None:
        """Nothing to wait for."""

    def _write(self, frame: Frame) -> None:
        self._box.take(through_bytes(frame))


def end_all(links: Sequence[Link]) -> None:
    """End workers, all at the same time."""
    for link in links:
        link.hang_up()
    for link in links:
        link.join()


@contextlib.contextmanager
def _opened(log: Path | None) -> Any:
    """The log as a descriptor for a child; standard error without one."""
    if log is None:
        yield 2
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

"""The workers of a simulation: who plays which site, who is ready, who died, who is asked what.

A worker is a fresh Python process (nothing is forked, nothing is pickled: it is told what to import
as JSON) or, for tests and debugging, the calling thread itself, which plays the sites whenever it
waits for them. `Worker` is the simulator's end of one: it starts it, sends it frames, hears it, ends it.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from silotune.errors import SilotuneError, SiteReportedError, WorkerDied, catalogue
from silotune.simulation.workers import (
    Arrays,
    Assignment,
    Frame,
    Host,
    Inbox,
    keep_freed_memory,
    pack_arrays,
    receive_frame,
    send_frame,
    start,
    through_bytes,
    unpack_arrays,
)

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from silotune.simulation.workers import main; main()"
)
# Set before the child imports a numerical library; each reads its own name.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_MOST_STALE_BYTES = 1 << 28
_CLOSING_SECONDS = 5.0
_BUFFER_BYTES = 1 << 22  # asked for; the kernel has a limit of its own

OnFrame = Callable[[int, Frame], None]
OnEnd = Callable[[int, str], None]


class Worker(ABC):
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
        self, header: Mapping[str, Any], *, objects: Sequence[str], deflate: Callable[[str], bytes]
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


class ProcessLink(Worker):
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


class InlineLink(Worker):
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
        if not self._host or self._box.empty:
            return False
        if task := self._box.next(self._host.most):
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


Inspection = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class SiteSlot:
    """A simulated site: its name, and its work relative to the others' (say, its records)."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class WorkerUp:
    """A worker has loaded its program, `seconds` after it began to."""

    worker: int
    sites: tuple[str, ...]
    seconds: float


@dataclass
class _PoolQuestion:
    waiting: set[int]
    answers: dict[int, Frame] = field(default_factory=dict)


def spread(weights: Sequence[float], workers: int) -> list[tuple[int, ...]]:
    """Share sites out to workers: longest processing time first (Graham, 1969).

    Returns
    -------
    list of tuple of int
        Site indices of each worker; at most as many workers as there are sites.
    """
    loads = [(0.0, worker) for worker in range(min(workers, len(weights)))]
    shares: list[list[int]] = [[] for _ in loads]
    for site in sorted(range(len(weights)), key=lambda site: (-weights[site], site)):
        load, worker = heapq.heappop(loads)
        shares[worker].append(site)
        heapq.heappush(loads, (load + weights[site], worker))
    return [tuple(sorted(share)) for share in shares]


class WorkerPool:
    """Workers, each with its sites. They start at once and in parallel.

    Parameters
    ----------
    factory, payload, run_id
        As of `silotune.simulation.workers.Assignment`.
    sites : Sequence[SiteSlot]
        All sites.
    workers : int
        Processes; 0 for none: the calling thread plays the sites.
    log_folder : Path, optional
        Where ``worker-0.log`` and so on go; standard error if absent.
    on_frame : callable
        Called with ``(worker, frame)`` for every frame that is about messages.
    on_death : callable
        Called, with `state` locked, with the worker that ended.

    Attributes
    ----------
    state : threading.Condition
        Guards everything here and what the owner keeps; notified whenever something changed.
    names : tuple of str
        The sites' names.
    worker_of : tuple of int
        The worker of each site.
    dead : set of int
        Workers that ended before they were asked to.
    """

    def __init__(
        self,
        *,
        factory: str,
        payload: Mapping[str, Any],
        sites: Sequence[SiteSlot],
        workers: int,
        run_id: int,
        log_folder: Path | None,
        on_frame: Callable[[int, Frame], object],
        on_death: Callable[[int], object],
    ) -> None:
        if not sites or workers < 0:
            raise ValueError("a simulation needs at least one site and no negative workers")
        self.names = tuple(slot.name for slot in sites)
        if len(set(self.names)) != len(sites):
            raise ValueError("two sites have the same name")
        self.state = threading.Condition()
        self.dead: set[int] = set()
        self._on_frame, self._on_death = on_frame, on_death
        self._ready: list[WorkerUp] = []
        self._bad_news: list[SilotuneError] = []
        self._questions: dict[int, _PoolQuestion] = {}
        self._asked = 0
        self._closed = False
        shares = spread([slot.weight for slot in sites], max(1, workers))
        by_site = {site: worker for worker, share in enumerate(shares) for site in share}
        self.worker_of = tuple(by_site[site] for site in range(len(sites)))
        self.links: list[Worker] = [
            InlineLink(index, share)
            if workers == 0
            else ProcessLink(index, share, log=log_folder and log_folder / f"worker-{index}.log")
            for index, share in enumerate(shares)
        ]
        for link in self.links:
            assignment = Assignment(
                factory=factory,
                payload=payload,
                sites={site: self.names[site] for site in link.sites},
                num_sites=len(sites),
                run_id=run_id,
            )
            link.begin(assignment, on_frame=self._hear, on_end=self._end)

    def close(self) -> None:
        """End the workers, whatever they are doing. Does nothing the second time."""
        with self.state:
            if self._closed:
                return
            self._closed = True
        for link in self.links:  # all at the same time
            link.hang_up()
        for link in self.links:
            link.join()

    def wait_until_ready(self, on_ready: Callable[[WorkerUp], object] | None) -> None:
        """Wait for every worker to load its program. See `WorkerGrid.wait_until_ready`."""
        told = 0

        def changed() -> bool:
            return len(self._ready) > told or bool(self.dead)

        while told < len(self.links):
            with self.state:
                self.wait_for(changed)
                self.raise_bad_news()
                news = self._ready[told:]
                if not news:
                    raise WorkerDied("a worker ended before it was ready")
            for ready in news:
                told += 1
                if on_ready:
                    on_ready(ready)

    def advance(self) -> bool:
        """Let a worker that is the calling thread do one thing; whether there was one."""
        return any(link.step() for link in self.links)

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `condition` holds, or for `timeout` seconds. The caller holds `state`."""
        while not condition() and self.advance():
            pass
        return self.state.wait_for(condition, timeout)

    def raise_bad_news(self) -> None:
        """Raise, once, why a worker ended. The caller holds `state`."""
        if self._bad_news:
            raise self._bad_news.pop(0)

    def inspect_all(
        self, request: Mapping[str, Any], arrays: Arrays, sites: Iterable[str] | None
    ) -> dict[str, Inspection]:
        """Ask the sites' programs. See `WorkerGrid.inspect_all`."""
        chosen = self._indices(sites)
        described, blobs = pack_arrays(arrays)
        question = _PoolQuestion(set(chosen))
        with self.state:
            self._asked += 1
            ticket = self._asked
            self._questions[ticket] = question
        head = {"ticket": ticket, "request": json.dumps(request), "arrays": described}
        try:
            for link in self.links:
                if mine := [site for site in link.sites if site in question.waiting]:
                    link.send(Frame("inspect", {**head, "sites": mine}, blobs))
            self._await_answers(question)
        finally:
            with self.state:
                del self._questions[ticket]
        return {self.names[site]: self._answer(site, question.answers[site]) for site in chosen}

    # --- inspection ---

    def _indices(self, sites: Iterable[str] | None) -> list[int]:
        chosen = set(self.names if sites is None else sites)
        if unknown := chosen - set(self.names):
            raise ValueError(f"no such site: {', '.join(sorted(unknown))}")
        return [site for site, name in enumerate(self.names) if name in chosen]

    def _await_answers(self, question: _PoolQuestion) -> None:
        def orphaned() -> set[int]:
            return {site for site in question.waiting if self.worker_of[site] in self.dead}

        with self.state:
            self.wait_for(lambda: not question.waiting or bool(orphaned()))
            if lost := orphaned():
                self.raise_bad_news()
                raise WorkerDied(f"the worker of {self.listed(lost)} is gone")

    def _answer(self, site: int, frame: Frame) -> Inspection:
        if code := frame.header.get("failed"):
            raise SiteReportedError(
                f"{self.names[site]}: inspection failed with {code}; see worker's log"
            )
        arrays = unpack_arrays(frame.header["arrays"], frame.blobs)
        return json.loads(frame.header["answer"]), arrays

    def listed(self, sites: Iterable[int]) -> str:
        """Sites' names, for people."""
        return ", ".join(self.names[site] for site in sorted(sites))

    # --- called on the hearing threads ---

    def _hear(self, worker: int, frame: Frame) -> None:
        head = frame.header
        if frame.kind not in {"ready", "failed", "inspected"}:
            self._on_frame(worker, frame)
            return
        with self.state:
            if frame.kind == "ready":
                played = tuple(self.names[site] for site in self.links[worker].sites)
                self._ready.append(WorkerUp(worker, played, head["seconds"]))
            elif frame.kind == "failed":
                self._bad_news.append(_as_error(worker, code=head["code"], detail=head["detail"]))
                self.dead.add(worker)
                self._on_death(worker)
            elif question := self._questions.get(head["ticket"]):
                question.waiting.discard(head["site"])
                question.answers[head["site"]] = frame
            self.state.notify_all()

    def _end(self, worker: int, ending: str) -> None:
        with self.state:
            if self._closed or worker in self.dead:
                return
            self.dead.add(worker)
            sites = self.listed(self.links[worker].sites)
            self._bad_news.append(WorkerDied(f"worker {worker} {ending}; it played {sites}"))
            self._on_death(worker)
            self.state.notify_all()


def _as_error(worker: int, *, code: str, detail: str) -> SilotuneError:
    """The error that kept a worker from starting, as this process would have raised it."""
    known = {cls.code: cls for cls in catalogue()}
    if code in known and code != SilotuneError.code:
        return known[code](detail)
    return WorkerDied(f"worker {worker} could not start ({detail}); its log has the traceback")

"""The inside of a simulation worker: many sites in one process, one message at a time, or several.

A worker loads the program (base model and all) once and plays its sites: each message alone or, where
the program has a way to, those that wait together. It talks frames over a socket. A thread of its own
reads the socket at all times, so that the simulator never blocks on a worker that trains, and so that
the worker learns at once of the end of its parent. What goes wrong inside a site stays here, in the log;
a stable code goes back.

A frame is a JSON header and raw blobs, and nothing else:
``<u32 length of the header> <u32 length of all small blobs> <header, UTF-8 JSON> <small blobs> <large
blobs>``; the header's ``sizes`` lists the lengths of all blobs, in bytes and in their order. No frame
can carry code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
from flwr.app import Array, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from silotune.errors import EnvironmentFault, SilotuneError
from silotune.flower import messages

_LENGTHS = struct.Struct("<II")
_LARGE = 1 << 16  # bytes; large blobs are sent and received by themselves, without being copied
_PLAIN_KINDS = frozenset("biufc")

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Frame:
    """One frame.

    Parameters
    ----------
    kind : str
        What the frame is for.
    header : Mapping[str, Any]
        JSON values; ``kind`` and ``sizes`` are reserved.
    blobs : Sequence[bytes]
        Raw content.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[bytes] = ()


def encode(frame: Frame) -> list[bytes]:
    """The frame's bytes, in pieces: head and small blobs, then each large blob."""
    sizes = [len(blob) for blob in frame.blobs]
    header = json.dumps({**frame.header, "kind": frame.kind, "sizes": sizes}).encode()
    small = b"".join(blob for blob in frame.blobs if len(blob) < _LARGE)
    large = [blob for blob in frame.blobs if len(blob) >= _LARGE]
    return [_LENGTHS.pack(len(header), len(small)) + header + small, *large]


def decode(read: Callable[[int], bytes]) -> Frame:
    """A frame from a function that gives so many of the next bytes."""
    header_length, small_length = _LENGTHS.unpack(read(_LENGTHS.size))
    start = read(header_length + small_length)
    header, position, blobs = json.loads(start[:header_length]), header_length, []
    kind, sizes = header.pop("kind"), header.pop("sizes")
    for size in sizes:
        if size < _LARGE:
            blobs.append(start[position : position + size])
            position += size
        else:
            blobs.append(read(size))
    return Frame(kind, header, blobs)


def through_bytes(frame: Frame) -> Frame:
    """The frame as the other side would see it."""
    return decode(io.BytesIO(b"".join(encode(frame))).read)


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Send a frame. Raises `OSError` when the other side is gone."""
    for piece in encode(frame):
        connection.sendall(piece)


def receive_frame(connection: socket.socket) -> Frame:
    """Receive a frame; blocks until it is complete. Raises `EOFError` at the end."""

    def read(size: int) -> bytes:
        # One system call where possible: a thread that reads in small pieces has to get the
        # interpreter's lock back after each of them, from a thread that computes.
        content = connection.recv(size, socket.MSG_WAITALL)
        while len(content) < size:
            more = connection.recv(size - len(content), socket.MSG_WAITALL)
            if not more:
                raise EOFError
            content += more
        return content

    return decode(read)


def pack_arrays(arrays: Arrays) -> tuple[list[list[Any]], list[bytes]]:
    """Arrays as JSON descriptions ``[name, dtype, shape]`` and their bytes in C order.

    Raises
    ------
    TypeError
        An array holds objects or text rather than numbers.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in _PLAIN_KINDS:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which is not numeric")
    described = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    return described, [array.tobytes() for array in arrays.values()]


def unpack_arrays(
    described: Sequence[Sequence[Any]], blobs: Sequence[bytes]
) -> dict[str, np.ndarray]:
    """Arrays from what `pack_arrays` gave: writable, and each call gives its own copy."""
    return {
        name: np.frombuffer(blob, dtype=np.dtype(dtype)).reshape(shape).copy()
        for (name, dtype, shape), blob in zip(described, blobs, strict=True)
    }


# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 1 << 25  # a larger value is refused
_KEPT_BYTES = 1 << 28


def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB of freed memory instead of returning it at once.

    Adapters and activations of a megabyte and more come and go all the time. By default their pages
    go back to the kernel, which has to clear them again for the next message: a third of the cost of
    a message on a virtual machine. Does nothing where the C library has no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


logger = logging.getLogger("silotune.simulation.worker")

_STABLE_CODE = re.compile(r"ST-\d{3}")
_UNNAMED = SilotuneError.code
_GRACE_SECONDS = 1.0


class AnswersJointly(Protocol):
    """Does several jobs at a time, which may meet in the middle."""

    most: int

    def run(self, jobs: Sequence[Callable[[], object]]) -> Iterator[tuple[int, float]]:
        """Do jobs; yields the number of each that is done, and the seconds that it took."""


class SiteProgram(Protocol):
    """What a worker's factory returns: the sites' app, and the simulator's own view of it.

    One whose sites gain by it has `joint` too: messages that wait are then answered together.
    """

    client_app: ClientApp

    def inspect(
        self, site_index: int, request: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Answer the simulator about a site. Never part of a deployment."""


@dataclass(frozen=True)
class Assignment:
    """A worker's part of a simulation; crosses to the worker as JSON.

    Parameters
    ----------
    factory : str
        ``"module:callable"``; called with `payload`, it returns a `SiteProgram`.
    payload : Mapping[str, Any]
        JSON values.
    sites : Mapping[int, str]
        Names of the sites this worker plays, by index (node id less one).
    num_sites : int
        Sites in the whole simulation.
    run_id : int
        Flower's run id.
    """

    factory: str
    payload: Mapping[str, Any]
    sites: Mapping[int, str]
    num_sites: int
    run_id: int

    def to_header(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**vars(self), "sites": [[i, name] for i, name in self.sites.items()]}

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Assignment:
        """Back from `to_header`."""
        return cls(**{**header, "sites": dict(header["sites"])})

    def context(self, site: int) -> Context:
        """A site's Flower context at its start."""
        return Context(
            run_id=self.run_id,
            node_id=site + 1,
            node_config={
                "partition-id": site,
                "num-partitions": self.num_sites,
                "site": self.sites[site],
            },
            state=RecordDict(),
            run_config={},
        )


@dataclass
class _HeldObjects:
    """What the simulator will not send again before it says `forget`: objects by id."""

    contents: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class _Instruction:
    """A message for a site, not inflated yet. `expires` is in Unix seconds."""

    site: int
    root: str
    objects: list[str]
    held: _HeldObjects
    expires: float


@dataclass(frozen=True)
class _Question:
    """The simulator's question about some sites."""

    ticket: int
    sites: tuple[int, ...]
    request: str
    described: list[list[Any]]
    blobs: list[bytes]


_Task = list[_Instruction] | _Question


def load_program(factory: str, payload: Mapping[str, Any]) -> SiteProgram:
    """Import and call a factory; then hold PyTorch, if the factory loaded it, to one thread.

    One thread a worker, however many workers there are: sums are then added in the same order, and
    a seeded simulation gives the same bits with one worker or two.

    Raises
    ------
    EnvironmentFault
        There is no such module or callable.
    """
    module, _, name = factory.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise EnvironmentFault(f"the worker's factory {factory!r} can't be loaded: {exc}") from exc
    program = cast(SiteProgram, build(dict(payload)))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    return program


def is_stable_code(text: object) -> bool:
    """Whether this is one of silotune's error codes, and nothing besides."""
    return isinstance(text, str) and bool(_STABLE_CODE.fullmatch(text))


def stable_code(exc: BaseException) -> str:
    """The only thing about an error that may leave a site: its ``ST-…`` code."""
    code = getattr(exc, "code", None)
    return str(code) if is_stable_code(code) else _UNNAMED


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """Let a site's app handle a message; what it raises becomes an error with a code only."""
    asked, site = messages.outline(message), context.node_config.get("site")
    try:
        reply = app(message=message, context=context)
        addressed = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
        if addressed != (asked.metadata.dst_node_id, asked.metadata.message_id):
            raise ValueError("the app's reply is not a reply to the message it was given")
    except (Exception, SystemExit) as exc:
        code = stable_code(exc)
        logger.exception("site %s: %s failed (%s)", site, asked.metadata.message_type, code)
        return messages.error_reply(asked, code=code)
    return reply


class Host:
    """The sites of one worker, on one loaded program."""

    def __init__(self, assignment: Assignment, program: SiteProgram) -> None:
        self._names, self._program = assignment.sites, program
        self._joint: AnswersJointly | None = getattr(program, "joint", None)
        self._contexts = {site: assignment.context(site) for site in assignment.sites}

    @property
    def most(self) -> int:
        """How many instructions are carried out at a time."""
        return 1 if self._joint is None else self._joint.most

    def frames(self, task: _Task) -> Iterator[Frame]:
        """Carry out a task."""
        if isinstance(task, _Question):
            for site in task.sites:
                yield self._inspected(site, task)
        elif self._joint is None or len(task) == 1:
            for instruction in task:
                yield self._reply(instruction)
        else:
            yield from self._jointly(task, self._joint)

    def _jointly(self, asked: Sequence[_Instruction], joint: AnswersJointly) -> Iterator[Frame]:
        replies: dict[int, Frame] = {}

        def job(number: int) -> None:
            replies[number] = self._reply(asked[number])

        for number, seconds in joint.run([partial(job, n) for n in range(len(asked))]):
            reply = replies.pop(number)
            yield replace(reply, header={**reply.header, "seconds": seconds})

    def _reply(self, task: _Instruction) -> Frame:
        if time.time() > task.expires:  # as Flower: an expired instruction is never delivered
            return Frame("lapsed", {"to": task.root})
        contents = {key: task.held.contents[key] for key in task.objects}
        message = messages.unpack(task.root, contents, arrays=task.held.arrays)
        asked, started = messages.outline(message), time.perf_counter()
        reply = answer(self._program.client_app, message, self._contexts[task.site])
        seconds = time.perf_counter() - started
        try:
            packed = messages.pack(reply)
            blobs = [packed.deflate(key) for key in packed.objects]
        except Exception:
            logger.exception("site %s: its reply can't be serialised", self._names[task.site])
            packed = messages.pack(messages.error_reply(asked, code=_UNNAMED))
            blobs = [packed.deflate(key) for key in packed.objects]
        header = {"to": task.root, "root": packed.root, "objects": list(packed.objects)}
        return Frame("reply", {**header, "seconds": seconds}, blobs)

    def _inspected(self, site: int, task: _Question) -> Frame:
        head = {"ticket": task.ticket, "site": site}
        try:
            request, arrays = json.loads(task.request), unpack_arrays(task.described, task.blobs)
            found, given = self._program.inspect(site, request, arrays)
            described, blobs = pack_arrays(given)
            text = json.dumps(found)
        except Exception as exc:
            logger.exception("site %s: inspection failed", self._names[site])
            return Frame("inspected", {**head, "failed": stable_code(exc)})
        return Frame("inspected", {**head, "answer": text, "arrays": described}, blobs)


class Inbox:
    """Reads frames and turns them into tasks, keeping what the simulator will not send again."""

    def __init__(self) -> None:
        self.orphaned = threading.Event()
        self._waiting = deque[_Instruction | _Question]()
        self._news, self._ended = threading.Condition(), False
        self._held = _HeldObjects()

    def receive(self, connection: socket.socket) -> None:
        """Read until the parent is gone."""
        try:
            while True:
                self.take(receive_frame(connection))
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("a frame from the simulator can't be used; the worker ends")
        self.orphaned.set()
        with self._news:
            self._ended = True
            self._news.notify()

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def next(self, most: int) -> _Task | None:
        """Wait for the next task: a question, or up to `most` instructions; None at the end."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._ended)
            if self._ended:
                return None
            first = self._waiting.popleft()
            if isinstance(first, _Question):
                return first
            found = [first]
            while self._waiting and len(found) < most:
                if isinstance(following := self._waiting[0], _Question):
                    break
                found.append(following)
                self._waiting.popleft()
            return found

    def _put(self, task: _Instruction | _Question) -> None:
        with self._news:
            self._waiting.append(task)
            self._news.notify()

    def take(self, frame: Frame) -> None:
        """Turn one frame into a task, or into content for later ones."""
        head = frame.header
        if frame.kind == "message":
            for object_id, content in zip(head["new"], frame.blobs, strict=True):
                messages.verify(object_id, content)
                self._held.contents[object_id] = content
            what = head["site"], head["root"], head["objects"]
            self._put(_Instruction(*what, self._held, head["expires"]))
        elif frame.kind == "forget":
            self._held = _HeldObjects()
        else:
            sites, asked = tuple(head["sites"]), (head["request"], head["arrays"])
            self._put(_Question(head["ticket"], sites, *asked, list(frame.blobs)))


def start(assignment: Assignment) -> tuple[Host | None, Frame]:
    """Load the program. The frame says that it is ready, or by a code why it is not."""
    started = time.perf_counter()
    try:
        host = Host(assignment, load_program(assignment.factory, assignment.payload))
    except Exception as exc:
        logger.exception("the worker can't start")
        detail = exc.detail if isinstance(exc, SilotuneError) else type(exc).__name__
        return None, Frame("failed", {"code": stable_code(exc), "detail": detail})
    return host, Frame("ready", {"seconds": time.perf_counter() - started})


def serve(connection: socket.socket, *, abandon: Callable[[], object]) -> None:
    """Be a worker until the simulator closes the connection.

    Parameters
    ----------
    connection : socket.socket
        Frames from and to the simulator; the first to come is the assignment.
    abandon : callable
        Called when the simulator is gone and the task at hand has not ended within a second.
    """
    box, finished = Inbox(), threading.Event()

    def listen() -> None:
        box.receive(connection)
        if not finished.wait(_GRACE_SECONDS):
            abandon()

    try:
        first = receive_frame(connection)
        threading.Thread(target=listen, name="silotune-inbox", daemon=True).start()
        host, frame = start(Assignment.from_header(first.header))
        send_frame(connection, frame)
        while host and (task := box.next(host.most)) is not None:
            for frame in host.frames(task):
                if box.orphaned.is_set():
                    return
                send_frame(connection, frame)
    except (EOFError, OSError):
        pass  # the simulator is gone; nobody is left to be told
    finally:
        finished.set()


def main() -> None:
    """Entry point of a worker process; its standard input is the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulator decides, by hanging up
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    serve(connection, abandon=lambda: os._exit(1))
    logging.shutdown()
    os._exit(0)  # an ordinary exit would wait for threads that a library may have left

"""WorkerGrid: Flower's grid over worker processes of this machine.

A `ServerApp` sees an ordinary `flwr.serverapp.Grid`. Behind it each site is pinned to one of a few
worker processes that have the base model loaded; messages and replies go through Flower's own
serialisation, and content that many sites get is sent to a worker once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from flwr.app import Message

from silotune.errors import WorkerDied
from silotune.flower import messages as wire
from silotune.flower.grid import SiteGrid
from silotune.simulation.pool import SiteSlot, WorkerPool, WorkerUp
from silotune.simulation.workers import Arrays, Frame

_RUN_ID = 1  # Flower's; a grid has one run


@dataclass(frozen=True)
class Receipt:
    """What the simulator alone can know of an answered message.

    Parameters
    ----------
    site, message_type, group_id : str
        Whose answer to what (Flower's group id is the round).
    seconds : float
        Time in the site's app.
    bytes_down, bytes_up : int
        Deflated size of the message and of the reply.
    """

    site: str
    message_type: str
    group_id: str
    seconds: float
    bytes_down: int
    bytes_up: int


@dataclass
class _Pending:
    """An instruction without its content; `expires` is in Unix seconds."""

    outline: Message
    site: int
    expires: float
    bytes_down: int = 0


@dataclass(frozen=True)
class _Arrived:
    """An answer not pulled yet; without a frame, that its worker is gone."""

    pending: _Pending
    frame: Frame | None


class WorkerGrid(SiteGrid):
    """Sites in worker processes. Use it as a context manager, or `close` it.

    Parameters
    ----------
    factory : str
        ``"module:callable"``, importable in a new process; called with `payload` it returns a
        `silotune.simulation.workers.SiteProgram`.
    payload : Mapping[str, Any]
        JSON values.
    sites : Sequence[SiteSlot]
        Node ids are 1 to n in this order; ``context.node_config`` has ``partition-id`` (from 0),
        ``num-partitions`` and ``site``.
    workers : int
        Processes. 0 for none, for tests and debugging: the calling thread plays the sites whenever
        it waits or pulls (and PyTorch is held to one thread in this process too).
    log_folder : Path, optional
        Where ``worker-0.log`` and so on go; without it workers log to standard error.
    on_receipt : callable, optional
        Called with a `Receipt` for every reply as it is pulled.

    Notes
    -----
    Workers start at once and in parallel; messages may be pushed before they are ready. Replies
    come in the order in which sites finish, which differs from run to run: aggregate in a way that
    doesn't depend on it.
    """

    def __init__(
        self,
        factory: str,
        payload: Mapping[str, Any],
        sites: Sequence[SiteSlot],
        *,
        workers: int,
        log_folder: Path | None = None,
        on_receipt: Callable[[Receipt], object] | None = None,
    ) -> None:
        super().__init__(_RUN_ID)
        self._on_receipt = on_receipt
        self._pending: dict[str, _Pending] = {}
        self._arrived: dict[str, _Arrived] = {}
        self._news = False
        self._open = [0] * max(1, workers)  # unanswered messages by worker; a push counts as one
        wire.identify(_RUN_ID)
        self._pool = WorkerPool(
            factory=factory,
            payload=payload,
            sites=sites,
            workers=workers,
            run_id=_RUN_ID,
            log_folder=log_folder,
            on_frame=self._on_frame,
            on_death=self._on_death,
        )

    # --- life ---

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing. Does nothing the second time."""
        self._pool.close()

    def wait_until_ready(self, on_ready: Callable[[WorkerUp], object] | None = None) -> None:
        """Wait until every worker has loaded its program, telling `on_ready` of each that has.

        Raises
        ------
        SilotuneError
            Whatever kept a worker from starting, such as `ModelNotFound`; `WorkerDied` if it gave
            no reason.
        """
        self._pool.wait_until_ready(on_ready)

    # --- Flower's interface ---

    def get_node_ids(self) -> list[int]:
        """Nodes of the sites whose worker is alive, in site order."""
        with self._pool.state:
            dead = self._pool.dead
            return [
                site + 1 for site, worker in enumerate(self._pool.worker_of) if worker not in dead
            ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; their ids, in the same order.

        Raises
        ------
        ValueError
            A message is for a node that doesn't exist, or was sent before and is not answered yet.
        """
        with self._pushing():
            return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to any of these messages that have arrived and not been pulled, oldest first.

        Raises
        ------
        WorkerDied
            A worker ended since the last call. The next calls give error replies for its sites.
        """
        asked = message_ids if isinstance(message_ids, Set) else set(message_ids)
        self._pool.advance()
        with self._pool.state:
            self._news = False
            self._pool.raise_bad_news()
            found = [key for key in self._arrived if key in asked]
            taken = [self._arrived.pop(key) for key in found]
        return [self._open_reply(arrived) for arrived in taken]

    # --- beyond Flower's interface ---

    def wait(self, timeout: float) -> bool:
        """Block until something arrived since the last pull, at most `timeout` seconds."""
        with self._pool.state:
            return self._pool.wait_for(lambda: self._news, timeout)

    def inspect_all(
        self, request: Mapping[str, Any], arrays: Arrays, sites: Iterable[str] | None = None
    ) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """Ask the sites' programs something that no site would ever send.

        This is the simulator's own view (its curves over held-out data). It does not pass the gate
        and has no counterpart in a deployment.

        Parameters
        ----------
        request : Mapping[str, Any]
            JSON values.
        arrays : Mapping[str, np.ndarray]
            Numeric arrays; sent once to each worker.
        sites : iterable of str, optional
            Names; all sites if absent.

        Returns
        -------
        dict
            ``{site: (answer, arrays)}`` in site order.

        Raises
        ------
        SiteFailed
            A site's program raised; its code is in the message, the traceback in the worker's log.
        WorkerDied
            A worker that is asked has ended.
        """
        return self._pool.inspect_all(request, arrays, sites)

    # --- inside ---

    @contextlib.contextmanager
    def _pushing(self) -> Iterator[None]:
        """Keep workers from dropping content while more messages with it are on their way."""
        links = self._pool.links
        with self._pool.state:
            for link in links:
                self._open[link.index] += 1
        try:
            yield
        finally:
            for link in links:
                self._settle(link.index)

    def _push(self, message: Message) -> str:
        site = message.metadata.dst_node_id - 1
        if not 0 <= site < len(self._pool.worker_of):
            raise ValueError(f"there is no node {message.metadata.dst_node_id}")
        wire.stamp(message, run_id=self.run.run_id)
        packed = wire.pack(message)
        expires = message.metadata.created_at + message.metadata.ttl
        pending, worker = _Pending(wire.outline(message), site, expires), self._pool.worker_of[site]
        with self._pool.state:
            if packed.root in self._pending or packed.root in self._arrived:
                raise ValueError("this message was sent before and is not answered yet")
            if worker in self._pool.dead:
                self._arrive(packed.root, _Arrived(pending, None))
                return packed.root
            self._pending[packed.root] = pending
            self._open[worker] += 1
        header = {"site": site, "root": packed.root, "expires": expires}
        pending.bytes_down = self._pool.links[worker].deliver(
            header, objects=list(packed.objects), deflate=packed.deflate
        )
        return packed.root

    def _settle(self, worker: int) -> None:
        with self._pool.state:
            self._open[worker] -= 1
            idle = self._open[worker] == 0
        if idle:
            self._pool.links[worker].forget()

    def _arrive(self, message_id: str, arrived: _Arrived) -> None:
        self._arrived[message_id] = arrived
        self._news = True
        self._pool.state.notify_all()

    def _on_frame(self, worker: int, frame: Frame) -> None:
        with self._pool.state:
            pending = self._pending.pop(frame.header["to"])
            # As in Flower: a reply to an expired instruction is dropped, and nobody is told.
            if frame.kind == "reply" and time.time() <= pending.expires:
                self._arrive(frame.header["to"], _Arrived(pending, frame))
        self._settle(worker)

    def _on_death(self, worker: int) -> None:
        lost = [key for key, p in self._pending.items() if self._pool.worker_of[p.site] == worker]
        for key in lost:
            self._arrive(key, _Arrived(self._pending.pop(key), None))
        self._news = True

    def _open_reply(self, arrived: _Arrived) -> Message:
        pending, frame = arrived.pending, arrived.frame
        if frame is None:
            return wire.error_reply(
                pending.outline, kind=wire.NODE_UNAVAILABLE, code=WorkerDied.code
            )
        head = frame.header
        reply = wire.unpack(head["root"], dict(zip(head["objects"], frame.blobs, strict=True)))
        if self._on_receipt:
            self._on_receipt(
                Receipt(
                    site=self._pool.names[pending.site],
                    message_type=pending.outline.metadata.message_type,
                    group_id=pending.outline.metadata.group_id,
                    seconds=head["seconds"],
                    bytes_down=pending.bytes_down,
                    bytes_up=sum(len(blob) for blob in frame.blobs),
                )
            )
        return reply

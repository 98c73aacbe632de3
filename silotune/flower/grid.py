"""Grids: messages out, replies in as they come, a deadline; and the coordinator's own.

`exchange` and `SiteGrid` are what all grids share: the simulator's workers and Flower's Ray engine have
theirs in `silotune.simulation`. In a `LinkGrid` everything that goes out is sealed for its receiver, and
nothing comes in that its site did not seal for this run, round, kind and request. Replies stay in the
link state until the round they belong to is durable; after a crash the same round finds them, and the
instructions still under way, and asks nobody twice.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from silotune.events import tracing
from silotune.flower import messages as wire
from silotune.flower.link_messages import Instruction, Outgoing
from silotune.flower.messages import LinkRun
from silotune.protocol.envelope import (
    COORDINATOR,
    MessagePlace,
    Packing,
    refusal_code,
    seal,
    seal_id,
    unseal,
)
from silotune.protocol.errors import SiteOffline, StoppedByOperator
from silotune.protocol.requests import put_trace, trace_of
from silotune.trust.errors import EnvelopeInvalid

if TYPE_CHECKING:  # with it comes a database, which no simulation needs
    from silotune.flower.superlink import LinkState

_log = logging.getLogger(__name__)

_MOST_SECONDS_TO_GATHER = 60.0  # for sites that are on their way back after a restart
_LONGEST_WAIT = 1.0
_POLL_SECONDS = 0.05


def exchange(
    grid: Grid, messages: Iterable[Message], *, deadline: float
) -> Iterator[tuple[int, Message]]:
    """Send messages and yield ``(node, reply)`` pairs until all replied or time is up.

    Parameters
    ----------
    grid : Grid
        Any Flower grid. One with a ``wait(seconds)`` method is waited on, another polled.
    messages : iterable of Message
        At most one a node.
    deadline : float
        Seconds after which missing replies are given up.

    Notes
    -----
    The node is the one the message went to: an error that the transport raised for a lost site does
    not carry that site's id as its source.
    """
    outgoing = list(messages)
    with _traced(outgoing):
        ends = time.monotonic() + deadline
        sent = grid.push_messages(outgoing)
        pending = {
            message_id: message.metadata.dst_node_id
            for message_id, message in zip(sent, outgoing, strict=True)
            if message_id
        }
        wait: Callable[[float], object] = getattr(grid, "wait", time.sleep)
        while pending:
            replies = list(grid.pull_messages(pending.keys()))
            for reply in replies:
                yield pending.pop(reply.metadata.reply_to_message_id), reply
            left = ends - time.monotonic()
            if left <= 0:
                return
            if pending and not replies:
                wait(min(left, _POLL_SECONDS))


@contextmanager
def _traced(outgoing: list[Message]) -> Iterator[None]:
    """One span around it all, and its ``traceparent`` in every message, while traces are on."""
    if not outgoing:
        yield
        return
    kind, place = outgoing[0].metadata.message_type, trace_of(outgoing[0].content)
    with tracing.exchange(kind, run=place.run, round=place.round) as header:
        if header:
            for message in outgoing:
                put_trace(message, header)
        yield


class SiteGrid(Grid):
    """What Flower's interface asks of a grid, but for the sites, messages out and replies in.

    Parameters
    ----------
    run_id : int
        Flower's.
    timeout : float
        Seconds that `send_and_receive` waits if it is not told.
    """

    def __init__(self, run_id: int, *, timeout: float = float("inf")) -> None:
        self._flower_run, self._timeout = wire.new_run(run_id), timeout

    def set_run(self, run: Run) -> None:
        """Set the run; instructions carry its id from now on."""
        self._flower_run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._flower_run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message, as its own constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and collect the replies until all are there or `timeout` seconds passed."""
        deadline = self._timeout if timeout is None else timeout
        return [reply for _, reply in exchange(self, messages, deadline=deadline)]

    @abstractmethod
    def wait(self, timeout: float) -> object:
        """Block until something may have arrived, at most about `timeout` seconds."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A site that takes part: its node, and the key its replies are signed with."""

    node: int
    site: str
    key: Ed25519PublicKey


@dataclass(frozen=True)
class _AwaitedReply:
    """An instruction whose reply is awaited."""

    peer: Peer
    address: MessagePlace
    seal: str

    @property
    def group(self) -> str:
        """Round and seal: the same instruction has the same group, also in another process."""
        return f"{self.address.round}.{self.seal}"


class LinkGrid(SiteGrid):
    """Messages of one run.

    Parameters
    ----------
    link : Link
        The link state.
    link_run : LinkRun
        Flower's numbers of the run.
    run, federation : str
        Names, for the addresses.
    peers : iterable of Peer
        The sites that approved.
    is_active : callable
        Whether a site, by name, still belongs to the federation.
    key : Ed25519PrivateKey
        The federation's.
    ttl : float
        Seconds after which an unanswered instruction is void: the plan's deadline of a round.
    patience : float
        Seconds that a site may be offline before a round stops waiting for it.
    alarm : callable
        ``alarm(kind, site=…)``: called when a reply is not trusted.

    Attributes
    ----------
    asked : frozenset of int
        The nodes that `get_node_ids` told of last: those of a loop's cohort, or who refused to join.
    """

    def __init__(
        self,
        *,
        link: LinkState,
        link_run: LinkRun,
        run: str,
        federation: str,
        peers: Iterable[Peer],
        is_active: Callable[[str], bool],
        key: Ed25519PrivateKey,
        ttl: float,
        patience: float,
        alarm: Callable[..., None],
    ) -> None:
        super().__init__(link_run.run_id, timeout=ttl)
        self._link, self._link_run = link, link_run
        self._run_name, self._federation, self._key = run, federation, key
        self._peers = {peer.node: peer for peer in peers}
        self._is_active, self._alarm = is_active, alarm
        self._ttl, self._patience = ttl, patience
        self.asked: frozenset[int] = frozenset()
        self._pending: dict[str, _AwaitedReply] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._began, self._began_wall = time.monotonic(), time.time()
        self._seen = link.arrived.count
        self._looked = self._began

    def stop(self) -> None:
        """Have the round loop end with `StoppedByOperator` at its next look at this grid."""
        self._stop.set()
        self._link.arrived.fire()

    # --- Flower's interface ---

    def get_node_ids(self) -> list[int]:
        """Sites that are online; none before all that approve are, or a minute is over.

        A loop fixes its cohort from the first answer. Without the minute, the slowest site to come
        back after a restart would be left out of the rest of the run.
        """
        self._require_going()
        sightings = self._link.sightings()
        online = [
            node
            for node, peer in self._peers.items()
            if node in sightings and sightings[node].online and self._is_active(peer.site)
        ]
        expected = [node for node, peer in self._peers.items() if self._is_active(peer.site)]
        patience = min(_MOST_SECONDS_TO_GATHER, self._ttl / 2)
        gathered = len(online) == len(expected) or time.monotonic() - self._began > patience
        self.asked = frozenset(online) if gathered else frozenset()
        return sorted(self.asked)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Seal and send messages, but adopt what an earlier process sent already.

        Returns
        -------
        list of str
            Ids to pull with; "" for a node that was never there.
        """
        self._require_going()
        known = {(i.node, i.kind, i.group): i for i in self._instructions()}
        packing, outgoing = Packing(), dict[int, Outgoing]()
        ids, awaited = list[str](), list[_AwaitedReply | None]()
        for number, message in enumerate(messages):
            if message.metadata.dst_node_id not in self._peers:  # of a site that was shut out since
                ids.append("")
                awaited.append(None)
                continue
            pending, sealed = self._sealed(message, packing)
            place = (pending.peer.node, pending.address.kind, pending.group)
            ids.append(self._adopted(known.get(place)))
            awaited.append(pending)
            if not ids[-1]:
                outgoing[number] = self._outgoing(pending, sealed)
        sent = self._link.push(self._link_run, list(outgoing.values()))
        for number, message_id in zip(outgoing, sent, strict=True):
            ids[number] = message_id
        with self._lock:
            self._pending |= {i: p for i, p in zip(ids, awaited, strict=True) if i and p}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that came since the last call: verified, without their envelopes.

        A reply that is not trusted, a refusal and a site that is silent for too long are error
        messages whose reason is the error's code.

        Raises
        ------
        RunStopped
            `stop` was called.
        """
        self._require_going()
        with self._lock:
            asked = {i: self._pending[i] for i in message_ids if i in self._pending}
        found = [
            self._opened(message_id, asked.pop(message_id), node, message)
            for message_id, node, message in self._link.messages.replies(
                self._link_run, asked.copy()
            )
        ]
        if asked and time.monotonic() - self._looked >= _LONGEST_WAIT:
            self._looked = time.monotonic()
            found += [self._silent(message_id, p) for message_id, p in self._given_up(asked)]
        return found

    def wait(self, timeout: float) -> None:
        """Until something arrived since the last wait, or a second is over."""
        del timeout  # an arrival wakes us: there is no need to look every few milliseconds
        self._seen = self._link.arrived.wait(since=self._seen, seconds=_LONGEST_WAIT)

    # --- durability ---

    def settle(self, finished_round: int) -> None:
        """A round is durable: forget its messages and those of earlier ones, answered or not."""
        old = [
            i.message_id
            for i in self._instructions()
            if (int(i.group.partition(".")[0]), i.kind == "evaluate") < (finished_round, True)
        ]  # a round's evaluation comes after its checkpoint
        self._link.messages.forget(old)
        with self._lock:
            for message_id in old:
                self._pending.pop(message_id, None)

    def _instructions(self) -> list[Instruction]:
        return self._link.messages.instructions(self._link_run)

    # --- sending ---

    def _sealed(self, message: Message, packing: Packing) -> tuple[_AwaitedReply, RecordDict]:
        peer = self._peers[message.metadata.dst_node_id]
        address = MessagePlace(
            federation=self._federation,
            run=self._run_name,
            round=trace_of(message.content).round,
            kind=message.metadata.message_type,
            sender=COORDINATOR,
            receiver=peer.site,
        )
        sealed = seal(message.content, address=address, key=self._key, packing=packing)
        return _AwaitedReply(peer, address, seal_id(sealed)), sealed

    def _adopted(self, known: Instruction | None) -> str:
        """The id of an earlier process's instruction, if its answer can still come."""
        if known is None:
            return ""
        if self._link.messages.is_answered(known.message_id) or not known.expired:
            return known.message_id
        self._link.messages.forget([known.message_id])
        return ""

    def _outgoing(self, pending: _AwaitedReply, sealed: RecordDict) -> Outgoing:
        return Outgoing(
            node=pending.peer.node,
            kind=pending.address.kind,
            group=pending.group,
            ttl=self._ttl,
            content=sealed,
        )

    # --- receiving ---

    def _opened(
        self, original: str, pending: _AwaitedReply, node: int, message: Message
    ) -> Message:
        """A reply as the round loop may see it."""
        with self._lock:
            self._pending.pop(original, None)
        try:
            if node != pending.peer.node or not message.has_content():
                raise EnvelopeInvalid("the reply is not signed by its site")
            address = pending.address.reply(to=pending.seal)
            content = unseal(message.content, address=address, key=pending.peer.key)
        except EnvelopeInvalid as exc:
            _log.warning("a reply of %s is not trusted: %s", pending.peer.site, exc.detail)
            self._alarm("reply_not_trusted", site=pending.peer.site, detail=exc.detail)
            self._link.messages.forget([original])
            return self._reply(original, pending, exc.code)
        code = refusal_code(content)
        if code is not None:
            self._link.messages.forget([original])  # asked again after a resume, not adopted
        return self._reply(original, pending, content if code is None else code)

    def _reply(self, original: str, pending: _AwaitedReply, content: RecordDict | str) -> Message:
        return wire.reply(
            self._link_run,
            node=pending.peer.node,
            kind=pending.address.kind,
            group=str(pending.address.round),
            to=original,
            content=content,
        )

    def _given_up(self, asked: Mapping[str, _AwaitedReply]) -> list[tuple[str, _AwaitedReply]]:
        """Instructions to sites that are gone: revoked, or offline for longer than is patient."""
        sightings = self._link.sightings()
        gone = []
        for original, pending in asked.items():
            seen = sightings.get(pending.peer.node)
            since = max(seen.until if seen else 0.0, self._began_wall)
            offline = seen is None or not seen.online
            if not self._is_active(pending.peer.site) or (
                offline and time.time() - since > self._patience
            ):
                gone.append((original, pending))
        return gone

    def _silent(self, original: str, pending: _AwaitedReply) -> Message:
        with self._lock:
            self._pending.pop(original, None)
        self._link.messages.forget([original])
        return self._reply(original, pending, SiteOffline.code)

    def _require_going(self) -> None:
        if self._stop.is_set():
            raise StoppedByOperator(f"{self._run_name} was stopped")

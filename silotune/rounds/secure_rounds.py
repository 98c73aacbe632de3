"""Secure rounds at the coordinator: two exchanges each, three if a site drops out between them.

Keys and shared secrets of round r + 1 ride on the messages of round r. Sites that were not in round r,
because they are new or came back, are asked for theirs at the same time. Only before the first round,
and when too few sites are left in the next, two exchanges more are needed.

What a round has settled is on the disk before a site is asked to act on it. A site masks one update a
round, for one cohort, and opens for one survivor set; a coordinator that is killed must ask for the very
same again, or it gets nothing. So it writes down whom it asks to mask and with which sealed shares, and
the survivors before any site signs or opens for them; the next process goes on there. Masked updates
are not written here: the message store has those that arrived, and a site gives its own again, the same
bytes for the same request and uncharged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from silotune.errors import SilotuneError
from silotune.flower.grid import exchange
from silotune.plan.plan import Plan
from silotune.privacy.errors import SecureAggregationError, TooFewSurvivors
from silotune.privacy.secagg.coordinator import CoordinatorRound
from silotune.privacy.secagg.encoding import Encoding
from silotune.privacy.secagg.messages import pack, unpack
from silotune.protocol.replies import (
    CheckReply,
    KeysReply,
    MaskedReply,
    OpenReply,
    ShareReply,
    error_code,
)
from silotune.protocol.requests import (
    CheckRequest,
    KeysRequest,
    MaskedRequest,
    OpenRequest,
    SecureRequest,
    ShareRequest,
)
from silotune.rounds.draw import drawn
from silotune.strategies.base import Terms, weight_in


class SecureRoundStore(Protocol):
    """Keeps the newest secure round of a run."""

    def save_secure_round(self, number: int, content: bytes) -> None:
        """Replace what is kept, durably."""
        ...

    def load_secure_round(self, number: int) -> bytes | None:
        """What is kept of a round, if it is the newest."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A secure round as far as it may not be changed any more.

    Attributes
    ----------
    current : CoordinatorRound
        Its cohort, who is present, and the sealed shares.
    nodes : mapping of site to int
        Where the cohort's sites are.
    survivors : frozenset of str
        Whom sites may have signed or opened for; empty as long as nobody was asked.
    following : CoordinatorRound or None
        The next round's cohort, which sites share with in the same breath.
    void : bool
        The round has come to nothing, and nothing more may be opened in it.
    """

    current: CoordinatorRound
    nodes: Mapping[str, int]
    survivors: frozenset[str] = frozenset()
    following: CoordinatorRound | None = None
    void: bool = False

    def to_bytes(self) -> bytes:
        """For the disk; it holds no secrets, shares are sealed between the sites."""
        facts = {"nodes": dict(self.nodes), "survivors": sorted(self.survivors), "void": self.void}
        following = self.following.dump() if self.following is not None else b""
        return pack([json.dumps(facts).encode(), self.current.dump(), following])

    @classmethod
    def from_bytes(cls, blob: bytes, *, threshold: int | None, largest_cohort: int) -> Settled:
        """Read what `to_bytes` wrote."""
        text, current, following = unpack(blob, count=3)
        facts = json.loads(text)

        def restored(dumped: bytes) -> CoordinatorRound:
            return CoordinatorRound.restore(
                dumped, threshold=threshold, largest_cohort=largest_cohort
            )

        return cls(
            current=restored(current),
            nodes=facts["nodes"],
            survivors=frozenset(facts["survivors"]),
            following=restored(following) if following else None,
            void=facts["void"],
        )


class EventLog(Protocol):
    """Where what happens is written down."""

    def append_event(self, kind: Any, **fields: Any) -> Mapping[str, Any]:
        """Record what happened."""
        ...


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """What a secure round came to.

    Attributes
    ----------
    survivors : tuple of str
        Sites whose updates are in the sum; empty if the round is void.
    total : float64 array or None
        Sum of the survivors' weighted updates; None if the round is void.
    mass : float
        Divisor that belongs to it.
    saturated : int
        Numbers that sites had to set to the bound, as far as they may say.
    exchanges : int
        Times that the coordinator waited for the sites.
    bytes_up, bytes_down : int
        Content of the messages, without Flower's framing.
    codes : tuple of str
        Of the sites that failed.
    """

    survivors: tuple[str, ...] = ()
    total: NDArray[np.float64] | None = None
    mass: float = 0.0
    saturated: int = 0
    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    codes: tuple[str, ...] = ()


@dataclass
class _Account:
    """What a round has cost so far."""

    number: int
    exchanges: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    codes: list[str] = field(default_factory=list)


class SecureRounds:
    """The secure rounds of one run.

    Parameters
    ----------
    plan : Plan
        The run's plan.
    run : str
        The run's name.
    grid : Grid
        The way to the sites.
    log : EventLog
        Gets ``site_replied``, ``site_phase`` and ``site_failed``, with the phase.
    memory : RoundMemory
        Keeps what a round has settled.
    members : iterable of Terms
        Sites that joined the run.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        run: str,
        grid: Grid,
        log: EventLog,
        memory: SecureRoundStore,
        members: Iterable[Terms],
    ) -> None:
        self._plan, self._run, self._grid, self._log = plan, run, grid, log
        self._text = plan.canonical()
        self._nodes = {terms.site: terms.node for terms in members}
        self._sites = {node: site for site, node in self._nodes.items()}
        self._members = frozenset(self._nodes)
        self._ready: dict[int, CoordinatorRound] = {}
        self._memory = memory

    def round(self, number: int, arrays: ArrayRecord, *, encoding: Encoding) -> SecureSum:
        """Run one round; void if too few sites come through.

        Parameters
        ----------
        number : int
            From 1.
        arrays : ArrayRecord
            The global adapter.
        encoding : Encoding
            Of this round's updates.
        """
        account = _Account(number)
        settled = self._settled(number)
        resumed = settled is not None
        if settled is None:
            ready = self._ready.pop(number, None) or self._set_up(number, account)
            settled = Settled(current=ready, nodes=self._nodes)
        current, following = settled.current, settled.following
        if number < self._plan.rounds.number and not settled.survivors:
            following = self._new_round()
        opened = bool(settled.survivors)
        try:
            if settled.void:
                raise TooFewSurvivors("the round was void before the coordinator was started again")
            current.require_quorum(current.present)
            if not resumed:
                self._settle(number, settled)
            self._collect(arrays, settled, following, encoding, account)
            current.require_quorum(current.survivors)
            if not settled.survivors:
                settled = replace(
                    settled, survivors=frozenset(current.survivors), following=following
                )
                self._settle(number, settled)
            self._agree(number, current, account)
            opened = True
            self._open(number, current, following, account)
            total = current.unmask()
        except SecureAggregationError as exc:
            if not settled.void:
                self._settle(number, replace(settled, void=True))
                if following is not None and not opened:
                    self._share(number + 1, following, account)
            self._log.append_event("round_void", round=number, code=exc.code, detail=exc.detail)
            return self._summary(account)
        finally:
            self._keep(number + 1, following)
        values, saturated = encoding.decode(total)
        return self._summary(account, current, values, saturated)

    # --- over a crash ---

    def _settle(self, number: int, settled: Settled) -> None:
        """Write down what may not change any more, before anybody is asked to act on it."""
        self._memory.save_secure_round(number, settled.to_bytes())

    def _settled(self, number: int) -> Settled | None:
        """What an earlier process had settled of this round."""
        kept = self._memory.load_secure_round(number)
        if kept is None:
            return None
        aggregation = self._plan.aggregation
        assert aggregation.cohort is not None  # validated with the plan
        found = Settled.from_bytes(
            kept, threshold=aggregation.threshold, largest_cohort=aggregation.cohort
        )
        # Sites that are not back yet: what they sent before may be here.
        for site in found.current.present - self._nodes.keys():
            self._nodes[site] = found.nodes[site]
            self._sites[found.nodes[site]] = site
        return found

    # --- phases ---

    def _drawn(self, number: int) -> frozenset[str]:
        """The sites that a round asks; if some are drawn, those that the round's events name.

        Not of `_nodes`, which after a restart may have one that is not back yet.
        """
        if self._plan.rounds.sites is None:
            return frozenset(self._nodes)
        return drawn(self._plan, run=self._run, server_round=number, sites=self._members)

    def _new_round(self) -> CoordinatorRound:
        aggregation = self._plan.aggregation
        assert aggregation.cohort is not None  # validated with the plan
        return CoordinatorRound(threshold=aggregation.threshold, largest_cohort=aggregation.cohort)

    def _set_up(self, number: int, account: _Account) -> CoordinatorRound:
        """Keys and secrets in two exchanges of their own."""
        fresh = self._new_round()
        # A message of its own: a link that knows an equal one would give the answer of that time,
        # and with it keys that the site has replaced since.
        asked = KeysRequest(**self._place(number), attempt=os.urandom(8))
        messages = [self._message(site, asked) for site in sorted(self._drawn(number))]
        for site, reply in self._exchange("keys", messages, account):
            with self._noting("keys", site, account):
                fresh.advertise(site, KeysReply.read(reply).require_keys())
        self._share(number, fresh, account)
        return fresh

    def _share(self, number: int, fresh: CoordinatorRound, account: _Account) -> None:
        """Have the sites that sent keys share their secrets."""
        messages = list(self._share_messages(number, fresh, set(fresh.advertised)))
        for site, reply in self._exchange("share", messages, account):
            with self._noting("share", site, account):
                fresh.add_shares(site, ShareReply.read(reply).require_shares())

    def _share_messages(
        self, number: int, fresh: CoordinatorRound, sites: set[str]
    ) -> Iterator[Message]:
        if not self._possible(fresh):
            return
        asked = ShareRequest(**self._place(number), cohort=fresh.cohort.to_bytes())
        for site in sorted(sites):
            yield self._message(site, asked)

    @staticmethod
    def _possible(fresh: CoordinatorRound) -> bool:
        """Whether a round can be had with the sites that sent keys."""
        try:
            return fresh.topology.quorum <= len(fresh.advertised)
        except SecureAggregationError:
            return False

    def _collect(
        self,
        arrays: ArrayRecord,
        settled: Settled,
        following: CoordinatorRound | None,
        encoding: Encoding,
        account: _Account,
    ) -> None:
        """Masked updates of this round, and keys for the next from everybody.

        If sites may have opened for a survivor set already, it is collected again, whole and alone.

        Raises
        ------
        TooFewSurvivors
            An update of that set is not to be had any more.
        """
        current, number = settled.current, account.number
        senders = settled.survivors or current.present
        joining = self._drawn(number + 1)
        like, present = encoding.zeros(), sorted(current.present)
        place = {**self._place(number), "arrays": arrays, "present": present}
        messages = [
            self._message(site, MaskedRequest(**place, sealed=current.sealed_for(site)))
            for site in sorted(senders)
        ]
        if following is not None and not settled.survivors:
            others = joining - current.present
            asked = KeysRequest(**self._place(number + 1))
            messages += [self._message(site, asked) for site in sorted(others)]
        for site, reply in self._exchange("masked", messages, account):
            with self._noting("masked", site, account):
                found = (MaskedReply if site in senders else KeysReply).read(reply)
                if isinstance(found, MaskedReply):
                    current.add_masked(site, found.update, like=like)
                    size = found.update.nbytes
                    self._log.append_event("site_replied", round=number, site=site, bytes=size)
                    self._log.append_event("site_phase", round=number, site=site, phase="masked")
                if following is not None and not settled.survivors and site in joining:
                    following.advertise(site, found.require_keys())
        if lost := settled.survivors - current.survivors:
            raise TooFewSurvivors(
                f"sites may have opened with the update of {', '.join(sorted(lost))}, which is lost"
            )

    def _agree(self, number: int, current: CoordinatorRound, account: _Account) -> None:
        """Have the survivors sign who survived, if not everybody did."""
        if not current.agreement_needed:
            return
        survivors = sorted(current.survivors)
        asked = CheckRequest(**self._place(number), survivors=survivors)
        messages = [self._message(site, asked) for site in survivors]
        for site, reply in self._exchange("check", messages, account):
            with self._noting("check", site, account):
                current.add_signature(site, CheckReply.read(reply).signature)
        current.require_quorum(set(current.signatures))

    def _open(
        self,
        number: int,
        current: CoordinatorRound,
        following: CoordinatorRound | None,
        account: _Account,
    ) -> None:
        """Shares of the masks from the survivors, and of the next round's secrets from everybody."""
        possible = following is not None and self._possible(following)
        asked = OpenRequest(
            **self._place(number),
            survivors=sorted(current.survivors),
            signatures=current.signatures,
        )
        messages = []
        for site in asked.survivors:
            joins = possible and following is not None and site in following.advertised
            cohort = following.cohort.to_bytes() if joins and following is not None else b""
            messages.append(self._message(site, replace(asked, cohort=cohort)))
        if following is not None:
            others = set(following.advertised) - current.survivors
            messages += self._share_messages(number + 1, following, others)
        for site, reply in self._exchange("open", messages, account):
            with self._noting("open", site, account):
                found = (OpenReply if site in current.survivors else ShareReply).read(reply)
                if isinstance(found, OpenReply):
                    current.add_opening(site, found.opened)
                    self._log.append_event("site_phase", round=number, site=site, phase="unmasked")
                if possible and following is not None and site in following.advertised:
                    following.add_shares(site, found.require_shares())

    def _keep(self, number: int, following: CoordinatorRound | None) -> None:
        """Start the next round from what rode along, if that is enough for a quorum."""
        if following is None or not self._possible(following):
            return
        if len(following.present) >= following.topology.quorum:
            self._ready[number] = following

    # --- messages ---

    def _place(self, number: int) -> dict[str, Any]:
        """What every request says."""
        return {"plan": self._text, "run": self._run, "round": number}

    def _message(self, site: str, asked: SecureRequest) -> Message:
        return asked.message(self._nodes[site])

    def _exchange(
        self, phase: str, messages: Iterable[Message], account: _Account
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send messages; yield the sites' replies, and note those that failed."""
        outgoing = list(messages)
        if not outgoing:
            return
        account.exchanges += 1
        account.bytes_down += sum(_bytes_of(message.content) for message in outgoing)
        deadline = self._plan.rounds.deadline
        for node, reply in exchange(self._grid, outgoing, deadline=deadline):
            site = self._sites[node]
            if code := error_code(reply):
                self._failed(phase, site, code, account)
                continue
            account.bytes_up += _bytes_of(reply.content)
            yield site, reply.content

    @contextmanager
    def _noting(self, phase: str, site: str, account: _Account) -> Iterator[None]:
        """Turn what is wrong with one site's reply into an event; the others' go on."""
        try:
            yield
        except SilotuneError as exc:
            self._failed(phase, site, exc.code, account, exc.detail)

    def _failed(
        self, phase: str, site: str, code: str, account: _Account, detail: str = ""
    ) -> None:
        account.codes.append(code)
        more = {"detail": detail} if detail else {}
        self._log.append_event(
            "site_failed", round=account.number, site=site, code=code, phase=phase, **more
        )

    def _summary(
        self,
        account: _Account,
        current: CoordinatorRound | None = None,
        total: NDArray[np.float64] | None = None,
        saturated: int = 0,
    ) -> SecureSum:
        survivors = tuple(sorted(current.survivors)) if current is not None else ()
        return SecureSum(
            survivors=survivors,
            total=total,
            mass=self._mass(current) if current is not None else 0.0,
            saturated=saturated,
            exchanges=account.exchanges,
            bytes_up=account.bytes_up,
            bytes_down=account.bytes_down,
            codes=tuple(account.codes),
        )

    def _mass(self, current: CoordinatorRound) -> float:
        """The divisor, from what the members signed."""
        members = current.cohort.members
        largest = max(member.declared_units for member in members)
        return math.fsum(
            weight_in(self._plan, declared_units=member.declared_units, largest=largest).mass
            for member in members
            if member.site in current.survivors
        )


def _bytes_of(content: RecordDict) -> int:
    """Size of what the records hold."""
    arrays = sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )
    return arrays + sum(
        len(value) if isinstance(value, bytes | str) else 8
        for record in content.config_records.values()
        for value in record.values()
    )

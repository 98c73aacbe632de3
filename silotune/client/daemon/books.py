"""A site's two books, ledger and audit log, held against each other and the coordinator's memory.

What one place forgets, another remembers. The audit log writes down how far the ledger goes and what the
coordinator signed of it; the ledger writes down how far the audit log goes; the coordinator keeps the
newest heads of both. One book restored from a backup is found here, at start; both restored together are
found by the coordinator, which is asked before anything is trained.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.client.daemon.api import CoordinatorApi
from silotune.client.daemon.enrolled import Enrolment
from silotune.errors import LedgerDamaged
from silotune.privacy.ledger import Ledger
from silotune.privacy.spent import LEDGER_FILE
from silotune.protocol import http
from silotune.protocol.errors import CoordinatorUnavailable, PortUnreachable
from silotune.trust.audit import AuditHead, AuditLog
from silotune.trust.chain import Head
from silotune.trust.errors import AuditLogDamaged, BooksDisagree, FederationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

logger = logging.getLogger(__name__)

LEDGER_AT, RESTORED = "ledger_at", "books_restored"
_ABOUT_THE_LEDGER = frozenset({LEDGER_AT, RESTORED, "answered"})
_TRIES = 6


class SiteBooks:
    """The books of a site that is enrolled, as the coordinator is told of them.

    Parameters
    ----------
    enrolment : Enrolment
        Keys and the federation's.
    audit : AuditLog
        The site's.

    Attributes
    ----------
    trouble : str
        Why the coordinator does not sign them; empty as long as it does.
    """

    def __init__(self, *, enrolment: Enrolment, audit: AuditLog) -> None:
        self._enrolment, self._audit = enrolment, audit
        self._opened: Ledger | None = None
        self._theirs: AuditHead | None = None
        self._known: http.Known | None = None  # what the coordinator signed last; None: to be asked
        self._exchanged = 0
        self._agreed: set[str] = set()
        self._lock = threading.RLock()
        self.trouble = ""

    @property
    def ledger(self) -> Ledger | None:
        """The site's ledger, once it has one: checked whole when it is opened, by new rows after."""
        path: Path = self._enrolment.state / LEDGER_FILE
        if self._opened is None and path.exists():
            self._opened = Ledger(path, create=False)
        return self._opened

    def agree(self, api: CoordinatorApi, run: str, dataset: str) -> None:
        """Ask, before the first training of a run in this process, whether these are the newest books.

        The coordinator's signature then covers the run's reservation. Whatever is lost later was charged
        within what open reservations allow, and so the coordinator knows a bound for it.

        Raises
        ------
        BooksDisagree
            They are not: nothing may be trained.
        """
        with self._lock:
            if run in self._agreed and not self.trouble:
                return
            if self.ledger is not None:
                head = self._audit.head
                self.ledger.vouch(dataset, run, (head.seq, head.hash))
            for turn in range(_TRIES):
                try:
                    self.exchange(api, force=True)
                    break
                except (PortUnreachable, CoordinatorUnavailable):
                    if turn == _TRIES - 1:
                        raise
                    time.sleep(0.5 * 2**turn)
            self._agreed.add(run)

    def exchange(self, api: CoordinatorApi, *, force: bool = False) -> None:
        """Have the heads of both books counter-signed, and sign the coordinator's.

        Nothing is sent if nothing was written since the last exchange, unless `force` says so.

        Raises
        ------
        BooksDisagree
            The coordinator has signed later or other heads than these books have.
        """
        with self._lock:
            if self._audit.head.seq <= self._exchanged and not force:
                return
            try:
                self._exchange(api)
            except BooksDisagree as exc:
                if not self.trouble:
                    self._audit.append("books_refused", code=exc.code, detail=exc.detail[:500])
                    logger.error("the coordinator does not know these books: %s", exc)
                self.trouble, self._exchanged = exc.detail, self._audit.head.seq
                self._agreed.clear()
                raise
            self.trouble, self._exchanged = "", self._audit.head.seq

    def _exchange(self, api: CoordinatorApi) -> None:
        if self._known is None:
            self._known = asked_heads(api, self._enrolment).known
        known, self._known = self._known, None  # asked again if the answer to this is lost
        yours = self._counter_signed()
        ledger = self.ledger
        head = None if ledger is None else ledger.head
        if head is not None:
            self._audit.append(LEDGER_AT, ledger_seq=head.seq, ledger_hash=head.hash)
        own = self._audit.head
        reply = api.exchange_heads(
            http.HeadExchange(
                mine=_log_head(own),
                yours=yours,
                ledger=None if head is None else _ledger_head(head),
                spent=account_of(ledger),
                after=self._held(known),
            )
        )
        key = self._enrolment.federation_key
        if reply.yours is None:
            raise FederationError("the coordinator did not sign the head it was sent")
        seen = AuditHead(reply.yours.owner, reply.yours.seq, reply.yours.hash)
        self._audit.witness(seen, base64.b64decode(reply.yours.signature), key)
        if reply.ledger_signed is not None and ledger is not None:
            signed = Head(reply.ledger_signed.seq, reply.ledger_signed.hash)
            ledger.witness(signed, base64.b64decode(reply.ledger_signed.signature), key)
        self._theirs = AuditHead(reply.mine.owner, reply.mine.seq, reply.mine.hash)
        self._known = http.Known(
            log=_log_head(own), ledger=None if head is None else _ledger_head(head)
        )

    def _counter_signed(self) -> http.CounterSignature | None:
        if self._theirs is None:
            return None
        key = self._enrolment.keys.signing
        signature = self._theirs.sign(key)
        self._audit.counter_signed(self._theirs, signature, key.public_key())
        return http.CounterSignature(
            owner=self._theirs.owner,
            seq=self._theirs.seq,
            hash=self._theirs.hash,
            signature=base64.b64encode(signature).decode(),
        )

    def _held(self, known: http.Known) -> http.Known:
        """What these books have at the places of heads that the coordinator signed."""
        log, ledger = None, None
        if known.log is not None and (found := self._audit.hash_of(known.log.seq)):
            log = http.LogHead(owner=self._audit.owner, seq=known.log.seq, hash=found)
        if known.ledger is not None:
            head = _head_at(self.ledger, known.ledger.seq)
            ledger = None if head is None else _ledger_head(head)
        return http.Known(log=log, ledger=ledger)


def asked_heads(api: CoordinatorApi, enrolment: Enrolment) -> http.SignedHeads:
    """The newest heads of this site that the coordinator signed, with its signature checked.

    Raises
    ------
    FederationError
        The answer is of another site, or not signed by the federation.
    """
    heads, facts = api.heads(), enrolment.facts
    if not heads.verified(enrolment.federation_key):
        raise FederationError("the heads that the coordinator remembers are not signed by it")
    if (heads.federation, heads.site) != (facts.federation, facts.site):
        raise FederationError("the heads that the coordinator remembers are of another site")
    return heads


def tell_damage(api: CoordinatorApi, enrolment: Enrolment) -> None:
    """Tell the coordinator that this site's books are damaged: it serves the site no more.

    Raises
    ------
    BooksDisagree
        What the coordinator answers once it has noted it.
    """
    nothing = http.LogHead(owner=enrolment.facts.site, seq=0, hash="0" * 64)
    api.exchange_heads(http.HeadExchange(mine=nothing))


def account_of(ledger: Ledger | None) -> tuple[http.Spent, ...]:
    """What a ledger has charged and holds, for the coordinator to remember."""
    standing = ledger.standing() if ledger is not None else {}
    return tuple(
        http.Spent(dataset=name, mechanism=leaf, charged=charged, held=held)
        for name, tally in sorted(standing.items())
        for leaf, (charged, held) in sorted(tally.items())
    )


def verify_books(state: Path, audit: AuditLog, *, trusted: Ed25519PublicKey) -> str:
    """Check ledger and audit log whole, against each other and the coordinator's signatures kept here.

    Parameters
    ----------
    state : Path
        The site's state folder.
    audit : AuditLog
        The site's.
    trusted : Ed25519PublicKey
        The coordinator's key.

    Returns
    -------
    str
        What was checked, for people.

    Raises
    ------
    AuditLogDamaged
        The log was edited, cut or rolled back, or is not the one that the ledger has seen.
    LedgerDamaged
        The ledger was edited, cut or rolled back, or is gone although the audit log has seen it.
    """
    end = audit.verify(trusted=trusted)
    seen = _ledger_seen_by(audit)
    path = state / LEDGER_FILE
    parts = (path, *(path.with_name(path.name + end) for end in (".head", ".witness")))
    if not any(part.exists() for part in parts):
        if seen is not None:
            raise LedgerDamaged(
                f"there is no ledger in {state}, and by the audit log it had {seen.seq} rows"
            )
        return f"no ledger yet, and the audit log ({end.seq} lines) knows of none"
    ledger = Ledger(path, create=False)
    try:
        witnessed = ledger.witnessed()
        rows = ledger.verify(trusted=trusted if witnessed else None).seq
        if seen is not None and _head_at(ledger, seen.seq) != seen:
            raise LedgerDamaged(
                f"{path} is not the ledger that the audit log has seen: "
                f"row {seen.seq} is missing or another one"
            )
        line = ledger.vouched
        if line is not None and audit.hash_of(line[0]) != line[1]:
            raise AuditLogDamaged(
                f"{audit.path} is not the audit log that the ledger has seen: "
                f"line {line[0]} is missing or another one"
            )
    finally:
        ledger.close()
    told = f"whole, {rows} rows, in agreement with its head file"
    told += f" and with the audit log up to row {seen.seq}" if seen else ""
    return told + (f"; the coordinator's newest signature kept here is of row {witnessed.seq}"
                   if witnessed else "; no signature of the coordinator is kept here")  # fmt: skip


def _ledger_seen_by(audit: AuditLog) -> Head | None:
    """The newest head of the ledger that the audit log wrote down."""
    found = None
    for line in audit.lines():
        seq = line.fields.get("ledger_seq")
        if line.kind in _ABOUT_THE_LEDGER and isinstance(seq, int):
            found = Head(seq, str(line.fields.get("ledger_hash")))
    return found


def _head_at(ledger: Ledger | None, seq: int) -> Head | None:
    if ledger is None:
        return None
    found = Head(seq, ledger.hash_of(seq) if seq else "0" * 64)
    return found if found.hash else None


def _log_head(head: AuditHead) -> http.LogHead:
    return http.LogHead(owner=head.owner, seq=head.seq, hash=head.hash)


def _ledger_head(head: Head) -> http.LedgerHead:
    return http.LedgerHead(seq=head.seq, hash=head.hash)

"""The coordinator's memory of the sites' books: the newest heads that it signed, and what was spent.

A site's ledger and audit log only grow. Whoever shows heads that went back, or that do not continue the
ones signed last, has restored an old copy, deleted a book, or runs two copies: nothing is signed for it,
it is served no more, and both teams are told. It comes back with the newest copy, or by restoring an
older one with everything charged that the newest signature says was spent.

The coordinator's audit log has every head that was signed; the store has the newest, with the account,
and the privacy certificates that sites hand in when a run is over, for people to download.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, insert, select

from silotune.errors import CertificateInvalid
from silotune.protocol import http
from silotune.protocol.envelope import COORDINATOR
from silotune.server.config import CoordinatorKeys
from silotune.server.enrolment import Registrar
from silotune.server.store.database import CERTIFICATES, SITE_BOOKS, Store
from silotune.server.store.runs import Runs
from silotune.trust import identity
from silotune.trust.audit import COUNTER_SIGNED, AuditLog
from silotune.trust.errors import BooksDisagree, FederationError
from silotune.trust.identity import fingerprint
from silotune.trust.signed import decoded, encoded

LEDGER_SIGNED, RESTORED = "ledger_signed", "books_restored"


@dataclass(frozen=True, kw_only=True)
class KnownBooks:
    """What the coordinator knows of one site's books.

    Attributes
    ----------
    known : Known
        The newest heads that it signed.
    spent : tuple of Spent
        What the site said was spent by then.
    halted : str
        Why the site is not served; empty if it is.
    """

    known: http.Known = field(default_factory=http.Known)
    spent: tuple[http.Spent, ...] = ()
    halted: str = ""


class Books:
    """Signs the heads of sites, and remembers them.

    Parameters
    ----------
    store, keys, registrar, audit
        The coordinator's.
    alarm : callable
        ``alarm(kind, site=…)``.
    changed : callable
        Called when a site is no longer served, or again.
    """

    def __init__(
        self,
        *,
        store: Store,
        keys: CoordinatorKeys,
        registrar: Registrar,
        audit: AuditLog,
        alarm: Callable[..., None],
        changed: Callable[[], None],
    ) -> None:
        self._store, self._keys, self._registrar = store, keys, registrar
        self._audit, self._alarm, self._changed = audit, alarm, changed
        self._lock = threading.RLock()
        self._memory = self._load()

    # --- questions ---

    def of(self, site: str) -> KnownBooks:
        """What is known of a site's books."""
        return self._memory.get(site, KnownBooks())

    def serves(self, site: str) -> bool:
        """Whether a site is in the federation, with books that are the newest."""
        return self._registrar.is_active(site) and not self.of(site).halted

    def heads(self, site: str) -> http.SignedHeads:
        """The newest heads of a site, signed, for the site to hold its own books against."""
        memory = self.of(site)
        return http.SignedHeads.make(
            self._keys.signing,
            federation=self._registrar.federation,
            site=site,
            known=memory.known,
            spent=memory.spent,
        )

    # --- exchange ---

    def exchange(self, site: str, theirs: http.HeadExchange) -> http.HeadExchange:
        """Keep the site's signature of our head, sign theirs if they continue the last, send ours.

        Raises
        ------
        BooksDisagree
            The site's books went back or are others; it is not served from now on.
        FederationError
            The heads are of another log.
        """
        if theirs.mine.owner != site:
            raise FederationError(f"{site} sent the head of another log than its own")
        with self._lock:
            memory = self.of(site)
            if wrong := _contradiction(memory, theirs):
                self._halt(site, memory, wrong)
                raise BooksDisagree(wrong)
            if theirs.yours is not None:
                self._keep_signature(site, theirs.yours)
            # Remembered before it is signed: what is signed is never more than what is known.
            known = http.Known(log=theirs.mine, ledger=theirs.ledger or memory.known.ledger)
            self._remember(site, KnownBooks(known=known, spent=theirs.spent or memory.spent))
            signed = http.HeadExchange(
                mine=http.LogHead.of(self._audit.head),
                yours=self._sign_log(theirs.mine),
                ledger_signed=None
                if theirs.ledger is None
                else self._sign_ledger(site, theirs.ledger),
            )
        return signed.model_copy(update={"mine": http.LogHead.of(self._audit.head)})

    def restore(self, site: str, asked: http.Restored) -> None:
        """Take older books in the place of lost ones, if all that was spent is charged in them.

        Raises
        ------
        FederationError
            It is not signed by the site, or replaces other heads than the newest.
        BooksDisagree
            Something that was spent is not charged.
        """
        member = self._registrar.enrolled[site].member
        own = (asked.federation, asked.site, asked.log.owner)
        signed = asked.verified(identity.decode_signing_key(member.signing_key))
        if own != (self._registrar.federation, site, site) or not signed:
            raise FederationError("the restoration is not signed by the site it is of")
        with self._lock:
            memory = self.of(site)
            if asked.replaces != memory.known:
                raise FederationError("the restoration does not replace the newest heads")
            if lacking := _lacking(asked.spent, memory.spent):
                raise BooksDisagree(
                    f"what was spent on {lacking} is not charged in the restored ledger"
                )
            self._audit.append(
                RESTORED,
                site=site,
                log_seq=asked.log.seq,
                log_hash=asked.log.hash,
                ledger_seq=asked.ledger.seq,
                ledger_hash=asked.ledger.hash,
                lost_log_seq=_seq(memory.known.log),
                lost_ledger_seq=_seq(memory.known.ledger),
                reason=asked.reason,
            )
            known = http.Known(log=asked.log, ledger=asked.ledger)
            self._remember(site, KnownBooks(known=known, spent=asked.spent))
        lost = f"from ledger row {_seq(memory.known.ledger)} to {asked.ledger.seq}: {asked.reason}"
        self._alarm(RESTORED, site=site, detail=lost)
        self._changed()

    # --- inside ---

    def _halt(self, site: str, memory: KnownBooks, wrong: str) -> None:
        if memory.halted:
            return
        self._save(site, KnownBooks(known=memory.known, spent=memory.spent, halted=wrong))
        self._alarm("books_disagree", site=site, detail=f"{BooksDisagree.code}: {wrong}")
        self._changed()

    def _remember(self, site: str, memory: KnownBooks) -> None:
        back = self.of(site).halted
        self._save(site, memory)
        if back:
            self._audit.append("books_agree_again", site=site)
            self._changed()

    def _keep_signature(self, site: str, yours: http.CounterSignature) -> None:
        member = self._registrar.enrolled[site].member
        key = identity.decode_signing_key(member.signing_key)
        self._audit.witness(yours.head, decoded(yours.signature), key)

    def _sign_log(self, mine: http.LogHead) -> http.CounterSignature:
        signature = mine.head.sign(self._keys.signing)
        self._audit.counter_signed(mine.head, signature, self._keys.signing.public_key())
        return http.CounterSignature.of(mine.head, signature=encoded(signature))

    def _sign_ledger(self, site: str, head: http.LedgerHead) -> http.LedgerSignature:
        signature = head.head.sign(self._keys.signing)
        self._audit.append(LEDGER_SIGNED, site=site, ledger_seq=head.seq, ledger_hash=head.hash)
        return http.LedgerSignature.of(head.head, signature=encoded(signature))

    def _save(self, site: str, memory: KnownBooks) -> None:
        row = {
            "site": site,
            "known": memory.known.model_dump_json(),
            "spent": json.dumps([entry.model_dump() for entry in memory.spent]),
            "halted": memory.halted,
            "time": time.time(),
        }
        with self._store.transaction() as connection:
            connection.execute(delete(SITE_BOOKS).where(SITE_BOOKS.c.site == site))
            connection.execute(insert(SITE_BOOKS).values(row))
        self._memory[site] = memory

    def _load(self) -> dict[str, KnownBooks]:
        """Of the store; heads of the audit log, if the store is an older copy."""
        with self._store.transaction() as connection:
            rows = list(connection.execute(select(SITE_BOOKS)).mappings())
        found = {
            row["site"]: KnownBooks(
                known=http.Known.model_validate_json(row["known"]),
                spent=tuple(http.Spent(**entry) for entry in json.loads(row["spent"])),
                halted=row["halted"],
            )
            for row in rows
        }
        for site, known in _signed_in(self._audit).items():
            stored = found.get(site, KnownBooks())
            if stored.known != known:
                found[site] = KnownBooks(known=known, spent=stored.spent, halted=stored.halted)
        return found


def _contradiction(memory: KnownBooks, theirs: http.HeadExchange) -> str:
    """What is wrong with heads, after those that were signed last; empty if they continue them."""
    known, after = memory.known, theirs.after
    for what, signed, shown, held in (
        ("audit log", known.log, theirs.mine, after.log),
        ("ledger", known.ledger, theirs.ledger, after.ledger),
    ):
        if signed is None:
            continue
        if shown is None:
            return f"the {what} is gone; {signed.seq} entries of it were signed"
        if shown.seq < signed.seq:
            return f"the {what} went back from entry {signed.seq} to {shown.seq}"
        if held != signed or (shown.seq == signed.seq and shown.hash != signed.hash):
            return f"the {what} has another entry {signed.seq} than the one that was signed"
    if known.log is None and theirs.mine.seq < 1:
        return "the site says that its books are damaged"
    charged = {(e.dataset, e.mechanism): e.charged for e in theirs.spent}
    for entry in memory.spent:
        if charged.get((entry.dataset, entry.mechanism), 0) < entry.charged:
            return f"less is charged to {entry.dataset} than before"
    return ""


def _lacking(now: tuple[http.Spent, ...], before: tuple[http.Spent, ...]) -> str:
    """The first dataset on which less is charged than could have been spent; empty if there is none."""
    charged = {(e.dataset, e.mechanism): e.charged for e in now}
    short = (e.dataset for e in before if charged.get((e.dataset, e.mechanism), 0) < e.held)
    return next(short, "")


def _signed_in(audit: AuditLog) -> dict[str, http.Known]:
    """The newest heads of each site that an audit log says were signed."""
    found: dict[str, http.Known] = {}
    for line in audit.lines():
        fields: Mapping[str, Any] = line.fields
        parts: dict[str, http.LogHead | http.LedgerHead]
        if line.kind == COUNTER_SIGNED and fields["log"] != COORDINATOR:
            site, parts = str(fields["log"]), {"log": _logged(fields)}
        elif line.kind == LEDGER_SIGNED:
            site, parts = str(fields["site"]), {"ledger": _ledgered(fields)}
        elif line.kind == RESTORED:
            site = str(fields["site"])
            log = {**fields, "log": site}
            parts = {"log": _logged(log), "ledger": _ledgered(fields)}
        else:
            continue
        found[site] = found.get(site, http.Known()).model_copy(update=parts)
    return found


def _logged(fields: Mapping[str, Any]) -> http.LogHead:
    return http.LogHead(owner=fields["log"], seq=fields["log_seq"], hash=fields["log_hash"])


def _ledgered(fields: Mapping[str, Any]) -> http.LedgerHead:
    return http.LedgerHead(seq=fields["ledger_seq"], hash=fields["ledger_hash"])


def _seq(head: http.LogHead | http.LedgerHead | None) -> int:
    return head.seq if head is not None else 0


class Certificates:
    """Takes certificates in; `silotune.server.store.runs.StoredRuns` offers them.

    Parameters
    ----------
    store, registrar, audit
        The coordinator's.
    """

    def __init__(self, store: Store, registrar: Registrar, audit: AuditLog) -> None:
        self._store, self._registrar, self._audit = store, registrar, audit

    def take(self, site: str, handed: http.HandedIn) -> None:
        """Keep a site's certificate of a run; a later one replaces it.

        Raises
        ------
        CertificateInvalid
            It is not signed by that site's key, does not hold, or is of another site, run or plan.
        RunUnknown
            There is no such run.
        """
        from silotune.privacy.certificate import verify_content

        row = Runs(self._store).get(handed.run)
        key = identity.decode_signing_key(self._registrar.enrolled[site].member.signing_key)
        found = verify_content(
            handed.certificate.encode(), called="the certificate", key_sha256=fingerprint(key)
        ).body
        if (found.site, found.run, found.plan_sha256) != (site, handed.run, row["plan_sha256"]):
            raise CertificateInvalid("the certificate is of another site, run or plan")
        kept = {"run": handed.run, "site": site, "time": time.time()}
        same = (CERTIFICATES.c.run == handed.run) & (CERTIFICATES.c.site == site)
        with self._store.transaction() as connection:
            connection.execute(delete(CERTIFICATES).where(same))
            connection.execute(insert(CERTIFICATES).values({**kept, "content": handed.certificate}))
        self._audit.append("certificate_taken", run=handed.run, site=site, epsilon=found.epsilon)

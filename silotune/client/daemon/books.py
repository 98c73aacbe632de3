"""A site's two books, ledger and audit log, held against each other and the coordinator's memory.

What one place forgets, another remembers. The audit log writes down how far the ledger goes and what the
coordinator signed of it; the ledger writes down how far the audit log goes; the coordinator keeps the
newest heads of both. One book restored from a backup is found here, at start; both restored together are
found by the coordinator, which is asked before anything is trained. `restore` puts an older copy into
use, with everything charged that may be missing in it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.client.daemon.api import CoordinatorApi, closing_api
from silotune.client.daemon.enrolment import Enrolment
from silotune.client.errors import DaemonRunning, RestoreNotNeeded
from silotune.client.run_files import ROUNDS
from silotune.data.site import SiteConfig
from silotune.errors import LedgerDamaged
from silotune.privacy.ledger import LEDGER_FILE, Budget, Ledger, find_ledger
from silotune.privacy.tally import Tally, epsilon_of
from silotune.protocol import http
from silotune.protocol.errors import CoordinatorUnavailable, PortUnreachable
from silotune.trust.audit import AUDIT_FILE, AuditHead, AuditLog
from silotune.trust.chain import GENESIS, Head
from silotune.trust.errors import AuditLogDamaged, BooksDisagree, FederationError
from silotune.trust.signed import decoded, encoded
from silotune.trust.vault import Vault

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

logger = logging.getLogger(__name__)

LEDGER_AT, RESTORED = "ledger_at", "books_restored"
_ABOUT_THE_LEDGER = frozenset({LEDGER_AT, RESTORED, "answered"})
_TRIES = 6
_UNKNOWN = Budget(epsilon=0.0, delta=1e-6)  # of a dataset that site.toml no longer has


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
        if self._opened is None:
            self._opened = find_ledger(self._enrolment.state)
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
                self.ledger.vouch(dataset, run, head.place)
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
                mine=http.LogHead.of(own),
                yours=yours,
                ledger=None if head is None else http.LedgerHead.of(head),
                spent=account_of(ledger),
                after=self._held(known),
            )
        )
        key = self._enrolment.federation_key
        if reply.yours is None:
            raise FederationError("the coordinator did not sign the head it was sent")
        self._audit.witness(reply.yours.head, decoded(reply.yours.signature), key)
        if reply.ledger_signed is not None and ledger is not None:
            signed = reply.ledger_signed.head
            ledger.witness(signed, decoded(reply.ledger_signed.signature), key)
        self._theirs = reply.mine.head
        self._known = http.Known(
            log=http.LogHead.of(own), ledger=None if head is None else http.LedgerHead.of(head)
        )

    def _counter_signed(self) -> http.CounterSignature | None:
        if self._theirs is None:
            return None
        key = self._enrolment.keys.signing
        signature = self._theirs.sign(key)
        self._audit.counter_signed(self._theirs, signature, key.public_key())
        return http.CounterSignature.of(self._theirs, signature=encoded(signature))

    def _held(self, known: http.Known) -> http.Known:
        """What these books have at the places of heads that the coordinator signed."""
        log, ledger = None, None
        if known.log is not None and (found := self._audit.hash_of(known.log.seq)):
            log = http.LogHead(owner=self._audit.owner, seq=known.log.seq, hash=found)
        if known.ledger is not None:
            head = _head_at(self.ledger, known.ledger.seq)
            ledger = None if head is None else http.LedgerHead.of(head)
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
    nothing = http.LogHead(owner=enrolment.facts.site, seq=0, hash=GENESIS.hash)
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
        _require_agreement(ledger, seen, audit)
    finally:
        ledger.close()
    told = f"whole, {rows} rows, in agreement with its head file"
    told += f" and with the audit log up to row {seen.seq}" if seen else ""
    if witnessed is None:
        return f"{told}; no signature of the coordinator is kept here"
    return f"{told}; the coordinator's newest signature kept here is of row {witnessed.seq}"


def _require_agreement(ledger: Ledger, seen: Head | None, audit: AuditLog) -> None:
    """Hold each book against what it wrote down of the other."""
    if seen is not None and _head_at(ledger, seen.seq) != seen:
        raise LedgerDamaged(
            f"{ledger.path} is not the ledger that the audit log has seen: "
            f"row {seen.seq} is missing or another one"
        )
    line = ledger.vouched
    if line is not None and audit.hash_of(line.seq) != line.hash:
        raise AuditLogDamaged(
            f"{audit.path} is not the audit log that the ledger has seen: "
            f"line {line.seq} is missing or another one"
        )


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
    found = Head(seq, ledger.hash_of(seq)) if seq else GENESIS
    return found if found.hash else None


# --- an older copy, put into use ---


def hold_state(state: Path) -> int:
    """Hold the state folder until the descriptor is closed; the kernel lets go when the process dies.

    Raises
    ------
    DaemonRunning
        Another process holds it.
    """
    descriptor = os.open(state / "daemon.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(descriptor)
        raise DaemonRunning(f"another process uses {state}") from exc
    return descriptor


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What was done to one dataset.

    Attributes
    ----------
    dataset : str
        Its name.
    charged : float
        Epsilon of what was charged for the missing rows, by itself.
    spent : float
        Epsilon of all that is charged now.
    delta : float
        That both are for.
    """

    dataset: str
    charged: float
    spent: float
    delta: float


def restore(site: SiteConfig, *, reason: str, by: str) -> list[Restoration]:
    """Charge what the coordinator's signature says was spent, and have it take these books.

    The newest head in the restored ledger that the coordinator signed is where its history surely is the
    lost one's. All that was charged or reserved behind it is charged here, once more if need be. Open
    reservations end, and the keys of secure rounds are removed: no update is masked twice.

    Parameters
    ----------
    site : SiteConfig
        Its daemon must not be running.
    reason, by : str
        For both audit logs.

    Raises
    ------
    RestoreNotNeeded
        The books are the newest already, or the coordinator has signed none.
    DaemonRunning
        Stop it first.
    SilotuneError
        The coordinator can't be reached, or doesn't take it: run the command again.
    """
    state = site.state_folder
    held = hold_state(state)
    try:
        return _restore(site, reason=reason, by=by)
    finally:
        os.close(held)


def _restore(site: SiteConfig, *, reason: str, by: str) -> list[Restoration]:
    state = site.state_folder
    vault = Vault(state, site.at_rest, base=site.folder)
    enrolment = Enrolment.open(site, vault)
    with closing_api(enrolment.facts.url, enrolment.tls()) as api:
        heads = asked_heads(api, enrolment)
        if heads.known.log is None and heads.known.ledger is None:
            raise RestoreNotNeeded("the coordinator has signed no books of this site yet")
        audit, ledger = _open_audit(state, enrolment), _open_ledger(state, enrolment)
        if audit is not None and ledger is not None and _goes_on(audit, ledger, heads.known):
            raise RestoreNotNeeded(
                "ledger and audit log are those that the coordinator signed last"
            )
        audit = audit or AuditLog(state / AUDIT_FILE, owner=site.name)
        ledger = ledger or Ledger(state / LEDGER_FILE)
        done = _charge(site, ledger, heads)
        shutil.rmtree(state / ROUNDS.folder, ignore_errors=True)
        head = ledger.head
        audit.append(
            RESTORED,
            reason=reason,
            by=by,
            ledger_seq=head.seq,
            ledger_hash=head.hash,
            lost_ledger_seq=heads.known.ledger.seq if heads.known.ledger else 0,
            lost_log_seq=heads.known.log.seq if heads.known.log else 0,
            charged={entry.dataset: round(entry.charged, 6) for entry in done},
        )
        line = audit.head
        dataset = next(iter([*(entry.dataset for entry in done), *site.datasets]))
        ledger.vouch(dataset, _lost_name(heads), line.place)
        newest = ledger.head
        told = http.Restored.make(
            enrolment.keys.signing,
            federation=enrolment.facts.federation,
            site=site.name,
            replaces=heads.known,
            log=http.LogHead.of(line),
            ledger=http.LedgerHead.of(newest),
            spent=account_of(ledger),
            reason=reason,
            sent_at=int(time.time()),
        )
        api.restored(told)
    ledger.close()
    return done


def _charge(site: SiteConfig, ledger: Ledger, heads: http.SignedHeads) -> list[Restoration]:
    """Charge what may be missing, once for each set of lost heads."""
    for account in ledger.runs():
        ledger.settle(account.dataset, account.run)
    witnessed, name = ledger.witnessed(), _lost_name(heads)
    sure = ledger.standing(upto=witnessed.seq) if witnessed else {}
    lost: dict[str, Tally] = {}
    for entry in heads.spent:
        known = sure.get(entry.dataset, {}).get(entry.mechanism, (0, 0))[0]
        if entry.held > known:
            lost.setdefault(entry.dataset, Counter())[entry.mechanism] = entry.held - known
    charged_before = {account.dataset for account in ledger.runs() if account.run == name}
    done = []
    for dataset, missing in sorted(lost.items()):
        configured = site.datasets[dataset].budget if dataset in site.datasets else None
        budget = Budget(configured.epsilon, configured.delta) if configured else _UNKNOWN
        if dataset not in charged_before:
            ledger.restore(dataset, name, missing, budget=budget)
        done.append(
            Restoration(
                dataset=dataset,
                charged=epsilon_of(missing, delta=budget.delta),
                spent=ledger.spent(dataset, budget.delta),
                delta=budget.delta,
            )
        )
    return done


def _lost_name(heads: http.SignedHeads) -> str:
    """What stands in the place of a run: the same for the same lost heads."""
    ledger, log = heads.known.ledger, heads.known.log
    lost = ledger or log
    assert lost is not None
    return f"restore-{lost.seq}-{lost.hash[:16]}"


def _goes_on(audit: AuditLog, ledger: Ledger, known: http.Known) -> bool:
    """Whether both books go on from what was signed last."""
    log_good = known.log is None or audit.hash_of(known.log.seq) == known.log.hash
    ledger_good = known.ledger is None or ledger.hash_of(known.ledger.seq) == known.ledger.hash
    seen = ledger.vouched
    return log_good and ledger_good and (seen is None or audit.hash_of(seen.seq) == seen.hash)


def _open_audit(state: Path, enrolment: Enrolment) -> AuditLog | None:
    """The audit log if it is whole; None, with its files set aside, if there is none or it is not."""
    path = state / AUDIT_FILE
    try:
        log = AuditLog(path)
        log.verify(trusted=enrolment.federation_key)
    except AuditLogDamaged as exc:
        _set_aside(path, why=str(exc))
        return None
    return log


def _open_ledger(state: Path, enrolment: Enrolment) -> Ledger | None:
    """The ledger if it is whole; None, with its files set aside, if there is none or it is not."""
    path = state / LEDGER_FILE
    try:
        ledger = Ledger(path, create=False)
        ledger.verify(trusted=enrolment.federation_key if ledger.witnessed() else None)
    except LedgerDamaged as exc:
        _set_aside(path, why=str(exc))
        return None
    return ledger


def _set_aside(path: Path, *, why: str) -> None:
    """Keep damaged files, for whoever wants to know what happened."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for part in sorted(path.parent.glob(f"{path.name}*")):
        if ".damaged-" not in part.name:
            logger.warning("%s is set aside: %s", part.name, why)
            part.rename(part.with_name(f"{part.name}.damaged-{stamp}"))

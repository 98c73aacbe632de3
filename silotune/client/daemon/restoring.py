"""Put an older copy of a site's books into use, with everything charged that may be missing in it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from silotune.client.daemon.api import closing_api
from silotune.client.daemon.books import RESTORED, account_of, asked_heads
from silotune.client.daemon.daemon import hold_state
from silotune.client.daemon.enrolled import Enrolment
from silotune.client.errors import RestoreNotNeeded
from silotune.client.run_files import ROUNDS
from silotune.data.site import SiteConfig
from silotune.errors import LedgerDamaged
from silotune.privacy.ledger import Budget, Ledger
from silotune.privacy.spent import LEDGER_FILE
from silotune.privacy.tally import Tally, epsilon_of
from silotune.protocol import http
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.errors import AuditLogDamaged
from silotune.trust.vault import Vault

logger = logging.getLogger(__name__)

_UNKNOWN = Budget(epsilon=0.0, delta=1e-6)  # of a dataset that site.toml no longer has


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
        if audit is not None and ledger is not None and _newest(audit, ledger, heads.known):
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
        ledger.vouch(dataset, _name(heads), (line.seq, line.hash))
        newest = ledger.head
        told = http.Restored.make(
            enrolment.keys.signing,
            federation=enrolment.facts.federation,
            site=site.name,
            replaces=heads.known,
            log=http.LogHead(owner=line.owner, seq=line.seq, hash=line.hash),
            ledger=http.LedgerHead(seq=newest.seq, hash=newest.hash),
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
    witnessed, name = ledger.witnessed(), _name(heads)
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


def _name(heads: http.SignedHeads) -> str:
    """What stands in the place of a run: the same for the same lost heads."""
    ledger, log = heads.known.ledger, heads.known.log
    lost = ledger or log
    assert lost is not None
    return f"restore-{lost.seq}-{lost.hash[:16]}"


def _newest(audit: AuditLog, ledger: Ledger, known: http.Known) -> bool:
    """Whether both books go on from what was signed last."""
    log_good = known.log is None or audit.hash_of(known.log.seq) == known.log.hash
    ledger_good = known.ledger is None or ledger.hash_of(known.ledger.seq) == known.ledger.hash
    seen = ledger.vouched
    return log_good and ledger_good and (seen is None or audit.hash_of(seen[0]) == seen[1])


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

"""A site's daemon: the process that connects outward, works on what was approved, and listens to nobody.

Threads: the main one waits for signals; *fleet* pulls messages, works on them one at a time and pushes
the answers; *heartbeat* (in `Fleet`) says that the site lives, also while it trains; *news* waits for
changes of roster and plans; *books* sends decisions, exchanges audit heads and renews the certificate;
*control* serves the Unix socket. A failed connection is tried again for ever, and `status` says why it
waits. Nothing of the protocol's state is in memory alone: killed at any instant, the daemon goes on
where the ledger, the outbox and the plans on the disk say.

The daemon reads no record and loads no model. What does, the *trainer*, is a process that it starts for
a run (`silotune.client.training.process`) and that ``[resources]`` of site.toml holds for; what privacy
costs is computed by another (`silotune.privacy.costs`). So the daemon stays small, and lives on when one
of them dies.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from typing import Any

from silotune.client.approvals import Approvals, ProposalRecord
from silotune.client.daemon.api import CoordinatorApi, closing_api
from silotune.client.daemon.books import SiteBooks, hold_state, tell_damage, verify_books
from silotune.client.daemon.connection import SiteConnection, backoff
from silotune.client.daemon.documents import DocumentExchange
from silotune.client.daemon.enrolment import Enrolment
from silotune.client.daemon.runner import Runner
from silotune.client.daemon.socket import ControlSocket, Request
from silotune.client.errors import (
    IsolationMissing,
    PolicyMissing,
    RunNotProposed,
    SiteCommandFailed,
    TrainerNotStarted,
)
from silotune.client.isolation.confinement import checked
from silotune.client.isolation.shut_out import shut_out
from silotune.client.judging import judge_apart
from silotune.client.run_files import remove_old
from silotune.client.training.bounds import all_record_paths, table_of
from silotune.client.training.launcher import Launcher
from silotune.client.training.process import TrainerProcesses, start_costs
from silotune.client.troubles import in_words, latest_troubles
from silotune.data.site import SiteConfig, require_guarded
from silotune.errors import LedgerDamaged, SilotuneError
from silotune.privacy import costs
from silotune.trust.audit import AUDIT_FILE, AuditLog
from silotune.trust.errors import AuditLogDamaged
from silotune.trust.files import create_file, create_private_folder
from silotune.trust.identity import certificate_from_pem, days_left
from silotune.trust.vault import Vault

logger = logging.getLogger(__name__)

PAUSED, CERTIFICATES, SCRATCH = "paused", "certificates", "scratch"

_BOOKS_SECONDS = 60.0
_LEAST_NEWS = 0.2


class Daemon:
    """One site, from its start to SIGTERM.

    Parameters
    ----------
    site : SiteConfig
        The site's own word.
    grace : float
        Seconds that a step in progress is waited for at the end.

    Raises
    ------
    PolicyMissing
        site.toml has no policy.
    DaemonRunning
        Another daemon has the state folder.
    SiteNotEnrolled, VaultLocked, LedgerDamaged, AuditLogDamaged, FileExposed, …
        Something that must be whole is not.
    """

    def __init__(self, site: SiteConfig, *, grace: float = 30.0) -> None:
        if site.policy is None:
            raise PolicyMissing(f"{site.folder / 'site.toml'} has no [policy]")
        self._site, self._grace = site, grace
        self._state = site.state_folder
        create_private_folder(self._state)
        require_guarded(site)
        self._protections = checked(site)
        for each in (p for p in self._protections if not p.in_force):
            logger.warning("%s", each.lack)
        self._lock_file = hold_state(self._state)
        self._vault = Vault(self._state, site.at_rest, base=site.folder)
        self._enrolment = Enrolment.open(site, self._vault)
        self._audit = self._verified_books()
        if self._vault.end_previous():
            self._audit.append("resealed", opened_by=self._vault.opened_by)
        self._books = SiteBooks(enrolment=self._enrolment, audit=self._audit)
        own = self._enrolment.keys.signing.public_key()
        self._approvals = Approvals(self._state, own=own)
        self._session = secrets.token_hex(16)
        self._wake: queue.SimpleQueue[str] = queue.SimpleQueue()
        table = table_of(site, scratch=self._state / SCRATCH)
        self._reads_records = ""
        self._launcher = Launcher(table)
        costs.compute_apart(start_costs(self._launcher))
        self._trainers = TrainerProcesses(site, launcher=self._launcher)
        runner = Runner(
            site,
            enrolment=self._enrolment,
            approvals=self._approvals,
            vault=self._vault,
            audit=self._audit,
            trainers=self._trainers,
            paused=(self._state / PAUSED).exists,
            agree=self._agree,
        )
        self._runner = runner
        self._connection = SiteConnection(
            site,
            enrolment=self._enrolment,
            runner=runner,
            audit=self._audit,
            session=self._session,
            answered=lambda: self._wake.put("answered"),
        )
        self._stop, self.status = self._connection.stop, self._connection.status
        self._documents = DocumentExchange(
            enrolment=self._enrolment,
            approvals=self._approvals,
            audit=self._audit,
            books=self._books,
            judge=self._judge if site.policy.approval == "auto" else None,
            settle=self._settle,
            certificate=self._certificate,
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until the coordinator says that the site has left.

        Raises
        ------
        SessionTaken
            Another process with this site's keys took its place.
        TrainerNotStarted
            The launcher is gone.
        """
        self._shut_out()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self._audit.append("started", version=_version(), session=self._session[:8])
        self._wake.put("started")
        control = ControlSocket(self._state, self._command)
        threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (
                ("fleet", self._connection.serve),
                ("news", self._serve_news),
                ("books", self._serve_books),
            )
        ]
        for thread in threads:
            thread.start()
        lost = False
        while not self._stop.wait(1.0):  # a wait without end would hold signals back
            if lost := not self._launcher.alive:
                self._stop.set()
        control.close()
        abandoned = self._connection.end(grace=self._grace)
        if not abandoned:  # else a trainer's end would be answered like any other fault of it
            self._launcher.close()
        self._audit.append("stopped", abandoned=abandoned)
        logger.info("stopped%s", f"; {abandoned} was abandoned" if abandoned else "")
        if self._connection.failed is not None:
            raise self._connection.failed
        if lost:
            raise TrainerNotStarted("the launcher came to an end; the daemon can't start another")
        if abandoned:
            logging.shutdown()
            os._exit(0)  # a thread that waits for a message can't be ended in any other way

    def _shut_out(self) -> None:
        """Open no record from now on; the launcher and its trainers are not bound by it.

        Raises
        ------
        IsolationMissing
            This machine can't do it, and site.toml requires what it takes.
        """
        self._reads_records = why = shut_out(self._site, records=all_record_paths(self._site))
        if why and "landlock_files" in self._site.isolation.require:
            raise IsolationMissing(f"the daemon could read records: {why}")
        if why:
            logger.warning("the daemon could read records: %s", why)

    # --- news and books ---

    def _serve_news(self) -> None:
        self._with_api(self._follow_news)

    def _serve_books(self) -> None:
        self._with_api(self._keep_books)

    def _follow_news(self, api: CoordinatorApi) -> None:
        roster = self._enrolment.roster
        known = roster.version if roster else 0
        asked = time.monotonic()
        news = api.news(roster=known, plans=self._documents.plans_version)
        if time.monotonic() - asked < _LEAST_NEWS:  # neither held nor quiet: don't run in circles
            self._stop.wait(_LEAST_NEWS)
        if news.roster != known:
            self._documents.take_rosters(api)
        if news.plans != self._documents.plans_version:
            self._documents.take_plans(api)
            self._wake.put("plans")

    def _keep_books(self, api: CoordinatorApi) -> None:
        with suppress(queue.Empty):
            self._wake.get(timeout=_BOOKS_SECONDS)
            while True:
                self._wake.get_nowait()
        if self._stop.is_set():
            return
        self._documents.remove_old_files()
        if self._documents.renew_if_due(api):
            self._connection.reconnect.set()
        self._documents.exchange_heads(api)

    def _with_api(self, turn: Callable[[CoordinatorApi], None]) -> None:
        """Take turns for ever, with a connection that is made anew after each failure."""
        waits = 0
        while not self._stop.is_set():
            try:
                with self._api() as api:
                    while not self._stop.is_set():
                        turn(api)
                        waits = 0
            except SilotuneError as exc:
                waits += 1
                logger.debug("%s: %s", threading.current_thread().name, exc)
            except Exception:
                waits += 1
                logger.exception("%s failed", threading.current_thread().name)
            self._stop.wait(backoff(waits))

    def _api(self) -> AbstractContextManager[CoordinatorApi]:
        return closing_api(self._enrolment.facts.url, self._enrolment.tls())

    def _agree(self, entry: ProposalRecord) -> None:
        """Ask, before a run's first training here, whether these books are the newest."""
        with self._api() as api:
            self._books.agree(api, entry.run, entry.plan.data.dataset)

    def _verified_books(self) -> AuditLog:
        """The audit log, once it and the ledger are whole; if not, the coordinator's team is told."""
        try:
            audit = AuditLog(self._state / AUDIT_FILE, owner=self._site.name)
            verify_books(self._state, audit, trusted=self._enrolment.federation_key)
        except (LedgerDamaged, AuditLogDamaged):
            with suppress(SilotuneError), self._api() as api:
                tell_damage(api, self._enrolment)
            raise
        return audit

    def _judge(self, entry: ProposalRecord) -> None:
        """Let the policy judge a proposal by itself; hours are for the time of training."""
        judge_apart(self._site, entry, trainers=self._trainers).require()

    def _settle(self, entry: ProposalRecord) -> None:
        folder = self._state / CERTIFICATES
        create_private_folder(folder)
        with self._connection.working:
            self._runner.finish(entry, folder / f"{entry.run}.json")

    def _certificate(self, entry: ProposalRecord) -> str | None:
        """What is handed in of a run that is over: nothing unless site.toml says so."""
        path = self._state / CERTIFICATES / f"{entry.run}.json"
        if not self._site.share_certificates or not path.is_file():
            return None
        return path.read_text(encoding="utf-8")

    # --- control ---

    def _command(self, request: Request, uid: int) -> Mapping[str, Any]:
        match request.get("command"):
            case "status":
                return self._describe()
            case "pause":
                return self._pause(uid)
            case "resume":
                (self._state / PAUSED).unlink(missing_ok=True)
                self._audit.append("resumed", by=f"uid {uid}")
                return {"paused": False}
            case "decide":
                return self._decide(request, uid)
            case "leave":
                return self._leave(uid)
            case other:
                raise SiteCommandFailed(f"there is no command {str(other)[:40]!r}")

    def _pause(self, uid: int) -> Mapping[str, Any]:
        create_file(self._state / PAUSED, b"")
        self._audit.append("paused", by=f"uid {uid}")
        return {"paused": True, "work": self.status.work}

    def _decide(self, request: Request, uid: int) -> Mapping[str, Any]:
        run, verdict = str(request["run"]), str(request["verdict"])
        if self._approvals.find(run).over:
            raise RunNotProposed(f"run {run!r} is over")
        reason = str(request.get("reason", ""))[:500]
        decision = self._documents.decide(run, verdict, reason=reason, by=f"uid {uid}")
        sent = True
        try:
            with self._api() as api:
                api.decide(decision)
        except SilotuneError as exc:
            logger.warning("the decision could not be sent yet: %s", exc)
            sent = False
            self._documents.plans_version = 0  # sent again with the next news
        self._wake.put("decided")
        return {"run": run, "verdict": decision.verdict, "sent": sent}

    def _leave(self, uid: int) -> Mapping[str, Any]:
        with self._api() as api:
            api.leave(self._enrolment.goodbye())
        self._audit.append("left", federation=self._enrolment.facts.federation, by=f"uid {uid}")
        self._enrolment.forget()
        remove_old(self._state, ended={}, now=math.inf)  # nobody will ask for it again
        self._stop.set()
        return {"left": self._enrolment.facts.federation}

    def _describe(self) -> Mapping[str, Any]:
        status, facts = self.status, self._enrolment.facts
        roster = self._enrolment.roster
        return {
            "site": facts.site,
            "federation": facts.federation,
            "coordinator": facts.url,
            "link": status.link,
            "reason": status.reason,
            "seconds": round(time.time() - status.since, 1),
            "work": status.work,
            "paused": (self._state / PAUSED).exists(),
            "trouble": self._books.trouble,
            "isolation": [asdict(each) for each in self._protections],
            "failures": [in_words(each) for each in latest_troubles(self._state)],
            "answered": status.answered,
            "refused": status.refused,
            "pid": os.getpid(),
            "trainer": self._trainers.describe(),
            "reads_records": self._reads_records,
            "roster": roster.version if roster else 0,
            "certificate_days": round(
                days_left(certificate_from_pem(self._enrolment.certificate)), 1
            ),
            "proposed": sum(e.state == "proposed" for e in self._approvals.entries()),
        }


def _version() -> str:
    from silotune.version import __version__

    return __version__

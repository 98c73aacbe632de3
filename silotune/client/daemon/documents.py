"""The daemon's paper work: roster, proposals, decisions, certificates, audit heads, closed books.

Everything here can wait while the site trains, and none of it decides what leaves: it keeps what the
coordinator says, checks it, and sends what the site's people have said.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from silotune.client.approvals import Approvals, ProposalRecord
from silotune.client.daemon.api import CoordinatorApi
from silotune.client.daemon.books import SiteBooks
from silotune.client.daemon.enrolment import Enrolment
from silotune.client.errors import RunNotProposed
from silotune.client.run_files import remove_old
from silotune.errors import PolicyError, SilotuneError
from silotune.protocol import http
from silotune.trust.audit import AuditLog
from silotune.trust.errors import FederationError
from silotune.trust.identity import certificate_from_pem, days_left

logger = logging.getLogger(__name__)

RENEW_DAYS = 30.0
"""A certificate with fewer days left is renewed."""

_LOOK_SECONDS = 3600.0

_Judge = Callable[[ProposalRecord], None]


class DocumentExchange:
    """Keeps one site's books with its coordinator.

    Parameters
    ----------
    enrolment, approvals, audit, books
        The site's.
    judge : callable or None
        Raises a `PolicyError` for a plan that the policy refuses; None where a person approves.
    settle : callable
        Closes the books of a run that is over.
    certificate : callable
        The certificate of such a run, to be handed in; None where the site keeps it to itself.
    """

    def __init__(
        self,
        *,
        enrolment: Enrolment,
        approvals: Approvals,
        audit: AuditLog,
        books: SiteBooks,
        judge: _Judge | None,
        settle: Callable[[ProposalRecord], None],
        certificate: Callable[[ProposalRecord], str | None] = lambda entry: None,
    ) -> None:
        self._certificate = certificate
        self._enrolment, self._approvals, self._audit = enrolment, approvals, audit
        self._judge, self._settle = judge, settle
        self._books = books
        self.plans_version = 0
        self._look_at = 0.0

    # --- news ---

    def take_rosters(self, api: CoordinatorApi) -> None:
        """Follow the roster; every change is written to the audit log."""
        roster = self._enrolment.roster
        versions = api.rosters(after=roster.version if roster else 0)
        changed = self._enrolment.take_rosters(versions)
        newest = self._enrolment.roster
        if changed and newest is not None:
            self._audit.append("roster", version=newest.version, changed=list(changed))
            logger.info("roster version %d: %s", newest.version, ", ".join(changed))

    def take_plans(self, api: CoordinatorApi) -> None:
        """Keep what is proposed, approve by itself if the policy says so, close what is over."""
        reply = api.plans()
        for proposal in reply.proposals:
            try:
                entry = self._approvals.take(proposal, self._enrolment.federation_key)
            except SilotuneError as exc:
                self._audit.append("proposal_refused", run=proposal.run, code=exc.code)
                logger.warning("the proposal of run %s is refused: %s", proposal.run, exc)
                continue
            if entry is not None:
                self._note(entry)
            with suppress(RunNotProposed):  # dropped, for more is offered than a site keeps
                self._follow_up(api, self._approvals.find(proposal.run), proposal)
        self.plans_version = reply.plans

    def _note(self, entry: ProposalRecord) -> None:
        self._audit.append(
            "proposed", run=entry.run, plan_sha256=entry.plan.sha256, state=entry.proposal.state
        )
        logger.info("run %s is %s by the coordinator", entry.run, entry.proposal.state)

    def _follow_up(
        self, api: CoordinatorApi, entry: ProposalRecord, proposal: http.Proposal
    ) -> None:
        if entry.over:
            if entry.decision and not entry.settled:
                self._settle(entry)
                self._hand_in(api, entry)
                self._approvals.settle(entry.run)
            return
        if entry.decision is None and self._judge is not None:
            entry = self._decide_alone(entry)
        if entry.decision is not None and proposal.decided != entry.decision.verdict:
            try:
                api.decide(entry.decision)
            except FederationError as exc:  # this one is not wanted; others may be
                logger.warning("the decision on run %s was not taken: %s", entry.run, exc)

    def _hand_in(self, api: CoordinatorApi, entry: ProposalRecord) -> None:
        text = self._certificate(entry)
        if text is None:
            return
        self._audit.append("certificate_handed_in", run=entry.run)
        try:
            api.hand_in(http.HandedIn(run=entry.run, certificate=text))
        except FederationError as exc:  # the site's own copy stays
            logger.warning("the certificate of run %s was not taken: %s", entry.run, exc)

    def _decide_alone(self, entry: ProposalRecord) -> ProposalRecord:
        assert self._judge is not None
        try:
            self._judge(entry)
        except PolicyError as exc:
            self.decide(entry.run, "rejected", reason=exc.code, by="policy")
        except SilotuneError as exc:
            self.decide(entry.run, "rejected", reason=exc.code, by="policy")
            logger.warning("run %s can't be served here: %s", entry.run, exc)
        else:
            self.decide(entry.run, "approved", reason="", by="policy")
        return self._approvals.find(entry.run)

    def decide(self, run: str, verdict: str, *, reason: str, by: str) -> http.Decision:
        """Sign and keep the site's word, and write down whose it was."""
        facts = self._enrolment.facts
        decision = self._approvals.decide(
            run,
            "approved" if verdict == "approved" else "rejected",
            reason=reason,
            federation=facts.federation,
            site=facts.site,
            key=self._enrolment.keys.signing,
        )
        self._audit.append(
            decision.verdict, run=run, plan_sha256=decision.plan_sha256, reason=reason, by=by
        )
        return decision

    def remove_old_files(self) -> None:
        """Remove what was stored for runs that are over long enough, see `run_files.remove_old`."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_SECONDS
        ended = {entry.run: entry.settled_at for entry in self._approvals.entries()}
        for run in remove_old(self._enrolment.state, ended=ended, now=time.time()):
            self._audit.append("files_removed", run=run)
            logger.info("what was stored for run %s is removed", run)

    # --- certificate ---

    def renew_if_due(self, api: CoordinatorApi) -> bool:
        """Renew a certificate that ends soon; returns whether it was."""
        left = days_left(certificate_from_pem(self._enrolment.certificate))
        if left > RENEW_DAYS:
            return False
        self._enrolment.renew(api.renew(self._enrolment.renewal()))
        self._audit.append("certificate_renewed", days_left=round(left, 1))
        logger.info("the certificate was renewed, %.0f days before its end", left)
        return True

    # --- audit heads ---

    def exchange_heads(self, api: CoordinatorApi) -> None:
        """See `SiteBooks.exchange`."""
        self._books.exchange(api)

"""Runs from proposal to end: approvals gathered, round loops started, paused, stopped, resumed.

A run is a thread. Its state is in the store before anything is done about it, so that a process that
starts finds every run where the last one left it and goes on.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import RowMapping

from silotune.errors import RunError, SilotuneError
from silotune.federation import identity
from silotune.federation.audit_log import AuditLog
from silotune.federation.errors import FederationError
from silotune.federation.wire import Decision, PlansReply, Proposal
from silotune.plan import Plan, SignedPlan
from silotune.server.errors import ApprovalsMissing, RunStopped, RunUnknown
from silotune.server.performance import Performance, Stage

_log = logging.getLogger(__name__)

_SHOWN_SECONDS = 30 * 24 * 3600.0  # how long sites see a run that is over
_JOIN_SECONDS = 10.0


class Conductor:
    """All runs of a federation.

    Parameters
    ----------
    stage : Stage
        What runs are performed on.
    audit : AuditLog
        The coordinator's.
    changed : callable
        Called when sites should look at the plans again.
    """

    def __init__(self, stage: Stage, *, audit: AuditLog, changed: Callable[[], None]) -> None:
        self.runs, self.events = stage.runs, stage.events
        self.version = int(time.time())  # grows over restarts too, so that no site misses a change
        self._stage, self._registrar = stage, stage.registrar
        self._audit, self._changed = audit, changed
        self._lock = threading.RLock()
        self._active: dict[str, Performance] = {}

    # --- operator ---

    def propose(self, plan: Plan, *, quorum: int | None = None) -> str:
        """Sign a plan and show it to the sites; the new run's name.

        Parameters
        ----------
        plan : Plan
            What to train.
        quorum : int, optional
            Start as soon as so many sites approve; by default when all active ones do, or when all
            have decided and ``rounds.min_sites`` approve.

        Raises
        ------
        RunError
            The federation has fewer active sites than the plan needs.
        """
        active = len(self._registrar.enrolled)
        if active < plan.rounds.min_sites:
            raise RunError(
                f"the federation has {active} active sites, the plan needs {plan.rounds.min_sites}",
                remedy="Invite and approve more sites, or lower rounds.min_sites.",
            )
        if quorum is not None and not plan.rounds.min_sites <= quorum <= active:
            raise RunError(
                f"a quorum of {quorum} is not between the plan's {plan.rounds.min_sites} "
                f"and the federation's {active} sites"
            )
        with self._lock:
            run = self._new_name(plan)
            signed = SignedPlan.sign(plan, self._stage.keys.signing)
            self.runs.propose(plan, signed, run=run, quorum=quorum or active)
            self._audit.append("run_proposed", run=run, plan_sha256=plan.sha256)
            self._stage.record(run).append_event(
                "run_proposed",
                plan_sha256=plan.sha256,
                rounds=plan.rounds.number,
                sites=sorted(self._registrar.enrolled),
            )
            self._announce()
        return run

    def pause(self, run: str) -> None:
        """Pause after the round that is under way. Raises `RunUnknown`."""
        with self._lock:
            self._require(run, "running")
            self.runs.change(run, state="paused")
            self._audit.append("run_paused", run=run)
            self._stage.record(run).append_event("run_paused", round=self.runs.get(run)["round"])
            self._announce()

    def resume(self, run: str) -> None:
        """Go on with a paused or failed run, from its last finished round. Raises `RunUnknown`."""
        with self._lock:
            self._require(run, "paused", "failed")
            self.runs.change(run, state="running", code=None, detail=None, finished_at=None)
            self._audit.append("run_resumed", run=run)
            if run not in self._active:
                self._perform(run)
            self._announce()

    def stop(self, run: str) -> None:
        """End a run for good; its last finished adapter is kept. Raises `RunUnknown`."""
        with self._lock:
            self._require(run, "proposed", "running", "paused", "failed")
            self.runs.change(run, state="stopped", finished_at=time.time(), code=RunStopped.code)
            self._audit.append("run_stopped", run=run)
            performance = self._active.get(run)
            if performance is not None:
                performance.stop()
            self._stage.record(run).append_event("run_stopped", round=self.runs.get(run)["round"])
            self._announce()
        if performance is None:
            self._stage.drop_link_run(run)

    def running_with(self, site: str) -> list[Callable[..., object]]:
        """Where to tell something about a site: one function for each running run that it is in."""
        running = self.runs.in_state("running")
        return [
            self._stage.record(run).append_event
            for run in running
            if site in self.runs.approved(run)
        ]

    # --- sites ---

    def plans_for(self, site: str) -> PlansReply:
        """What a site may see: runs that wait, go on, or ended lately."""
        proposals = []
        for row in self.runs.newest():
            if row["finished_at"] and row["finished_at"] < time.time() - _SHOWN_SECONDS:
                continue
            decision = self.runs.decisions(row["run"]).get(site)
            proposals.append(
                Proposal(
                    run=row["run"],
                    plan=SignedPlan.model_validate_json(row["plan"]),
                    plan_sha256=row["plan_sha256"],
                    state=row["state"],
                    proposed_at=int(row["proposed_at"]),
                    decided=decision["verdict"] if decision else None,
                )
            )
        return PlansReply(plans=self.version, proposals=tuple(proposals))

    def decide(self, site: str, decision: Decision) -> None:
        """Take a site's word on a run.

        Raises
        ------
        FederationError
            It is not the site's own, or for another plan than the run's.
        RunUnknown
            There is no such run, or it is over.
        """
        member = self._registrar.enrolled[site].member
        own = (decision.federation, decision.site) == (self._registrar.federation, site)
        if not own or not decision.verified(identity.decode_signing_key(member.signing_key)):
            raise FederationError("the decision is not signed by the site that sent it")
        with self._lock:
            row = self._require(decision.run, "proposed", "running", "paused", "failed")
            if decision.plan_sha256 != row["plan_sha256"]:
                raise FederationError("the decision is on another plan than the run's")
            if not self.runs.decide(decision):
                return
            self._audit.append(
                f"plan_{decision.verdict}",
                run=decision.run,
                site=site,
                plan_sha256=decision.plan_sha256,
                reason=decision.reason,
            )
            self._stage.record(decision.run).append_event(
                f"plan_{decision.verdict}", site=site, reason=decision.reason
            )
            self._start_if_due(decision.run)

    # --- life of the process ---

    def start(self) -> None:
        """Go on with every run that was under way, and start those that became due."""
        with self._lock:
            for run in self.runs.in_state("running"):
                self._perform(run)
        self.reconsider()

    def reconsider(self) -> None:
        """The sites changed: a run that waited for one that is gone may be due."""
        with self._lock:
            for run in self.runs.in_state("proposed"):
                self._start_if_due(run)

    def close(self) -> None:
        """Leave every run where it is, for the next process to go on with."""
        with self._lock:
            active = list(self._active.values())
        for performance in active:
            performance.stop()
        for performance in active:
            performance.join(_JOIN_SECONDS)

    # --- parts ---

    def _start_if_due(self, run: str) -> None:
        row = self.runs.get(run)
        if row["state"] != "proposed":
            return
        approved = [s for s in self.runs.approved(run) if self._registrar.is_active(s)]
        undecided = self._registrar.enrolled.keys() - self.runs.decisions(run).keys()
        enough = len(approved) >= self.runs.plan_of(run).rounds.min_sites
        if len(approved) >= row["quorum"] or (not undecided and enough):
            self.runs.change(run, state="running", started_at=time.time())
            self._audit.append("run_started", run=run, sites=list(approved))
            self._stage.record(run).append_event(
                "run_started", sites=list(approved), rounds=row["rounds"]
            )
            self._perform(run)
            self._announce()
        elif not undecided:
            error = ApprovalsMissing(
                f"{len(approved)} sites approve, the plan needs more: "
                + "; ".join(
                    f"{row['site']}: {row['reason'] or 'no reason given'}"
                    for row in self.runs.decisions(run).values()
                    if row["verdict"] == "rejected"
                )
            )
            self._fail(run, error)

    def _perform(self, run: str) -> None:
        performance = Performance(self._stage, run, ended=self._ended)
        self._active[run] = performance
        performance.start()

    def _ended(self, run: str, error: Exception | None) -> None:
        """The thread of a run is over."""
        with self._lock:
            self._active.pop(run, None)
            state = self.runs.get(run)["state"]
            if error is None:
                self.runs.change(run, state="finished", finished_at=time.time())
                self._audit.append("run_finished", run=run)
                self._announce()
            elif not isinstance(error, RunStopped):
                self._fail(run, error)
            if error is None or state == "stopped":
                self._stage.drop_link_run(run)

    def _fail(self, run: str, error: Exception) -> None:
        known = isinstance(error, SilotuneError)
        code = error.code if isinstance(error, SilotuneError) else SilotuneError.code
        detail = error.detail if isinstance(error, SilotuneError) else type(error).__name__
        _log.error("run %s failed: %s %s", run, code, detail, exc_info=None if known else error)
        self.runs.change(run, state="failed", code=code, detail=detail, finished_at=time.time())
        self._audit.append("run_failed", run=run, code=code)
        self._stage.record(run).append_event("run_failed", code=code, detail=detail)
        self._announce()

    def _require(self, run: str, *states: str) -> RowMapping:
        row = self.runs.get(run)
        if row["state"] not in states:
            raise RunUnknown(f"{run} is {row['state']}, not {' or '.join(states)}")
        return row

    def _new_name(self, plan: Plan) -> str:
        stem = re.sub(r"[^a-z0-9_-]", "-", plan.plan.name)[:60]
        base = f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        taken = {row["run"] for row in self.runs.newest()}
        names = (base if n == 1 else f"{base}-{n}" for n in range(1, 1000))
        return next(name for name in names if name not in taken)

    def _announce(self) -> None:
        self.version += 1
        self.events.fire()
        self._changed()

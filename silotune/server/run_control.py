"""Runs from proposal to end: approvals gathered, round loops started, paused, stopped, resumed.

A run is a thread. Its state is in the store before anything is done about it, so that a process that
starts finds every run where the last one left it and goes on.

A `RunThread` takes one run through its round loop over a grid, to its end.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from flwr.app import Context, RecordDict
from sqlalchemy import RowMapping

from silotune.errors import RunError, SilotuneError
from silotune.flower.grid import LinkGrid, Peer
from silotune.flower.messages import LinkRun
from silotune.flower.superlink import LinkState, Signal
from silotune.models.layout import Vector
from silotune.models.start import require_start
from silotune.plan.plan import Plan
from silotune.protocol.errors import StoppedByOperator
from silotune.protocol.http import Decision, PlansReply, Proposal
from silotune.rounds.rounds import build_server_app
from silotune.server.config import CoordinatorKeys
from silotune.server.enrolment import Registrar
from silotune.server.errors import ApprovalsMissing, NotPossibleNow
from silotune.server.store.database import Store
from silotune.server.store.runs import Runs, RunWriter
from silotune.trust import identity
from silotune.trust.audit import AuditLog
from silotune.trust.errors import FederationError
from silotune.trust.signed import SignedPlan

_log = logging.getLogger(__name__)

_PAUSE_LOOK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What runs are performed on: the coordinator's parts that a run needs.

    Attributes
    ----------
    serves : callable
        Whether a site, by name, is in the federation with books that are the newest.
    patience : float
        Seconds that a site may be offline before its round goes on.
    events : Signal
        Fired after each event and each change of a run.
    alarm : callable
        ``alarm(kind, site=…, …)`` for what only an attack or a mistake explains.
    """

    store: Store
    runs: Runs
    link: LinkState
    keys: CoordinatorKeys
    registrar: Registrar
    serves: Callable[[str], bool]
    patience: float
    events: Signal
    alarm: Callable[..., None]

    def record(self, run: str) -> RunWriter:
        """The store of one run, for a line now and then."""
        return RunWriter(
            self.store, run, on_event=self.events.fire, on_checkpoint=lambda number: None
        )

    def link_run(self, run: str) -> LinkRun:
        """Flower's run behind ours: the one from before a restart, or a new one."""
        found = self._find(run)
        if found is None:
            found = self.link.new_run()
            self.runs.change(run, link_run=str(found.run_id))
        return found

    def drop_link_run(self, run: str) -> None:
        """End Flower's run behind ours, with all its messages."""
        found = self._find(run)
        if found is not None:
            self.link.finish_run(found)

    def _find(self, run: str) -> LinkRun | None:
        number = self.runs.get(run)["link_run"]
        return self.link.find_run(int(number)) if number else None


class _SiteArrived(Exception):
    """A site that approves is there and in nobody's cohort: the loop begins anew, with it."""


class RunThread(threading.Thread):
    """The thread of one run.

    A loop fixes its cohort when it begins. A site that approves later, or was away just then, is let
    in between two rounds: the loop begins again behind the last checkpoint, as after a restart.

    Parameters
    ----------
    parts : RunParts
        Where.
    run : str
        The run's name.
    ended : callable
        ``ended(run, error)``: called at the end, from this thread; without an error it is finished.
    """

    def __init__(
        self, parts: RunParts, run: str, *, ended: Callable[[str, Exception | None], None]
    ) -> None:
        super().__init__(daemon=True, name=f"run {run}")
        self._parts, self._run, self._report = parts, run, ended
        self._leaving, self._rounds = threading.Event(), 0
        self._grid: LinkGrid | None = None
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End the loop soon. Whether for good, or until the next process, the run's state says."""
        with self._lock:
            self._leaving.set()
            if self._grid is not None:
                self._grid.stop()
        self._parts.events.fire()

    def run(self) -> None:
        """Perform, and report how it ended."""
        error: Exception | None = None
        try:
            while self._again():
                pass
        except Exception as exc:
            error = exc
        self._report(self._run, error)

    def after_round(self, server_round: int, adapter: Vector, *, seconds: float) -> None:
        """Between rounds: wait here while the run is paused, and let newcomers in."""
        del adapter, seconds
        seen = self._parts.events.count
        while not self._leaving.is_set() and self._state() == "paused":
            _log.info("run %s is paused after round %d", self._run, server_round)
            seen = self._parts.events.wait(since=seen, seconds=_PAUSE_LOOK_SECONDS)
        if self._leaving.is_set():
            raise StoppedByOperator(f"{self._run} was stopped")
        newcomers = self._newcomers() if server_round < self._rounds else []
        if newcomers:
            raise _SiteArrived(", ".join(newcomers))

    def _newcomers(self) -> list[str]:
        """Sites that approve and are there, and were not when the loop asked who joins."""
        assert self._grid is not None
        enrolled = self._parts.registrar.enrolled
        nodes = {enrolled[s].node: s for s in self._parts.runs.approved(self._run) if s in enrolled}
        missed = nodes.keys() - self._grid.asked
        sightings = self._parts.link.sightings() if missed else {}
        return sorted(nodes[n] for n in missed if n in sightings and sightings[n].online)

    def _again(self) -> bool:
        """Perform; whether to do it again, because of a newcomer."""
        try:
            self._perform()
        except _SiteArrived as sites:
            _log.info("run %s goes on with %s", self._run, sites)
            return True
        finally:
            with self._lock:
                self._grid = None
        return False

    def _state(self) -> str:
        return str(self._parts.runs.get(self._run)["state"])

    def _perform(self) -> None:
        plan = self._parts.runs.plan_of(self._run)
        self._rounds = plan.rounds.number
        grid = self._make_grid(plan)
        with self._lock:
            self._grid = grid
            if self._leaving.is_set():
                grid.stop()
        record = RunWriter(
            self._parts.store,
            self._run,
            on_event=self._parts.events.fire,
            on_checkpoint=grid.settle,
            gathers=True,
        )
        saved = record.load_checkpoint()
        if saved is not None:
            # The process before may have died between the checkpoint and forgetting its messages.
            grid.settle(int(saved[1]["round"]))
        app = build_server_app(
            plan=plan,
            run=self._run,
            store=record,
            observer=self,
            find_start=self._parts.runs.find_start,
        )
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        try:
            app(grid=grid, context=context)
        finally:
            record.close()

    def _make_grid(self, plan: Plan) -> LinkGrid:
        parts = self._parts
        approved = set(parts.runs.approved(self._run))
        peers = [
            Peer(node=e.node, site=name, key=identity.decode_signing_key(e.member.signing_key))
            for name, e in parts.registrar.enrolled.items()
            if name in approved
        ]
        return LinkGrid(
            link=parts.link,
            link_run=parts.link_run(self._run),
            run=self._run,
            federation=parts.registrar.federation,
            peers=peers,
            is_active=parts.serves,
            key=parts.keys.signing,
            ttl=plan.rounds.deadline,
            patience=parts.patience,
            alarm=parts.alarm,
        )


_SHOWN_SECONDS = 30 * 24 * 3600.0  # how long sites see a run that is over
_JOIN_SECONDS = 10.0


class RunControl:
    """All runs of a federation.

    Parameters
    ----------
    parts : RunParts
        What runs are performed on.
    audit : AuditLog
        The coordinator's.
    changed : callable
        Called when sites should look at the plans again.
    """

    def __init__(self, parts: RunParts, *, audit: AuditLog, changed: Callable[[], None]) -> None:
        self.runs, self.events = parts.runs, parts.events
        self.version = int(time.time())  # grows over restarts too, so that no site misses a change
        self._parts, self._registrar = parts, parts.registrar
        self._audit, self._changed = audit, changed
        self._lock = threading.RLock()
        self._active: dict[str, RunThread] = {}

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
        AdapterMismatch
            The adapter that ``lora.start`` names is not here, or does not fit.
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
        require_start(plan, find=self.runs.find_start)
        with self._lock:
            run = self._new_name(plan)
            signed = SignedPlan.sign(plan, self._parts.keys.signing)
            self.runs.propose(plan, signed, run=run, quorum=quorum or active)
            self._audit.append("run_proposed", run=run, plan_sha256=plan.sha256)
            self._parts.record(run).append_event(
                "run_proposed",
                plan_sha256=plan.sha256,
                rounds=plan.rounds.number,
                sites=sorted(self._registrar.enrolled),
            )
            self._announce()
        return run

    def pause(self, run: str) -> None:
        """Pause after the round that is under way. Raises `NotPossibleNow`."""
        with self._lock:
            self._require(run, "running")
            self.runs.change(run, state="paused")
            self._audit.append("run_paused", run=run)
            self._parts.record(run).append_event("run_paused", round=self.runs.get(run)["round"])
            self._announce()

    def resume(self, run: str) -> None:
        """Go on with a paused or failed run, from its last finished round. Raises `NotPossibleNow`."""
        with self._lock:
            self._require(run, "paused", "failed")
            self.runs.change(run, state="running", code=None, detail=None, finished_at=None)
            self._audit.append("run_resumed", run=run)
            if run not in self._active:
                self._perform(run)
            self._announce()

    def stop(self, run: str) -> None:
        """End a run for good; its last finished adapter is kept. Raises `NotPossibleNow`."""
        with self._lock:
            self._require(run, "proposed", "running", "paused", "failed")
            self.runs.change(
                run, state="stopped", finished_at=time.time(), code=StoppedByOperator.code
            )
            self._audit.append("run_stopped", run=run)
            performance = self._active.get(run)
            if performance is not None:
                performance.stop()
            self._parts.record(run).append_event("run_stopped", round=self.runs.get(run)["round"])
            self._announce()
        if performance is None:
            self._parts.drop_link_run(run)

    def running_with(self, site: str) -> list[Callable[..., object]]:
        """Where to tell something about a site: one function for each running run that it is in."""
        running = self.runs.in_state("running")
        return [
            self._parts.record(run).append_event
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
            self._parts.record(decision.run).append_event(
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
            self._parts.record(run).append_event(
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
        performance = RunThread(self._parts, run, ended=self._ended)
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
            elif not isinstance(error, StoppedByOperator):
                self._fail(run, error)
            if error is None or state == "stopped":
                self._parts.drop_link_run(run)

    def _fail(self, run: str, error: Exception) -> None:
        known = isinstance(error, SilotuneError)
        code = error.code if isinstance(error, SilotuneError) else SilotuneError.code
        detail = error.detail if isinstance(error, SilotuneError) else type(error).__name__
        _log.error("run %s failed: %s %s", run, code, detail, exc_info=None if known else error)
        self.runs.change(run, state="failed", code=code, detail=detail, finished_at=time.time())
        self._audit.append("run_failed", run=run, code=code)
        self._parts.record(run).append_event("run_failed", code=code, detail=detail)
        self._announce()

    def _require(self, run: str, *states: str) -> RowMapping:
        row = self.runs.get(run)
        if row["state"] not in states:
            raise NotPossibleNow(f"{run} is {row['state']}, not {' or '.join(states)}")
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

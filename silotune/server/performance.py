"""One run being performed: a thread with a round loop over a grid, from here to its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, RecordDict

from silotune.federation import identity
from silotune.plan import Plan
from silotune.server.app import build_server_app
from silotune.server.arrival import Signal
from silotune.server.enrolment import Registrar
from silotune.server.errors import RunStopped
from silotune.server.keys import Keys
from silotune.server.link_grid import LinkGrid, Peer
from silotune.server.run_store import RunRecord, Runs
from silotune.server.store import Store
from silotune.server.superlink import Link, LinkRun
from silotune.strategies.base import Vector

_log = logging.getLogger(__name__)

_PAUSE_LOOK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Stage:
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
    link: Link
    keys: Keys
    registrar: Registrar
    serves: Callable[[str], bool]
    patience: float
    events: Signal
    alarm: Callable[..., None]

    def record(self, run: str) -> RunRecord:
        """The store of one run, for a line now and then."""
        return RunRecord(
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


class _Newcomer(Exception):
    """A site that approves is there and in nobody's cohort: the loop begins anew, with it."""


class Performance(threading.Thread):
    """The thread of one run.

    A loop fixes its cohort when it begins. A site that approves later, or was away just then, is let
    in between two rounds: the loop begins again behind the last checkpoint, as after a restart.

    Parameters
    ----------
    stage : Stage
        Where.
    run : str
        The run's name.
    ended : callable
        ``ended(run, error)``: called at the end, from this thread; without an error it is finished.
    """

    def __init__(
        self, stage: Stage, run: str, *, ended: Callable[[str, Exception | None], None]
    ) -> None:
        super().__init__(daemon=True, name=f"run {run}")
        self._stage, self._run, self._report = stage, run, ended
        self._leaving, self._rounds = threading.Event(), 0
        self._grid: LinkGrid | None = None
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End the loop soon. Whether for good, or until the next process, the run's state says."""
        with self._lock:
            self._leaving.set()
            if self._grid is not None:
                self._grid.stop()
        self._stage.events.fire()

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
        seen = self._stage.events.count
        while not self._leaving.is_set() and self._state() == "paused":
            _log.info("run %s is paused after round %d", self._run, server_round)
            seen = self._stage.events.wait(since=seen, seconds=_PAUSE_LOOK_SECONDS)
        if self._leaving.is_set():
            raise RunStopped(f"{self._run} was stopped")
        newcomers = self._newcomers() if server_round < self._rounds else []
        if newcomers:
            raise _Newcomer(", ".join(newcomers))

    def _newcomers(self) -> list[str]:
        """Sites that approve and are there, and were not when the loop asked who joins."""
        assert self._grid is not None
        enrolled = self._stage.registrar.enrolled
        nodes = {enrolled[s].node: s for s in self._stage.runs.approved(self._run) if s in enrolled}
        missed = nodes.keys() - self._grid.asked
        sightings = self._stage.link.sightings() if missed else {}
        return sorted(nodes[n] for n in missed if n in sightings and sightings[n].online)

    def _again(self) -> bool:
        """Perform; whether to do it again, because of a newcomer."""
        try:
            self._perform()
        except _Newcomer as sites:
            _log.info("run %s goes on with %s", self._run, sites)
            return True
        finally:
            with self._lock:
                grid, self._grid = self._grid, None
            if grid is not None:
                grid.close()
        return False

    def _state(self) -> str:
        return str(self._stage.runs.get(self._run)["state"])

    def _perform(self) -> None:
        plan = self._stage.runs.plan_of(self._run)
        self._rounds = plan.rounds.number
        grid = self._make_grid(plan)
        with self._lock:
            self._grid = grid
            if self._leaving.is_set():
                grid.stop()
        record = RunRecord(
            self._stage.store,
            self._run,
            on_event=self._stage.events.fire,
            on_checkpoint=grid.settle,
            gathers=True,
        )
        saved = record.load_checkpoint()
        if saved is not None:
            # The process before may have died between the checkpoint and forgetting its messages.
            grid.settle(int(saved[1]["round"]))
        app = build_server_app(plan=plan, run=self._run, store=record, observer=self)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        try:
            app(grid=grid, context=context)
        finally:
            record.close()

    def _make_grid(self, plan: Plan) -> LinkGrid:
        stage = self._stage
        approved = set(stage.runs.approved(self._run))
        peers = [
            Peer(node=e.node, site=name, key=identity.decode_signing_key(e.member.signing_key))
            for name, e in stage.registrar.enrolled.items()
            if name in approved
        ]
        return LinkGrid(
            link=stage.link,
            link_run=stage.link_run(self._run),
            run=self._run,
            federation=stage.registrar.federation,
            peers=peers,
            is_active=stage.serves,
            key=stage.keys.signing,
            ttl=plan.rounds.deadline,
            patience=stage.patience,
            alarm=stage.alarm,
        )

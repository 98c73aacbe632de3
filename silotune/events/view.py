"""A run as its events tell it: folded one by one, at any moment a full picture for pages and metrics.

The fold keeps what a watcher needs and nothing that was not told: a site that never answered in a
finished round was late, because nothing was heard of it; a round that is begun again starts empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from silotune.events import schema
from silotune.events.schema import Event, parse

OPEN_PHASES = frozenset({"training", "masked"})
"""Phases in which a site may still answer."""

UNLIKE = 5.0
"""Anomaly score above which a site's update is worth a look."""

_MASKED = frozenset({"masked", "unmasked"})


@dataclass(slots=True)
class Cell:
    """One site in one round."""

    phase: str
    code: str = ""
    detail: str = ""
    seconds: float | None = None
    anomaly: float | None = None


@dataclass(slots=True)
class RoundView:
    """One round.

    Attributes
    ----------
    cells : dict of Cell
        By site.
    done : bool
        Its result is durable.
    seconds, wait_seconds, aggregate_seconds : float or None
        Wall time; None until it is known.
    void : str
        Code of the reason why it came to nothing.
    """

    number: int
    trains: str
    started: float
    cells: dict[str, Cell] = field(default_factory=dict)
    done: bool = False
    seconds: float | None = None
    wait_seconds: float | None = None
    aggregate_seconds: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    sha256: str = ""
    void: str = ""


@dataclass(slots=True)
class SiteView:
    """One site in the run.

    Attributes
    ----------
    state : str
        ``asked``, ``approved``, ``rejected``, ``joined``, ``refused``, ``silent``, or the phase or
        ``failed`` of its newest round.
    epsilon : float or None
        Spent so far, where it is told.
    replied, failed : int
        Rounds that counted; rounds that were lost, or in which it was late.
    """

    name: str
    state: str = "asked"
    code: str = ""
    detail: str = ""
    declared_units: int | None = None
    mechanism: tuple[float, float] | None = None
    epsilon: float | None = None
    replied: int = 0
    failed: int = 0
    heard: float | None = None


@dataclass(frozen=True)
class Trouble:
    """A refusal or a failure."""

    site: str
    code: str
    detail: str
    round: int | None
    time: float


class RunView:
    """A run so far. Not safe for threads: `silotune.events.source.Views` guards it."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.state = "proposed"
        self.planned = 0
        self.last_id = 0
        self.last_time: float | None = None
        self.started: float | None = None
        self.ended: float | None = None
        self.code = self.detail = ""
        self.sites: dict[str, SiteView] = {}
        self.rounds: dict[int, RoundView] = {}
        self.evaluations: list[schema.Evaluated] = []
        self.epsilon: list[tuple[int, dict[str, float]]] = []
        self.troubles: list[Trouble] = []
        self.resumed_at: list[int] = []

    # --- reading ---

    @property
    def done(self) -> int:
        """Number of the last durable round."""
        return max((r.number for r in self.rounds.values() if r.done), default=0)

    @property
    def current(self) -> RoundView | None:
        """The newest round."""
        return self.rounds[max(self.rounds)] if self.rounds else None

    @property
    def finished_rounds(self) -> list[RoundView]:
        """Durable rounds, ascending."""
        return [self.rounds[n] for n in sorted(self.rounds) if self.rounds[n].done]

    def curve(self, metric: str, *, view: str, split: str) -> list[tuple[int, float]]:
        """A released or simulated score after rounds, ascending."""
        points = {
            found.round: value
            for found in self.evaluations
            if (found.view, found.split) == (view, split)
            and (value := found.pooled.get(metric)) is not None
        }
        return sorted(points.items())

    # --- folding ---

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of further events, in order; kinds that are not known change nothing."""
        for row in rows:
            self.add(parse(row))

    def add(self, event: Event) -> None:
        """Take note of one event."""
        self.last_id = event.id or self.last_id + 1
        self.last_time = event.time
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event)

    def _site(self, name: str, event: Event) -> SiteView:
        found = self.sites.setdefault(name, SiteView(name))
        found.heard = event.time
        return found

    def _cell(self, event: Any, phase: str, **more: Any) -> Cell:
        """The site's cell of the event's round, moved to a phase."""
        number = int(event.round)
        found = self.rounds.setdefault(number, RoundView(number, "", event.time))
        cell = found.cells[event.site] = Cell(phase, **more)
        site = self._site(event.site, event)
        site.state, site.code = phase, cell.code
        return cell

    def _trouble(self, event: Any, number: int | None) -> None:
        self.troubles.append(Trouble(event.site, event.code, event.detail, number, event.time))

    def _run_proposed(self, event: schema.RunProposed) -> None:
        self.planned = event.rounds
        for name in event.sites:
            self.sites.setdefault(name, SiteView(name))

    def _run_started(self, event: schema.RunStarted) -> None:
        self.state, self.started = "running", self.started or event.time
        self.planned = event.rounds or self.planned
        for name in event.sites:
            self.sites.setdefault(name, SiteView(name))

    def _run_resumed(self, event: schema.RunResumed) -> None:
        self.state = "running"
        self.resumed_at.append(event.from_round)

    def _run_paused(self, event: schema.RunPaused) -> None:
        self.state = "paused"

    def _ended(self, event: Event) -> None:
        self.state, self.ended = event.event.removeprefix("run_"), event.time
        if isinstance(event, schema.RunFailed):
            self.code, self.detail = event.code, event.detail

    def _decided(self, event: schema.PlanApproved | schema.PlanRejected) -> None:
        site = self._site(event.site, event)
        site.state, site.detail = event.event.removeprefix("plan_"), event.reason

    def _site_joined(self, event: schema.SiteJoined) -> None:
        site = self._site(event.site, event)
        site.state, site.declared_units = "joined", event.declared_units
        if event.rate is not None and event.sigma is not None:
            site.mechanism = (event.rate, event.sigma)

    def _site_refused(self, event: schema.SiteRefused) -> None:
        site = self._site(event.site, event)
        site.state, site.code, site.detail = "refused", event.code, event.detail
        self._trouble(event, None)

    def _site_silent(self, event: schema.SiteSilent) -> None:
        self._site(event.site, event).state = "silent"

    def _site_back(self, event: schema.SiteBack) -> None:
        self._site(event.site, event).state = "joined"

    def _round_started(self, event: schema.RoundStarted) -> None:
        number = event.round
        self.state = "running" if self.state == "proposed" else self.state
        # A round that was cut short is repeated; what it left no longer holds.
        for later in [n for n in self.rounds if n >= number]:
            del self.rounds[later]
        self.evaluations = [found for found in self.evaluations if found.round < number]
        self.epsilon = [point for point in self.epsilon if point[0] < number]
        self.rounds[number] = RoundView(number, event.phase, event.time)
        for name in event.cohort:
            self.rounds[number].cells[name] = Cell("training")
            site = self.sites.setdefault(name, SiteView(name))
            site.state, site.code = "training", ""

    def _site_phase(self, event: schema.SitePhase) -> None:
        before = (
            self.rounds[event.round].cells.get(event.site) if event.round in self.rounds else None
        )
        self._cell(event, event.phase, seconds=before.seconds if before else None)

    def _site_replied(self, event: schema.SiteReplied) -> None:
        seconds = event.train_seconds
        if seconds is None and event.round in self.rounds:
            seconds = event.time - self.rounds[event.round].started
        self._cell(event, "done", seconds=seconds)
        self.sites[event.site].replied += 1

    def _site_failed(self, event: schema.SiteFailed) -> None:
        self._cell(event, "failed", code=event.code, detail=event.detail)
        self.sites[event.site].failed += 1
        self._trouble(event, event.round)

    def _round_saved(self, event: schema.RoundSaved) -> None:
        found = self.rounds.setdefault(event.round, RoundView(event.round, "", event.time))
        found.done, found.sha256 = True, event.sha256
        self._close(found)

    def _round_finished(self, event: schema.RoundFinished) -> None:
        found = self.rounds.setdefault(event.round, RoundView(event.round, "", event.time))
        found.done = True
        found.seconds, found.wait_seconds = event.seconds, event.wait_seconds
        found.aggregate_seconds = event.aggregate_seconds
        found.bytes_up, found.bytes_down = event.bytes_up, event.bytes_down
        self._close(found)
        for name, score in event.anomaly.items():
            if name in found.cells:
                found.cells[name].anomaly = score
        spent = {site: value for site, value in event.epsilon.items() if value is not None}
        if spent:
            self.epsilon.append((event.round, spent))
            for name, value in spent.items():
                self.sites.setdefault(name, SiteView(name)).epsilon = value

    def _round_void(self, event: schema.RoundVoid) -> None:
        found = self.rounds.setdefault(event.round, RoundView(event.round, "", event.time))
        found.void = event.code or "void"

    def _close(self, found: RoundView) -> None:
        """Whoever was still awaited when the round ended was late; masked updates are in the sum."""
        for name, cell in found.cells.items():
            if cell.phase in _MASKED:
                cell.phase = self.sites[name].state = "dropped" if found.void else "done"
            elif cell.phase in OPEN_PHASES:
                cell.phase = "late"
                self.sites[name].state = "late"
                self.sites[name].failed += 1

    def _evaluated(self, event: schema.Evaluated) -> None:
        self.evaluations.append(event)


_HANDLERS: dict[type[Event], Any] = {
    schema.RunProposed: RunView._run_proposed,
    schema.PlanApproved: RunView._decided,
    schema.PlanRejected: RunView._decided,
    schema.RunStarted: RunView._run_started,
    schema.RunResumed: RunView._run_resumed,
    schema.RunPaused: RunView._run_paused,
    schema.RunStopped: RunView._ended,
    schema.RunFailed: RunView._ended,
    schema.RunFinished: RunView._ended,
    schema.SiteJoined: RunView._site_joined,
    schema.SiteRefused: RunView._site_refused,
    schema.SitePhase: RunView._site_phase,
    schema.SiteReplied: RunView._site_replied,
    schema.SiteFailed: RunView._site_failed,
    schema.SiteSilent: RunView._site_silent,
    schema.SiteBack: RunView._site_back,
    schema.RoundStarted: RunView._round_started,
    schema.RoundSaved: RunView._round_saved,
    schema.RoundFinished: RunView._round_finished,
    schema.RoundVoid: RunView._round_void,
    schema.Evaluated: RunView._evaluated,
}

"""A run as its events tell it: folded one by one, at any moment a full picture for pages and metrics.

The one fold there is: terminals, pages, metrics, summaries and reports all read it, so that no kind of
event is known to one of them and not to another. Each kind has the method of its name, also where there
is nothing to keep; without one this module can't be imported.

It keeps what a watcher needs and nothing that was not told: a site that never answered in a finished
round was late, because nothing was heard of it; a round that is begun again starts empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from silotune.errors import catalogue
from silotune.events import schema
from silotune.events.schema import KINDS, Event, kind_of, parse

OPEN_PHASES = frozenset({"training", "masked"})
"""Phases in which a site may still answer."""

UNLIKE = 5.0
"""Anomaly score above which a site's update is worth a look."""

_MASKED = frozenset({"masked", "unmasked"})


@dataclass(slots=True)
class Cell:
    """One site in one round.

    Attributes
    ----------
    arrived : bool
        Its update did; it may have failed behind that, in a secure round.
    trained : float or None
        Seconds of training, where they are told (by simulations).
    """

    phase: str
    code: str = ""
    detail: str = ""
    arrived: bool = False
    trained: float | None = None
    anomaly: float | None = None


@dataclass(slots=True)
class RoundView:
    """One round.

    Attributes
    ----------
    trains : str
        ``head``, ``adapter``, or nothing where that was not told.
    started, ended : float
        Unix times; `ended` is None until the round is finished.
    cohort : tuple of str
        Sites that were asked.
    cells : dict of Cell
        By site.
    done : bool
        Its result is durable.
    seconds, wait_seconds, aggregate_seconds, train_seconds : float or None
        Wall time, waiting for the sites (which train meanwhile), aggregation; training summed over the
        sites, where it is told. None until it is known.
    void : str
        Code of the reason why it came to nothing.
    """

    number: int
    trains: str
    started: float
    cohort: tuple[str, ...] = ()
    cells: dict[str, Cell] = field(default_factory=dict)
    done: bool = False
    ended: float | None = None
    seconds: float | None = None
    wait_seconds: float | None = None
    aggregate_seconds: float | None = None
    train_seconds: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    sha256: str = ""
    void: str = ""

    @property
    def replied(self) -> dict[str, float | None]:
        """Seconds of training, where told, of each site whose update arrived."""
        return {name: cell.trained for name, cell in self.cells.items() if cell.arrived}

    @property
    def failed(self) -> dict[str, str]:
        """Code of the error, by site."""
        return {name: cell.code for name, cell in self.cells.items() if cell.phase == "failed"}


@dataclass(slots=True)
class SiteView:
    """One site in the run.

    Attributes
    ----------
    state : str
        ``asked``, ``approved``, ``rejected``, ``joined``, ``refused``, ``silent``, or the phase or
        ``failed`` of its newest round.
    joined : bool
        It is in the run.
    mechanism : pair of float, or None
        Sampling rate and noise multiplier that it said it uses.
    epsilon : float or None
        Spent so far, where it is told.
    replied, failed : int
        Rounds that counted; rounds that were lost, or in which it was late.
    trained : float or None
        Seconds of training in its last reply, where told.
    """

    name: str
    state: str = "asked"
    joined: bool = False
    code: str = ""
    detail: str = ""
    declared_units: int | None = None
    mechanism: tuple[float, float] | None = None
    epsilon: float | None = None
    replied: int = 0
    failed: int = 0
    trained: float | None = None
    heard: float | None = None

    @property
    def troubled(self) -> bool:
        """Whether it is not in the run, or failed in the newest round."""
        return self.state in {"failed", "refused", "rejected"}


@dataclass(frozen=True)
class Evaluation:
    """Scores after a round; one that was not finite is left out.

    Attributes
    ----------
    view : str
        ``simulator``: its own look at held-out data, which no site released. ``released``: sums that
        sites released under differential privacy.
    """

    number: int
    view: str
    split: str
    pooled: Mapping[str, float]
    sites: Mapping[str, Mapping[str, float]]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """The newest comparison model of a simulation, and how many there will be."""

    title: str
    number: int
    of: int


@dataclass(frozen=True)
class Trouble:
    """A refusal (`round` is None) or a failure."""

    site: str
    code: str
    detail: str
    round: int | None
    time: float


@dataclass(frozen=True)
class KindOfTrouble:
    """Troubles of one site and code together, explained; the cause of an unknown code is empty."""

    site: str
    code: str
    title: str
    cause: str
    remedy: str
    rounds: tuple[int, ...]
    details: tuple[str, ...]


@dataclass(frozen=True)
class TroubleLine:
    """A kind of trouble at one site: the error, and what to do."""

    site: str
    code: str
    title: str
    cause: str
    remedy: str
    when: str
    detail: str


def by_error(troubles: Iterable[Trouble]) -> list[KindOfTrouble]:
    """Troubles by site and code, in the order in which each kind came first."""
    grouped: dict[tuple[str, str], list[Trouble]] = {}
    for trouble in troubles:
        grouped.setdefault((trouble.site, trouble.code), []).append(trouble)
    known = {error.code: error for error in catalogue()} if grouped else {}
    return [
        KindOfTrouble(
            site,
            code,
            title=error.title if error else "An error without a known code",
            cause=error.cause if error else "",
            remedy=error.advice if error else "Ask the site's team for its log.",
            rounds=tuple(t.round for t in group if t.round is not None),
            details=tuple(t.detail for t in group if t.detail),
        )
        for (site, code), group in grouped.items()
        for error in [known.get(code)]
    ]


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
        self.evaluations: list[Evaluation] = []
        self.epsilon: list[tuple[int, dict[str, float]]] = []
        self.troubles: list[Trouble] = []
        self.resumed_at: list[int] = []
        self.workers = self._newest = 0
        self.baseline: Baseline | None = None
        self.found: dict[str, Any] | None = None

    # --- reading ---

    @property
    def finished(self) -> bool:
        """Whether every round is done."""
        return self.state == "finished"

    @property
    def done(self) -> int:
        """Number of the last durable round."""
        known = (r.number for r in self.rounds.values() if r.done)
        return max([*known, *self.resumed_at[-1:]], default=0)

    @property
    def current(self) -> RoundView | None:
        """The newest round."""
        return self.rounds[max(self.rounds)] if self.rounds else None

    @property
    def every_round(self) -> list[RoundView]:
        """Rounds, ascending."""
        return [self.rounds[number] for number in sorted(self.rounds)]

    @property
    def finished_rounds(self) -> list[RoundView]:
        """Durable rounds, ascending."""
        return [found for found in self.every_round if found.done]

    @property
    def joined(self) -> list[str]:
        """Sites that are in."""
        return [name for name, site in self.sites.items() if site.joined]

    def curve(self, metric: str, *, view: str, split: str) -> list[tuple[int, float]]:
        """A released or simulated score after rounds, ascending."""
        points = {
            found.number: value
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
        if type(event) in _HANDLERS:
            _HANDLERS[type(event)](self, event)

    def _site(self, name: str, event: Event) -> SiteView:
        found = self.sites.setdefault(name, SiteView(name))
        found.heard = event.time
        return found

    def _round(self, event: Any) -> RoundView:
        number = int(event.round)
        return self.rounds.setdefault(number, RoundView(number, "", event.time))

    def _cell(self, event: Any, phase: str) -> Cell:
        """The site's cell of the event's round, moved to a phase."""
        cell = self._round(event).cells.setdefault(event.site, Cell(phase))
        cell.phase, cell.code, cell.detail = phase, "", ""
        site = self._site(event.site, event)
        site.state, site.code = phase, ""
        return cell

    def _trouble(self, event: Any, number: int | None) -> None:
        self.troubles.append(Trouble(event.site, event.code, event.detail, number, event.time))

    def _judged(self, event: schema.PlanApproved | schema.PlanRejected, state: str) -> None:
        site = self._site(event.site, event)
        site.state, site.detail = state, event.reason

    def _end(self, event: Event) -> None:
        self.state, self.ended = event.event.removeprefix("run_"), event.time

    # --- one method a kind of event ---

    def _run_proposed(self, event: schema.RunProposed) -> None:
        self.planned = event.rounds
        for name in event.sites:
            self.sites.setdefault(name, SiteView(name))

    def _run_started(self, event: schema.RunStarted) -> None:
        self.state, self.started = "running", self.started or event.time
        self.ended, self.code, self.detail = None, "", ""
        self.planned = event.rounds or self.planned
        for name in event.sites:  # each is asked again by a process that goes on with a run
            self.sites.setdefault(name, SiteView(name)).joined = False

    def _run_resumed(self, event: schema.RunResumed) -> None:
        self.state = "running"
        self.resumed_at.append(event.from_round)

    def _run_paused(self, event: schema.RunPaused) -> None:
        self.state = "paused"

    def _run_stopped(self, event: schema.RunStopped) -> None:
        self._end(event)

    def _run_failed(self, event: schema.RunFailed) -> None:
        self._end(event)
        self.code, self.detail = event.code, event.detail

    def _run_finished(self, event: schema.RunFinished) -> None:
        self._end(event)

    def _plan_approved(self, event: schema.PlanApproved) -> None:
        self._judged(event, "approved")

    def _plan_rejected(self, event: schema.PlanRejected) -> None:
        self._judged(event, "rejected")

    def _worker_ready(self, event: schema.WorkerReady) -> None:
        self.workers += 1

    def _baseline_finished(self, event: schema.BaselineFinished) -> None:
        self.baseline = Baseline(event.title, event.number, event.of)

    def _site_joined(self, event: schema.SiteJoined) -> None:
        site = self._site(event.site, event)
        site.state, site.joined, site.declared_units = "joined", True, event.declared_units
        if event.rate is not None and event.sigma is not None:
            site.mechanism = (event.rate, event.sigma)

    def _site_refused(self, event: schema.SiteRefused) -> None:
        site = self._site(event.site, event)
        site.state, site.code, site.detail = "refused", event.code, event.detail
        site.joined = False
        self._trouble(event, None)

    def _site_silent(self, event: schema.SiteSilent) -> None:
        self._site(event.site, event).state = "silent"

    def _site_back(self, event: schema.SiteBack) -> None:
        self._site(event.site, event).state = "joined"

    def _round_started(self, event: schema.RoundStarted) -> None:
        number = event.round
        self.state = "running" if self.state == "proposed" else self.state
        if number <= self._newest:
            self._forget(number)
        self._newest = number
        cells = {name: Cell("training") for name in event.cohort}
        self.rounds[number] = RoundView(number, event.phase, event.time, event.cohort, cells)
        for name in event.cohort:
            site = self.sites.setdefault(name, SiteView(name))
            site.state, site.code = "training", ""

    def _forget(self, number: int) -> None:
        """A round that was cut short is repeated; what it left no longer holds."""
        for later in [n for n in self.rounds if n >= number]:
            del self.rounds[later]
        self.evaluations = [found for found in self.evaluations if found.number < number]
        self.epsilon = [point for point in self.epsilon if point[0] < number]

    def _site_phase(self, event: schema.SitePhase) -> None:
        self._cell(event, event.phase)

    def _site_replied(self, event: schema.SiteReplied) -> None:
        cell = self._cell(event, "done")
        cell.arrived, cell.trained = True, event.train_seconds
        site = self.sites[event.site]
        site.replied, site.trained = site.replied + 1, event.train_seconds

    def _site_failed(self, event: schema.SiteFailed) -> None:
        cell, site = self._cell(event, "failed"), self.sites[event.site]
        cell.code, cell.detail = event.code, event.detail
        site.code, site.failed = event.code, site.failed + 1
        self._trouble(event, event.round)

    def _round_saved(self, event: schema.RoundSaved) -> None:
        found = self._round(event)
        found.done, found.sha256 = True, event.sha256
        self._close(found)

    def _round_finished(self, event: schema.RoundFinished) -> None:
        found = self._round(event)
        found.done, found.ended = True, event.time
        found.seconds, found.wait_seconds = event.seconds, event.wait_seconds
        found.aggregate_seconds, found.train_seconds = event.aggregate_seconds, event.train_seconds
        if "train_seconds" not in event.model_fields_set:
            by_site = [seconds for seconds in found.replied.values() if seconds is not None]
            found.train_seconds = sum(by_site) if by_site else None
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
        self._round(event).void = event.code or "void"

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
        sites = {name: _known(scores) for name, scores in event.sites.items()}
        self.evaluations.append(
            Evaluation(
                *(event.round, event.view, event.split, _known(event.pooled), sites, event.left_out)
            )
        )

    def _statistics(self, event: schema.StatisticsReleased) -> None:
        self.found = event.found

    def _votes(self, event: schema.VotesReleased) -> None:
        self.found = event.found

    def _enrolment_requested(self, event: schema.EnrolmentRequested) -> None:
        """Of the federation, not of a run."""

    def _operator_action(self, event: schema.OperatorAction) -> None:
        """What it came to has an event of its own."""

    def _alarm(self, event: schema.Alarm) -> None:
        """Shown to people where it is told; it changes no run."""


def _known(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if value is not None}


_HANDLERS: dict[type[Event], Any] = {kind: getattr(RunView, f"_{kind_of(kind)}") for kind in KINDS}

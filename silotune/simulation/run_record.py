"""What a run directory says, read once into plain values for the report and the summary.

Nothing here decides what is good or bad; it only turns files into typed facts. Every part may be
missing: a run can be unfinished, without baselines, or without privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from silotune.errors import RunDirectoryInvalid
from silotune.simulation.run_directory import EventKind, RunDirectory

Scores = Mapping[str, float]


@dataclass(frozen=True)
class Round:
    """One round as the events tell it; `seconds` is None while it isn't finished.

    Attributes
    ----------
    replied : Mapping[str, float | None]
        Seconds each site trained, by site; None where only the site knows.
    failed : Mapping[str, str]
        Error code, by site.
    seconds, wait_seconds, aggregate_seconds : float
        Wall time of the round; the coordinator's waiting for replies (during which sites train);
        its own aggregation.
    train_seconds : float, optional
        Training summed over sites, where the simulator measured it.
    bytes_up, bytes_down : int
        Bytes from the sites and to the sites.
    """

    number: int
    phase: str
    cohort: tuple[str, ...]
    replied: Mapping[str, float | None] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    train_seconds: float | None = None
    wait_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Scores after a round.

    Attributes
    ----------
    view : str
        "simulator": its own look at held-out data, which no site released. "released": sums that
        sites released under differential privacy.
    """

    number: int
    view: str
    split: str
    pooled: Scores
    sites: Mapping[str, Scores]


@dataclass(frozen=True)
class Fault:
    """A site that refused the run (`number` is None) or failed in a round."""

    site: str
    code: str
    number: int | None
    detail: str = ""


@dataclass(frozen=True)
class History:
    """What happened in time. Rounds and evaluations ascend; a round done twice counts once.

    Attributes
    ----------
    mechanisms : Mapping[str, tuple[float, float]]
        Sampling rate and noise multiplier that each site said it uses, by site.
    """

    sites: tuple[str, ...] = ()
    mechanisms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    planned_rounds: int = 0
    rounds: tuple[Round, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    faults: tuple[Fault, ...] = ()
    resumed_at: tuple[int, ...] = ()
    started: float | None = None
    finished: bool = False

    @property
    def finished_rounds(self) -> tuple[Round, ...]:
        """Rounds whose aggregate was applied."""
        return tuple(found for found in self.rounds if found.seconds is not None)


@dataclass(frozen=True)
class Method:
    """One way of training and what it reached, as results.json has it."""

    key: str
    title: str
    private: bool
    epsilon: float | None
    test: Scores
    by_site: Mapping[str, Scores]
    seconds: float | None
    examples_seen: float | None


@dataclass(frozen=True)
class RunRecord:
    """A whole run directory: the resolved plan, the history, privacy and results."""

    directory: RunDirectory
    resolved: Mapping[str, Any]
    history: History
    privacy: Mapping[str, Any] | None
    methods: tuple[Method, ...]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan as plain data (may be empty)."""
        plan = self.resolved.get("plan")
        return plan if isinstance(plan, Mapping) else {}

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site's name, in the order of the run."""
        listed = [str(site["name"]) for site in self.resolved.get("sites", ())]
        return tuple(dict.fromkeys([*listed, *self.history.sites]))

    def method(self, key: str) -> Method | None:
        """The method of this key, if it was run."""
        return next((method for method in self.methods if method.key == key), None)


def read_record(run_dir: Path) -> RunRecord:
    """Read everything. Raises `RunDirectoryInvalid` for a folder that is no run or is damaged."""
    directory = RunDirectory.open(run_dir)
    try:
        results = directory.find_json("results.json") or {}
        return RunRecord(
            directory=directory,
            resolved=directory.read_json("resolved.json"),
            history=read_history(directory.events),
            privacy=directory.find_json("privacy.json"),
            methods=tuple(_method(entry) for entry in results.get("methods", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise RunDirectoryInvalid(f"{run_dir} has a file of another shape: {exc!r}") from exc


def read_history(events: Iterable[Mapping[str, Any]]) -> History:
    """Fold events into a `History`; unknown kinds are ignored, so older readers read newer runs."""
    fold = _Fold()
    for event in events:
        fold.add(event)
    return fold.history()


def _method(entry: Mapping[str, Any]) -> Method:
    return Method(
        key=str(entry["key"]),
        title=str(entry.get("title") or entry["key"]),
        private=bool(entry.get("private")),
        epsilon=_number(entry.get("epsilon")),
        test=_scores(entry.get("test")),
        by_site={str(k): _scores(v) for k, v in (entry.get("by_site") or {}).items()},
        seconds=_number(entry.get("seconds")),
        examples_seen=_number(entry.get("examples_seen")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _scores(found: Mapping[str, Any] | None) -> Scores:
    """Named numbers; a null (a score that wasn't finite) is left out."""
    return {str(k): float(v) for k, v in (found or {}).items() if v is not None}


class _Fold:
    """Events folded one by one: a method a kind."""

    def __init__(self) -> None:
        self._known = History()
        self._sites: dict[str, None] = {}
        self._mechanisms: dict[str, tuple[float, float]] = {}
        self._rounds: dict[int, Round] = {}
        self._evaluations: list[Evaluation] = []
        self._faults: list[Fault] = []

    def add(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind in get_args(EventKind):
            getattr(self, f"_{kind}")(event)

    def history(self) -> History:
        return replace(
            self._known,
            sites=tuple(self._sites),
            mechanisms=self._mechanisms,
            rounds=tuple(self._rounds[number] for number in sorted(self._rounds)),
            evaluations=tuple(sorted(self._evaluations, key=lambda found: found.number)),
            faults=tuple(self._faults),
        )

    def _run_started(self, event: Mapping[str, Any]) -> None:
        self._sites |= dict.fromkeys(map(str, event.get("sites", ())))
        self._known = replace(
            self._known,
            planned_rounds=int(event.get("rounds", 0)),
            started=self._known.started or _number(event.get("time")),
        )

    def _run_resumed(self, event: Mapping[str, Any]) -> None:
        at = (*self._known.resumed_at, int(event["from_round"]))
        self._known = replace(self._known, resumed_at=at)

    def _run_finished(self, _event: Mapping[str, Any]) -> None:
        self._known = replace(self._known, finished=True)

    def _worker_ready(self, _event: Mapping[str, Any]) -> None:
        """Nothing to keep: it is for who waits."""

    def _baseline_finished(self, _event: Mapping[str, Any]) -> None:
        """Nothing to keep: results.json has what came of it."""

    def _site_joined(self, event: Mapping[str, Any]) -> None:
        site, rate, sigma = str(event["site"]), event.get("rate"), event.get("sigma")
        self._sites[site] = None
        if rate is not None and sigma is not None:
            self._mechanisms[site] = (float(rate), float(sigma))

    def _site_refused(self, event: Mapping[str, Any]) -> None:
        self._faults.append(_fault(event))

    def _round_started(self, event: Mapping[str, Any]) -> None:
        # A resumed run repeats the round that was cut short; what it left no longer holds.
        number = int(event["round"])
        self._rounds[number] = Round(
            number=number,
            phase=str(event.get("phase", "")),
            cohort=tuple(map(str, event.get("cohort", ()))),
        )
        self._evaluations = [found for found in self._evaluations if found.number < number]

    def _site_replied(self, event: Mapping[str, Any]) -> None:
        found = self._round(event)
        seconds = _number(event.get("train_seconds"))
        self._put(replace(found, replied={**found.replied, str(event["site"]): seconds}))

    def _site_failed(self, event: Mapping[str, Any]) -> None:
        fault, found = _fault(event), self._round(event)
        self._faults.append(fault)
        self._put(replace(found, failed={**found.failed, fault.site: fault.code}))

    def _round_finished(self, event: Mapping[str, Any]) -> None:
        found = self._round(event)
        by_site = [seconds for seconds in found.replied.values() if seconds is not None]
        trained = event.get("train_seconds", sum(by_site) if by_site else None)
        self._put(
            replace(
                found,
                seconds=float(event.get("seconds") or 0.0),
                train_seconds=_number(trained),
                wait_seconds=float(event.get("wait_seconds") or 0.0),
                aggregate_seconds=float(event.get("aggregate_seconds") or 0.0),
                bytes_up=int(event.get("bytes_up") or 0),
                bytes_down=int(event.get("bytes_down") or 0),
            )
        )

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        self._evaluations.append(
            Evaluation(
                number=int(event["round"]),
                view=str(event.get("view", "")),
                split=str(event.get("split", "")),
                pooled=_scores(event.get("pooled")),
                sites={str(k): _scores(v) for k, v in (event.get("sites") or {}).items()},
            )
        )

    def _round(self, event: Mapping[str, Any]) -> Round:
        number = int(event["round"])
        return self._rounds.get(number) or Round(number=number, phase="", cohort=())

    def _put(self, found: Round) -> None:
        self._rounds[found.number] = found


def _fault(event: Mapping[str, Any]) -> Fault:
    number = event.get("round")
    return Fault(
        site=str(event["site"]),
        code=str(event.get("code", "")),
        number=None if number is None else int(number),
        detail=str(event.get("detail") or ""),
    )

"""What a progress display knows: events folded into the state of a run that goes on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, get_args

from silotune.simulation.run_directory import EventKind
from silotune.simulation.wording import clock_time

_SCORES = (("macro_f1", "macro-F1"), ("loss", "loss"), ("accuracy", "accuracy"))


@dataclass
class SiteState:
    """One site's last word.

    Attributes
    ----------
    state : str
        ``idle``, ``joined``, ``training``, ``replied``, ``failed CODE`` or ``refused CODE``.
    seconds : float or None
        Training in its last reply, where known.
    """

    state: str = "idle"
    seconds: float | None = None

    @property
    def troubled(self) -> bool:
        """Whether it refused, or failed in this round."""
        return self.state.startswith(("failed", "refused"))


class RunState:
    """A run so far, by its events.

    Attributes
    ----------
    run, phase, score, baseline : str
        Name; ``head`` or ``adapter``; the newest score in words; the newest baseline in words.
    rounds, number, done : int
        Planned rounds, the round that goes on, rounds finished.
    workers, joined : int
        Worker processes that are ready; sites that joined.
    sites : dict of SiteState
        By name.
    epsilon : Mapping[str, float]
        Spent so far, by site, where the events say it.
    """

    def __init__(self) -> None:
        self.run = self.phase = self.score = self.baseline = ""
        self.rounds = self.number = self.done = 0
        self.sites: dict[str, SiteState] = {}
        self.epsilon: Mapping[str, float] = {}
        self.workers = self.joined = 0
        self.finished = False
        self._baselines = (0, 0)
        self._scored_round = 0
        self._started: float | None = None
        self._last_finish: float | None = None
        self._recent: deque[float] = deque(maxlen=8)
        self._last: Mapping[str, Any] = {}
        self._cohort: tuple[str, ...] = ()

    def add(self, event: Mapping[str, Any]) -> None:
        """Take note of one event; unknown kinds change nothing."""
        kind = event.get("event")
        if kind in get_args(EventKind):
            getattr(self, f"_{kind}")(event)

    @property
    def share(self) -> tuple[int, int]:
        """Done and all: rounds, and behind them baselines."""
        return self._baselines if self._baselines[1] else (self.done, self.rounds)

    def times(self, now: float) -> str:
        """Time gone and, as far as it can be said, time to go."""
        gone = clock_time(now - self._started) if self._started is not None else clock_time(0)
        left = "" if self.finished else self.remaining()
        return f"{gone}, {left}" if left else gone

    def remaining(self) -> str:
        """Time to go by the pace of the last rounds; head-only rounds are quicker than others."""
        if not self._recent or self.done >= self.rounds:
            return ""
        words = "at least" if self.phase == "head" else "about"
        return f"{words} {clock_time(mean(self._recent) * (self.rounds - self.done))} left"

    def round_line(self) -> str:
        """The last finished round in one line."""
        event = self._last
        replied = sum(self.sites[name].state == "replied" for name in self._cohort)
        parts = [f"{replied}/{len(self._cohort)} sites", f"{event.get('seconds') or 0:.2f} s"]
        if self.score and self._scored_round == self.done:
            parts.append(f"{self.score} (simulator's view)")
        if self.epsilon:
            parts.append(f"eps {max(self.epsilon.values()):.2f}")
        if left := self.remaining():
            parts.append(left)
        phase = f" {self.phase}" if self.phase else ""
        return f"round {self.done}/{self.rounds}{phase}: {', '.join(parts)}"

    def counts(self, *, leaving_out: Collection[str]) -> str:
        """How many of the other sites are in which state."""
        others = Counter(
            site.state.split(" ")[0] for name, site in self.sites.items() if name not in leaving_out
        )
        return "and " + ", ".join(f"{number} {state}" for state, number in sorted(others.items()))

    # --- one method a kind of event ---

    def _run_started(self, event: Mapping[str, Any]) -> None:
        self.run, self.rounds = str(event.get("run", "")), int(event.get("rounds", 0))
        self.sites = {str(name): SiteState() for name in event.get("sites", ())}
        self._started = self._last_finish = float(event["time"])

    def _run_resumed(self, event: Mapping[str, Any]) -> None:
        self.done = int(event["from_round"])

    def _worker_ready(self, _event: Mapping[str, Any]) -> None:
        self.workers += 1

    def _site_joined(self, event: Mapping[str, Any]) -> None:
        self.joined += 1
        self._site(event).state = "joined"

    def _site_refused(self, event: Mapping[str, Any]) -> None:
        self._site(event).state = f"refused {event.get('code', '')}"

    def _round_started(self, event: Mapping[str, Any]) -> None:
        phase = str(event.get("phase", ""))
        if phase != self.phase:
            self._recent.clear()
        self.number, self.phase = int(event["round"]), phase
        self._cohort = tuple(map(str, event.get("cohort", ())))
        self._last_finish = float(event["time"])
        for name in self._cohort:
            self.sites.setdefault(name, SiteState()).state = "training"

    def _site_replied(self, event: Mapping[str, Any]) -> None:
        site, seconds = self._site(event), event.get("train_seconds")
        site.state, site.seconds = "replied", None if seconds is None else float(seconds)

    def _site_failed(self, event: Mapping[str, Any]) -> None:
        self._site(event).state = f"failed {event.get('code', '')}"

    def _round_finished(self, event: Mapping[str, Any]) -> None:
        self.done, self._last = int(event["round"]), event
        self.epsilon = event.get("epsilon") or self.epsilon
        if self._last_finish is not None:
            self._recent.append(float(event["time"]) - self._last_finish)

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        pooled = event.get("pooled") or {}
        if event.get("view") != "simulator":
            return
        for key, title in _SCORES:
            if pooled.get(key) is not None:
                self._scored_round = int(event["round"])
                self.score = f"{event.get('split', '')} {title} {pooled[key]:.3f}".strip()
                return

    def _run_finished(self, _event: Mapping[str, Any]) -> None:
        self.finished, self.phase = True, ""

    def _baseline_finished(self, event: Mapping[str, Any]) -> None:
        self._baselines = (int(event["number"]), int(event["of"]))
        done, of = self._baselines
        self.baseline = f"baseline {done} of {of}: {event.get('title', '')}"

    def _site(self, event: Mapping[str, Any]) -> SiteState:
        return self.sites.setdefault(str(event["site"]), SiteState())

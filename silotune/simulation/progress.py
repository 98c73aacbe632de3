"""A run as it goes on: a live display in a terminal, plain lines anywhere else.

It is fed the same events that the run directory keeps, and looks at nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from statistics import mean
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from silotune.errors import catalogue
from silotune.events.view import RunView, SiteView
from silotune.plan.tasks import METRICS
from silotune.report.verdict import DASH, clock_time, plural, printable
from silotune.terminal import terminal

_MOST_SITES = 12
_STYLES = {
    **{"training": "cyan", "masked": "blue", "unmasked": "blue", "done": "green"},
    **{"late": "yellow", "dropped": "yellow", "failed": "red", "refused": "red"},
}
_RECENT = 8  # rounds whose pace tells how long the rest will take


class Progress:
    """Shows a run while it goes on; give it each event as it is written.

    Use it as a context manager. On a terminal it redraws in place and prints trouble above;
    elsewhere (a log, a pipe) it prints one line a round.

    Parameters
    ----------
    console : Console, optional
        Where to; its ``is_terminal`` decides between the two forms.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or terminal()
        self._view = RunView("")
        self._lock = threading.RLock()  # the display redraws from a thread of its own
        self._round_to_print = False
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self.render,
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._flush()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take note of one event."""
        with self._lock:
            kind = event.get("event")
            if kind != "evaluated":
                self._flush()
            self._view.extend([event])
            if kind == "round_finished":
                # Its line waits for the scores of this round, which come right behind it.
                self._round_to_print = True
            elif line := self._line(event):
                self._print(line)

    def render(self) -> RenderableType:
        """The live display as it is now, at most as wide as the console."""
        with self._lock:
            return Group(self._headline(), self._bar(), self._scores(), self._sites())

    # --- lines ---

    def _flush(self) -> None:
        """Print the held-back line of a finished round, where rounds have lines."""
        if self._round_to_print and not self._console.is_terminal:
            self._print(round_line(self._view))
        self._round_to_print = False

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _line(self, event: Mapping[str, Any]) -> str:
        """What is worth a line of its own, in both forms; else nothing."""
        view, site, line = self._view, printable(str(event.get("site", ""))), ""
        match event.get("event"):
            case "run_started":
                line = f"{event.get('run', '')}: {plural(len(view.sites), 'site')}, "
                line += plural(view.planned, "round")
                if computing := printable(str(event.get("computing", ""))):
                    line += f"; computes with {computing}"
            case "run_resumed":
                line = f"resumed after round {event['from_round']}"
            case "site_refused":
                line = f"{site} refused to join: {_explained(event)}"
            case "site_failed":
                line = f"{site} failed in round {event['round']}: {_explained(event)}"
            case "round_void":
                line = f"round {event['round']} came to nothing: {_explained(event)}"
            case "run_failed":
                line = f"the run ended: {_explained(event)}"
            case "run_stopped":
                line = f"stopped in round {event['round']}"
            case "worker_ready" if not self._console.is_terminal:
                line = f"worker {event['worker'] + 1} ready after {event['seconds']:.1f} s"
            case "site_joined" if not self._console.is_terminal and len(view.sites) <= _MOST_SITES:
                line = f"{site} joined, {len(view.joined)} of {len(view.sites)}"
            case "run_finished":
                line = f"{event['rounds']} rounds finished in {clock_time(event['seconds'])}"
            case "baseline_finished" if not self._console.is_terminal:
                line = f"{_baseline(view)}, after {clock_time(event['seconds'])}"
        return line

    # --- the live display ---

    def _headline(self) -> RenderableType:
        view = self._view
        current = view.current
        left = f"round {current.number} of {view.planned}" if current else _beginning(view)
        if current and current.trains and not view.finished:
            left += f", {'head only' if current.trains == 'head' else 'head and adapter'}"
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        words = _baseline(view) or printable(left)
        grid.add_row(Text(words, style="bold"), Text(_times(view, time.time())))
        return grid

    def _bar(self) -> RenderableType:
        view = self._view
        found = view.baseline
        done, of = (found.number, found.of) if found else (view.done, view.planned)
        grid = Table.grid(expand=True)  # a bar by itself doesn't end its line
        grid.add_row(ProgressBar(total=max(of, 1), completed=done))
        return grid

    def _scores(self) -> RenderableType:
        seen = _score(self._view)
        parts = [f"{seen[1]}, simulator's view" if seen else "no score yet"]
        if spent := _spent(self._view):
            parts.append(f"\N{GREEK SMALL LETTER EPSILON} at most {spent:.2f}")
        return Text(";  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _sites(self) -> RenderableType:
        table = Table(box=None, expand=True, padding=(0, 1), show_edge=False)
        table.add_column("site", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("state", no_wrap=True, width=16)
        table.add_column("trained", no_wrap=True, justify="right", width=9)
        table.add_column("\N{GREEK SMALL LETTER EPSILON}", no_wrap=True, justify="right", width=7)
        sites = self._view.sites
        shown = sorted(sites, key=lambda name: not sites[name].troubled)[:_MOST_SITES]
        for name, site in sites.items():
            if name in shown:
                table.add_row(
                    Text(printable(name)),
                    Text(f"{site.state} {site.code}".strip(), style=_STYLES.get(site.state, "")),
                    f"{site.trained:.2f} s" if site.trained is not None else DASH,
                    f"{site.epsilon:.2f}" if site.epsilon is not None else DASH,
                )
        if len(sites) > len(shown):
            table.add_row(Text(_counts(sites, leaving_out=shown)), "", "", "")
        return table


def round_line(view: RunView) -> str:
    """The last finished round of a run in one line."""
    found = view.finished_rounds[-1]
    replied = len(found.replied.keys() - found.failed.keys())
    parts = [f"{replied}/{len(found.cohort)} sites", f"{found.seconds or 0:.2f} s"]
    if found.void:
        parts.append(f"void, {printable(found.void)}")
    seen = _score(view)
    if seen and seen[0] == found.number:
        parts.append(f"{seen[1]} (simulator's view)")
    if spent := _spent(view):
        parts.append(f"eps {spent:.2f}")
    if left := _remaining(view):
        parts.append(left)
    trains = f" {found.trains}" if found.trains else ""
    return f"round {found.number}/{view.planned}{trains}: {', '.join(parts)}"


def _beginning(view: RunView) -> str:
    """What goes on before the first round."""
    if not view.workers and not view.joined:
        return "workers are starting"
    return f"sites read their records: {len(view.joined)} of {len(view.sites)} joined"


def _baseline(view: RunView) -> str:
    found = view.baseline
    return f"baseline {found.number} of {found.of}: {printable(found.title)}" if found else ""


def _score(view: RunView) -> tuple[int, str] | None:
    """The newest of the simulator's own scores, in words, and its round."""
    looks = [found for found in view.evaluations if found.view == "simulator"]
    for metric in METRICS:
        if looks and metric.key in looks[-1].pooled:
            score = looks[-1].pooled[metric.key]
            words = f"{looks[-1].split} {metric.title} {score:.3f}"
            return looks[-1].number, words.strip()
    return None


def _spent(view: RunView) -> float:
    return max((site.epsilon for site in view.sites.values() if site.epsilon), default=0.0)


def _times(view: RunView, now: float) -> str:
    """Time gone and, as far as it can be said, time to go."""
    gone = clock_time(now - view.started) if view.started is not None else clock_time(0)
    left = "" if view.finished else _remaining(view)
    return f"{gone}, {left}" if left else gone


def _remaining(view: RunView) -> str:
    """Time to go by the pace of the last rounds; head-only rounds are quicker than others."""
    current = view.current
    if current is None or view.done >= view.planned:
        return ""
    like = [found for found in view.finished_rounds if found.trains == current.trains]
    pace = [found.ended - found.started for found in like[-_RECENT:] if found.ended is not None]
    if not pace:
        return ""
    words = "at least" if current.trains == "head" else "about"
    return f"{words} {clock_time(mean(pace) * (view.planned - view.done))} left"


def _counts(sites: Mapping[str, SiteView], *, leaving_out: Collection[str]) -> str:
    """How many of the other sites are in which state."""
    others = Counter(site.state for name, site in sites.items() if name not in leaving_out)
    return "and " + ", ".join(f"{number} {state}" for state, number in sorted(others.items()))


def _explained(event: Mapping[str, Any]) -> str:
    """An error's code with its title, if this version knows it."""
    code = printable(str(event.get("code", "")))
    title = next((error.title for error in catalogue() if error.code == code), "")
    return f"{code} {title}".strip()

"""A run as it goes on: a live display in a terminal, plain lines anywhere else.

It is fed the same events that the run directory keeps, and looks at nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from silotune.errors import catalogue
from silotune.simulation.progress_state import RunState
from silotune.simulation.wording import DASH, clock_time, printable
from silotune.terminal import terminal

_MOST_SITES = 12
_STYLES = {"training": "cyan", "replied": "green", "failed": "red", "refused": "red"}


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
        self._state = RunState()
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
            self._state.add(event)
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
            self._print(self._state.round_line())
        self._round_to_print = False

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _line(self, event: Mapping[str, Any]) -> str:
        """What is worth a line of its own, in both forms; else nothing."""
        state, site, line = self._state, printable(str(event.get("site", ""))), ""
        match event.get("event"):
            case "run_started":
                line = f"{state.run}: {len(state.sites)} sites, {state.rounds} rounds"
            case "run_resumed":
                line = f"resumed after round {event['from_round']}"
            case "site_refused":
                line = f"{site} refused to join: {_explained(event)}"
            case "site_failed":
                line = f"{site} failed in round {event['round']}: {_explained(event)}"
            case "worker_ready" if not self._console.is_terminal:
                line = f"worker {event['worker'] + 1} ready after {event['seconds']:.1f} s"
            case "site_joined" if not self._console.is_terminal and len(state.sites) <= _MOST_SITES:
                line = f"{site} joined, {state.joined} of {len(state.sites)}"
            case "run_finished":
                line = f"{event['rounds']} rounds finished in {clock_time(event['seconds'])}"
            case "baseline_finished" if not self._console.is_terminal:
                line = f"{printable(state.baseline)}, after {clock_time(event['seconds'])}"
        return line

    # --- the live display ---

    def _headline(self) -> RenderableType:
        state = self._state
        left = f"round {state.number} of {state.rounds}" if state.number else _beginning(state)
        if state.phase and not state.finished:
            left += f", {'head only' if state.phase == 'head' else 'head and adapter'}"
        if state.baseline:
            left = state.baseline
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(Text(printable(left), style="bold"), Text(state.times(time.time())))
        return grid

    def _bar(self) -> RenderableType:
        done, of = self._state.share
        grid = Table.grid(expand=True)  # a bar by itself doesn't end its line
        grid.add_row(ProgressBar(total=max(of, 1), completed=done))
        return grid

    def _scores(self) -> RenderableType:
        state = self._state
        parts = [f"{state.score}, simulator's view" if state.score else "no score yet"]
        if state.epsilon:
            parts.append(
                f"\N{GREEK SMALL LETTER EPSILON} at most {max(state.epsilon.values()):.2f}"
            )
        return Text(";  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _sites(self) -> RenderableType:
        table = Table(box=None, expand=True, padding=(0, 1), show_edge=False)
        table.add_column("site", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("state", no_wrap=True, width=16)
        table.add_column("trained", no_wrap=True, justify="right", width=9)
        table.add_column("\N{GREEK SMALL LETTER EPSILON}", no_wrap=True, justify="right", width=7)
        state = self._state
        shown = sorted(state.sites, key=lambda name: not state.sites[name].troubled)[:_MOST_SITES]
        for name in [site for site in state.sites if site in shown]:
            site = state.sites[name]
            word = site.state.split(" ")[0]
            spent = state.epsilon.get(name)
            table.add_row(
                Text(printable(name)),
                Text(site.state, style=_STYLES.get(word, "")),
                f"{site.seconds:.2f} s" if site.seconds is not None else DASH,
                f"{spent:.2f}" if spent is not None else DASH,
            )
        if len(state.sites) > len(shown):
            table.add_row(Text(state.counts(leaving_out=shown)), "", "", "")
        return table


def _beginning(state: RunState) -> str:
    """What goes on before the first round."""
    if not state.workers and not state.joined:
        return "workers are starting"
    return f"sites read their records: {state.joined} of {len(state.sites)} joined"


def _explained(event: Mapping[str, Any]) -> str:
    """An error's code with its title, if this version knows it."""
    code = printable(str(event.get("code", "")))
    title = next((error.title for error in catalogue() if error.code == code), "")
    return f"{code} {title}".strip()

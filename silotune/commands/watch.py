"""`silotune admin watch`: a run in a terminal, redrawn in place, or line by line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from silotune.events.schema import in_a_line
from silotune.events.view import RunView
from silotune.server.admin.client import ControlClient

_STYLES = {"training": "cyan", "masked": "blue", "done": "green", "late": "yellow"}
_TROUBLE = {"failed": "red", "refused": "red", "rejected": "red", "silent": "red"}
_MOST_SITES = 40


def watch_live(client: ControlClient, run: str, *, console: Console) -> None:
    """Redraw the run at each event, until it is over."""
    view, note = RunView(run), ""

    def waiting(why: str) -> None:
        nonlocal note
        note = why
        live.update(picture(view, note=note, now=time.time()))

    with Live(console=console, refresh_per_second=4, transient=False) as live:
        for event in client.watch(run, waiting=waiting):
            note = ""
            view.extend([event])
            live.update(picture(view, note=note, now=time.time()))


def watch_lines(
    client: ControlClient, run: str, *, after: int, waiting: Callable[[str], None]
) -> None:
    """Print a line an event, until the run is over."""
    for event in client.watch(run, after=after, waiting=waiting):
        typer.echo(line(event))


def line(event: dict[str, Any]) -> str:
    """An event in one line."""
    return f"{event['id']:>6} {in_a_line(event, hidden=('run',))}"


def picture(view: RunView, *, note: str, now: float) -> RenderableType:
    """The run as it is now."""
    head = Text.assemble(
        (view.run, "bold"),
        f"   {view.state}",
        f"   round {view.done} of {view.planned}",
        f"   {_ago(now, view.last_time)}",
    )
    bar = ProgressBar(total=max(view.planned, 1), completed=view.done)
    table = Table(box=None, expand=True, padding=(0, 1))
    for column in ("site", "state", "rounds", "lost", "\N{GREEK SMALL LETTER EPSILON}"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for site in list(view.sites.values())[:_MOST_SITES]:
        style = _STYLES.get(site.state, "") or _TROUBLE.get(site.state, "")
        spent = "" if site.epsilon is None else f"{site.epsilon:.2f}"
        state = Text(f"{site.state} {site.code}".strip(), style=style)
        table.add_row(Text(site.name), state, str(site.replied), str(site.failed), spent)
    return Group(head, bar, table, Text(note, style="yellow"))


def _ago(now: float, then: float | None) -> str:
    return "" if then is None else f"last event {max(0, round(now - then))} s ago"

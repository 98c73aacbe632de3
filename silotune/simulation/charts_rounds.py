"""Charts of how the rounds went: who took part, what crossed the wire, where the time went.

Each function takes what was recorded and returns a drawn chart, or None where there is nothing to
draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from silotune.events.view import RoundView, RunView
from silotune.simulation.chart_parts import (
    frame,
    key,
    rounds_axis,
    site_names,
    steps,
    title,
)
from silotune.simulation.charting import (
    BLUE,
    GREEN,
    GRID,
    INK,
    PAPER,
    PURPLE,
    VERMILION,
    Canvas,
    Chart,
    render,
)
from silotune.simulation.figures import MOST_SITES
from silotune.simulation.wording import printable

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_TIMES = (("train", BLUE), ("wait", VERMILION), ("aggregate", GREEN), ("other", PURPLE))

# How thick a state is drawn in the timeline, in rows: a difference that does not need colour.
_THICKNESS = {VERMILION: 0.84, BLUE: 0.60, GRID: 0.20}


def bytes_chart(rounds: Sequence[RoundView]) -> Chart | None:
    """Bytes to and from the sites in each round, a panel each, one scale."""
    largest = max((max(found.bytes_up, found.bytes_down) for found in rounds), default=0)
    if not largest:
        return None
    divisor, unit = next((d, name) for d, name in _UNITS if largest >= d or name == "bytes")
    up = [found.bytes_up / divisor for found in rounds]
    down = [found.bytes_down / divisor for found in rounds]
    numbers = [found.number for found in rounds]

    def draw(canvas: Canvas) -> Figure:
        figure = Figure(figsize=(canvas.width, 2.9), layout="constrained")
        panels: Any = figure.subplots(2, 1, sharex=True)
        directions = (("to the sites", down, GREEN), ("from the sites", up, BLUE))
        for axes, (words, values, colour) in zip(panels, directions, strict=True):
            xs, ys = steps(numbers, values)
            axes.fill_between(xs, 0, ys, color=colour, alpha=0.2, linewidth=0)
            axes.plot(xs, ys, color=colour, linewidth=1.4)
            axes.set_ylim(0, 1.1 * largest / divisor)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            title(axes, f"{unit} {words}, all sites together")
        rounds_axis(panels[-1], first=numbers[0], last=numbers[-1])
        return figure

    description = (
        f"Bytes a round: at most {max(down):.3g} {unit} to the sites and "
        f"{max(up):.3g} {unit} from them"
    )
    return render("bytes", draw, description=description)


def time_chart(rounds: Sequence[RoundView], workers: int) -> Chart | None:
    """Seconds of each round, split into training, waiting, aggregating and the rest."""
    if not rounds:
        return None
    splits = [_split(found, workers) for found in rounds]
    totals = [sum(split[index] for split in splits) for index in range(len(_TIMES))]
    told = ", ".join(f"{name} {s:.1f} s" for (name, _), s in zip(_TIMES, totals, strict=True))
    numbers = [found.number for found in rounds]
    return render(
        "time",
        partial(_draw_time, numbers=numbers, splits=splits),
        description=f"Time by round; in all: {told}",
    )


def _draw_time(
    canvas: Canvas, *, numbers: Sequence[int], splits: Sequence[tuple[float, ...]]
) -> Figure:
    figure, axes = frame(canvas, height=2.7)
    floor = [0.0] * len(numbers)
    for index, (_, colour) in enumerate(_TIMES):
        top = [low + split[index] for low, split in zip(floor, splits, strict=True)]
        xs, lows = steps(numbers, floor)
        axes.fill_between(xs, lows, steps(numbers, top)[1], color=colour, linewidth=0)
        floor = top
    axes.set_ylim(0, 1.08 * max(floor) or 1.0)
    axes.yaxis.set_major_formatter("{x:g} s")
    key(axes, _TIMES, canvas)
    rounds_axis(axes, first=numbers[0], last=numbers[-1])
    return figure


def _split(found: RoundView, workers: int) -> tuple[float, float, float, float]:
    waited, aggregate = found.wait_seconds or 0.0, found.aggregate_seconds or 0.0
    train = min((found.train_seconds or 0.0) / workers, waited)
    rest = (found.seconds or 0.0) - waited - aggregate
    return train, waited - train, aggregate, max(0.0, rest)


def timeline_chart(history: RunView, sites: Sequence[str]) -> Chart | None:
    """Who took part in which round: a row a site, with failures, refusals and resumes marked."""
    settled = [found for found in history.every_round if found.done or found.failed]
    if not settled:
        return None
    refused = sum(trouble.round is None for trouble in history.troubles)
    description = (
        f"{len(sites)} sites over {len(settled)} rounds: {refused} refused to join, "
        f"{len(history.troubles) - refused} failed replies, resumed {len(history.resumed_at)} times"
    )
    shown = in_trouble_first(history, sites)
    draw = partial(_draw_timeline, history=history, rounds=settled, sites=shown)
    return render("timeline", draw, description=description)


def in_trouble_first(history: RunView, sites: Sequence[str]) -> list[str]:
    """Every site, or where they are too many for a chart first those that refused or failed."""
    if len(sites) <= MOST_SITES:
        return list(sites)
    troubled = {trouble.site for trouble in history.troubles}
    return sorted(sites, key=lambda site: site not in troubled)[:MOST_SITES]


def _draw_timeline(
    canvas: Canvas, *, history: RunView, rounds: Sequence[RoundView], sites: Sequence[str]
) -> Figure:
    figure, axes = frame(canvas, height=0.85 + (0.48 if canvas.narrow else 0.23) * len(sites))
    refused = {found.site: found.code for found in history.troubles if found.round is None}
    for row, site in enumerate(sites):
        # On a phone the upper part of a row is its name.
        _timeline_row(axes, row, site, rounds, scale=0.6 if canvas.narrow else 1.0)
        if site in refused:
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
            axes.text(0.6, row, f"refused, {refused[site]}", va="center", bbox=box)
    for number in history.resumed_at:
        axes.axvline(number + 0.5, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    names = [(float(row), printable(site)) for row, site in enumerate(sites)]
    site_names(axes, names, canvas, head=0.36)
    axes.set_ylim(len(sites) - 0.5, -1.05 if canvas.narrow else -0.5)
    axes.grid(visible=False)
    key(axes, [("replied", BLUE), ("failed", VERMILION), ("not in the round", GRID)], canvas)
    rounds_axis(axes, first=1, last=max(rounds[-1].number, history.planned))
    if history.resumed_at:
        axes.set_xlabel("round (dotted line: resumed)")
    return figure


def _timeline_row(
    axes: Any, row: int, site: str, rounds: Sequence[RoundView], *, scale: float
) -> None:
    def state(found: RoundView) -> str:
        if site in found.failed:
            return VERMILION
        return BLUE if site in found.replied else GRID

    for colour, group in groupby(rounds, key=state):
        members = [found.number for found in group]
        thick = _THICKNESS[colour] * scale
        corner = (members[0] - 0.5, row - thick / 2)
        width = members[-1] - members[0] + 1
        axes.add_patch(Rectangle(corner, width, thick, facecolor=colour, linewidth=0))

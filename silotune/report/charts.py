"""Charts of how the rounds went: who took part, what crossed the wire, where the time went.

Each function takes what was recorded and returns a drawn chart, or None where there is nothing to
draw.

Charts of what was learned and what it cost in privacy.

Each function takes what was recorded and returns a drawn chart, or None where there is nothing to
draw. Axes carry units, marks carry their own labels, and colour is never the only difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from silotune.events.view import Evaluation, RoundView, RunView
from silotune.report.charting import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    PAPER,
    PURPLE,
    VERMILION,
    Canvas,
    Chart,
    frame,
    key,
    note,
    render,
    rounds_axis,
    site_names,
    steps,
    title,
)
from silotune.report.figures import MOST_SITES, Curves, Metric, SiteScores
from silotune.report.verdict import printable

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


_BARS = (
    ("own model", VERMILION, "own"),
    ("federated", BLUE, "federated"),
    ("own head", PURPLE, "personal"),
    ("pooled", GREEN, "pooled"),
)
_WORSE = "\N{BLACK DOWN-POINTING TRIANGLE}"


def learning_chart(
    evaluations: Sequence[Evaluation], metric: Metric, rounds: Sequence[RoundView]
) -> Chart | None:
    """Score after each round that was evaluated, and the range over the sites.

    `evaluations` are of one view and one split.
    """
    points = [found for found in evaluations if metric.key in found.pooled]
    if not points:
        return None
    scores = [found.pooled[metric.key] for found in points]
    best = max(scores) if metric.higher_is_better else min(scores)
    description = (
        f"{metric.title} by round: {scores[0]:.3f} after round {points[0].number}, "
        f"{scores[-1]:.3f} after round {points[-1].number}, best {best:.3f}"
    )
    draw = partial(_draw_learning, points=points, metric=metric, rounds=rounds)
    return render("learning", draw, description=description)


def _draw_learning(
    canvas: Canvas, *, points: Sequence[Evaluation], metric: Metric, rounds: Sequence[RoundView]
) -> Figure:
    figure, axes = frame(canvas, height=3.2 if canvas.narrow else 2.9)
    _mark_phases(axes, rounds)
    ranges = [
        (found.number, [s[metric.key] for s in found.sites.values() if metric.key in s])
        for found in points
    ]
    ranges = [(number, scores) for number, scores in ranges if len(scores) > 1]
    if ranges:
        at = [number for number, _ in ranges]
        low, high = ([end(scores) for _, scores in ranges] for end in (min, max))
        axes.fill_between(at, low, high, color=BLUE, alpha=0.15, linewidth=0)
        # Words go where a curve of this direction leaves room: under a rising one, over a falling.
        place = 3 * len(at) // 4
        edge, rise = (low, -4) if metric.higher_is_better else (high, 4)
        note(axes, at[place], edge[place], "lowest to highest site", rise=rise)
    xs, ys = [found.number for found in points], [found.pooled[metric.key] for found in points]
    axes.plot(xs, ys, color=BLUE, marker="o" if len(xs) < 30 else "", markersize=3.5)
    axes.annotate(
        f"all sites {ys[-1]:.3f}",
        (xs[-1], ys[-1]),
        textcoords="offset points",
        xytext=(-4, 7 if metric.higher_is_better else -7),
        ha="right",
        va="bottom" if metric.higher_is_better else "top",
        color=INK,
        weight="bold",
    )
    title(axes, f"{metric.title} on held-out data")
    axes.margins(y=0.14)
    rounds_axis(axes, first=min(1, xs[0]), last=max(xs))
    return figure


def _mark_phases(axes: Any, rounds: Sequence[RoundView]) -> None:
    """A line where head-only rounds end and the adapter joins."""
    head = [found.number for found in rounds if found.trains == "head"]
    if not head or len(head) == len(rounds):
        return
    axes.axvline(head[-1] + 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for text, side, offset in (("head only", "right", -4), ("head and adapter", "left", 4)):
        axes.annotate(
            text,
            (head[-1] + 0.5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(offset, 4),
            ha=side,
            color=MUTED,
        )


def site_chart(rows: Sequence[SiteScores], metric: Metric) -> Chart | None:
    """Bars a site: own model, federated, pooled, on that site's own held-out data."""
    kinds = [kind for kind in _BARS if any(metric.key in getattr(row, kind[2]) for row in rows)]
    if not kinds:
        return None
    shown = most_telling(rows)
    told = "; ".join(
        f"{printable(row.site)}: " + ", ".join(f"{name} {value:.3f}" for name, value in values)
        for row in shown
        if (values := [(k[0], v) for k in kinds if (v := _value(row, k[2], metric)) is not None])
    )
    draw = partial(_draw_sites, rows=shown, kinds=kinds, metric=metric)
    return render("sites", draw, description=f"{metric.title} by site. {told}")


def most_telling(rows: Sequence[SiteScores]) -> list[SiteScores]:
    """All rows, or where there are too many for a chart those with the smallest and largest gain."""
    if len(rows) <= MOST_SITES:
        return list(rows)
    ordered = sorted(rows, key=lambda row: row.gain or 0.0)
    half = MOST_SITES // 2
    return [*ordered[:half], *ordered[-half:]]


def _value(row: SiteScores, kind: str, metric: Metric) -> float | None:
    scores: Mapping[str, float] = getattr(row, kind)
    return scores.get(metric.key)


def _draw_sites(
    canvas: Canvas,
    *,
    rows: Sequence[SiteScores],
    kinds: Sequence[tuple[str, str, str]],
    metric: Metric,
) -> Figure:
    gap = 1.5 if canvas.narrow else 0.7  # in bars; a phone has the site's name in it
    step = len(kinds) + gap
    inches = 0.21 if canvas.narrow else 0.165
    figure, axes = frame(canvas, height=0.75 + inches * step * len(rows))
    for place, row in enumerate(rows):
        for offset, (_, colour, kind) in enumerate(kinds):
            value = _value(row, kind, metric)
            if value is not None:
                worse = kind == "federated" and row.gain is not None and row.gain < 0
                _bar(axes, place * step + offset, value, colour, worse=worse, canvas=canvas)
    middle = (len(kinds) - 1) / 2
    names = [(place * step + middle, _site_label(row)) for place, row in enumerate(rows)]
    site_names(axes, names, canvas, head=len(kinds) / 2)
    axes.set_ylim(step * len(rows) - gap - 0.4, -2.0 if canvas.narrow else -0.6)
    axes.set_xlim(0, 1.14 * axes.dataLim.x1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{metric.title} on the site's own held-out data")
    key(axes, [(name, colour) for name, colour, _ in kinds], canvas)
    return figure


def _bar(axes: Any, at: float, value: float, colour: str, *, worse: bool, canvas: Canvas) -> None:
    axes.barh(at, value, height=0.86, color=colour)
    axes.annotate(
        f"{value:.3f} {_WORSE}" if worse else f"{value:.3f}",
        (value, at),
        textcoords="offset points",
        xytext=(3, 0),
        va="center",
        size=canvas.font - 1.5,
    )


def _site_label(row: SiteScores) -> str:
    name = printable(row.site, most=40)
    return name if row.n is None else f"{name} (n = {row.n:,})"


def epsilon_chart(curves: Curves, planned: float | None) -> Chart | None:
    """Epsilon spent by each site after each round, under the line of the plan's."""
    if not curves:
        return None
    ends = sorted(curve[-1][1] for curve in curves.values())
    last = max(curve[-1][0] for curve in curves.values())
    description = (
        f"Epsilon spent by {len(curves)} sites over {last} rounds: from {ends[0]:.2f} to "
        f"{ends[-1]:.2f} at the end" + (f", the plan's {planned:g}" if planned is not None else "")
    )
    return render(
        "epsilon", partial(_draw_epsilon, curves=curves, planned=planned), description=description
    )


def _draw_epsilon(canvas: Canvas, *, curves: Curves, planned: float | None) -> Figure:
    figure, axes = frame(canvas, height=3.0 if canvas.narrow else 2.7)
    for curve in curves.values():
        axes.plot([n for n, _ in curve], [e for _, e in curve], color=BLUE, linewidth=1.1)
    ends = sorted(curve[-1][1] for curve in curves.values())
    last = max(curve[-1][0] for curve in curves.values())
    top = max(planned or 0.0, ends[-1])
    if planned is not None:
        axes.axhline(planned, color=VERMILION, linewidth=1.4, linestyle=(0, (5, 3)))
        note(axes, 0.4, planned, f"plan: \N{GREEK SMALL LETTER EPSILON} = {planned:g}", ha="left")
    who = f"{len(curves)} sites" if len(curves) > 1 else printable(next(iter(curves)), most=30)
    spent = [f"{end:.2f}" for end in dict.fromkeys((ends[0], ends[-1]))]
    note(axes, last, ends[0], f"{who}: {' to '.join(spent)}", rise=-16)
    axes.set_ylim(0, 1.15 * top)
    title(axes, "\N{GREEK SMALL LETTER EPSILON} spent so far")
    rounds_axis(axes, first=1, last=last)
    return figure

"""Charts of what was learned and what it cost in privacy.

Each function takes what was recorded and returns a drawn chart, or None where there is nothing to
draw. Axes carry units, marks carry their own labels, and colour is never the only difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from silotune.events.view import Evaluation, RoundView
from silotune.simulation.chart_parts import (
    frame,
    key,
    note,
    rounds_axis,
    site_names,
    title,
)
from silotune.simulation.charting import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    PURPLE,
    VERMILION,
    Canvas,
    Chart,
    render,
)
from silotune.simulation.figures import MOST_SITES, Curves, Metric, SiteRow
from silotune.simulation.wording import printable

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


def site_chart(rows: Sequence[SiteRow], metric: Metric) -> Chart | None:
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


def most_telling(rows: Sequence[SiteRow]) -> list[SiteRow]:
    """All rows, or where there are too many for a chart those with the smallest and largest gain."""
    if len(rows) <= MOST_SITES:
        return list(rows)
    ordered = sorted(rows, key=lambda row: row.gain or 0.0)
    half = MOST_SITES // 2
    return [*ordered[:half], *ordered[-half:]]


def _value(row: SiteRow, kind: str, metric: Metric) -> float | None:
    scores: Mapping[str, float] = getattr(row, kind)
    return scores.get(metric.key)


def _draw_sites(
    canvas: Canvas,
    *,
    rows: Sequence[SiteRow],
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


def _site_label(row: SiteRow) -> str:
    name = printable(row.site, most=40)
    return name if row.n is None else f"{name} (n = {row.n:,})"


def epsilon_chart(curves: Curves, budget: float | None) -> Chart | None:
    """Epsilon spent by each site after each round, under the budget's line."""
    if not curves:
        return None
    ends = sorted(curve[-1][1] for curve in curves.values())
    last = max(curve[-1][0] for curve in curves.values())
    description = (
        f"Epsilon spent by {len(curves)} sites over {last} rounds: from {ends[0]:.2f} to "
        f"{ends[-1]:.2f} at the end" + (f", budget {budget:g}" if budget is not None else "")
    )
    return render(
        "epsilon", partial(_draw_epsilon, curves=curves, budget=budget), description=description
    )


def _draw_epsilon(canvas: Canvas, *, curves: Curves, budget: float | None) -> Figure:
    figure, axes = frame(canvas, height=3.0 if canvas.narrow else 2.7)
    for curve in curves.values():
        axes.plot([n for n, _ in curve], [e for _, e in curve], color=BLUE, linewidth=1.1)
    ends = sorted(curve[-1][1] for curve in curves.values())
    last = max(curve[-1][0] for curve in curves.values())
    top = max(budget or 0.0, ends[-1])
    if budget is not None:
        axes.axhline(budget, color=VERMILION, linewidth=1.4, linestyle=(0, (5, 3)))
        note(axes, 0.4, budget, f"budget \N{GREEK SMALL LETTER EPSILON} = {budget:g}", ha="left")
    who = f"{len(curves)} sites" if len(curves) > 1 else printable(next(iter(curves)), most=30)
    spent = [f"{end:.2f}" for end in dict.fromkeys((ends[0], ends[-1]))]
    note(axes, last, ends[0], f"{who}: {' to '.join(spent)}", rise=-16)
    axes.set_ylim(0, 1.15 * top)
    title(axes, "\N{GREEK SMALL LETTER EPSILON} spent so far")
    rounds_axis(axes, first=1, last=last)
    return figure

"""Pictures as small SVGs without text: words stand beside them in HTML, so nothing is ever clipped.

Each SVG fills whatever box the style sheet gives it (`preserveAspectRatio="none"`); lines keep their
width by `vector-effect`. No style attribute is used, so that the strictest content policy holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from silotune.events.view import RunView

Points = Sequence[tuple[float, float]]

_HEIGHT = 100.0


@dataclass(frozen=True)
class Lane:
    """A site's rounds as one strip."""

    site: str
    state: str
    code: str
    svg: Markup


@dataclass(frozen=True)
class PageChart:
    """A picture, the words at its axes (from top to bottom, from left to right), and its legend."""

    title: str
    svg: Markup
    y: tuple[str, ...]
    x: tuple[str, ...]
    legend: tuple[tuple[str, str], ...] = ()


def lanes(view: RunView, *, planned: int) -> list[Lane]:
    """One strip a site; a cell a round, coloured by the phase that the site came to."""
    numbers = sorted(view.rounds)
    width = max([planned, *numbers, 1])
    paths: dict[str, dict[str, list[str]]] = {name: {} for name in view.sites}
    for number in numbers:
        for name, cell in view.rounds[number].cells.items():
            paths.setdefault(name, {}).setdefault(cell.phase, []).append(
                f"M{number - 1} 0h.86v1h-.86z"
            )
    found = []
    for name, by_phase in paths.items():
        drawn = "".join(
            f'<path class="p-{escape(phase)}" d="{"".join(cells)}"/>'
            for phase, cells in by_phase.items()
        )
        site = view.sites.get(name)
        label = escape(
            f"{name}: {site.replied} rounds counted, {site.failed} lost" if site else name
        )
        svg = (
            f'<svg class="lane" viewBox="0 0 {width} 1" preserveAspectRatio="none" role="img" '
            f'aria-label="{label}"><rect class="rail" width="{width}" height="1"/>{drawn}</svg>'
        )
        # Numbers and escaped names only.
        markup = Markup(svg)  # noqa: S704
        found.append(Lane(name, site.state if site else "", site.code if site else "", markup))
    return found


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    last: float,
    limit: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> PageChart | None:
    """Curves over rounds 1 to `last`; `limit` is a dashed line with its name. None without points."""
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    if not values:
        return None
    values += [limit[1]] if limit else []
    low = 0.0 if from_zero else min(values)
    high = max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    low, high = (0.0 if from_zero else low - 0.05 * (high - low)), high + 0.05 * (high - low)

    def place(number: float, value: float) -> str:
        x = 1000 * (number - 1) / max(last - 1, 1)
        return f"{x:.1f} {_HEIGHT * (high - value) / (high - low):.2f}"

    drawn = _grid()
    for index, points in enumerate(series.values()):
        inside = [place(n, v) for n, v in points if math.isfinite(v)]
        if len(inside) == 1:
            inside.append(inside[0])
        if inside:
            drawn += f'<path class="line c{index % 8}" d="M{" L".join(inside)}"/>'
    if limit:
        drawn += f'<path class="limit" d="M{place(1, limit[1])} L{place(max(last, 2), limit[1])}"/>'
    legend = [(name, f"c{index % 8}") for index, name in enumerate(series)]
    if len(legend) > 8:
        legend = [(f"{len(legend)} sites", "c0")]
    if limit:
        legend.append((limit[0], "limit"))
    middle = (high + low) / 2
    y = tuple(_figure(value) for value in (high, middle, low))
    return PageChart(title, _svg(title, drawn), y, _rounds(last), tuple(legend))


def stacked_bars(title: str, parts: Mapping[str, Points], *, last: float) -> PageChart | None:
    """Bars over rounds, one part on top of the other. None without any."""
    totals: dict[float, float] = {}
    for points in parts.values():
        for number, value in points:
            totals[number] = totals.get(number, 0.0) + value
    high = max(totals.values(), default=0.0)
    if high <= 0:
        return None
    bottom = dict.fromkeys(totals, 0.0)
    drawn, step = _grid(), 1000 / max(last, 1)
    for index, points in enumerate(parts.values()):
        path = []
        for number, value in points:
            top = _HEIGHT * (1 - (bottom[number] + value) / high)
            height = _HEIGHT * value / high
            path.append(
                f"M{(number - 1) * step:.1f} {top:.2f}h{step * 0.8:.2f}v{height:.2f}h-{step * 0.8:.2f}z"
            )
            bottom[number] += value
        drawn += f'<path class="bar c{index}" d="{"".join(path)}"/>'
    legend = tuple((name, f"c{index}") for index, name in enumerate(parts))
    return PageChart(
        title, _svg(title, drawn), (_figure(high), _figure(high / 2), "0"), _rounds(last), legend
    )


def _grid() -> str:
    return "".join(f'<path class="grid" d="M0 {y} H1000"/>' for y in (0, 50, 100))


def _svg(title: str, drawn: str) -> Markup:
    # Numbers, our own class names and an escaped title only.
    return Markup(  # noqa: S704
        f'<svg class="chart" viewBox="0 0 1000 {_HEIGHT:.0f}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)}">{drawn}</svg>'
    )


def _rounds(last: float) -> tuple[str, ...]:
    end = max(int(last), 1)
    return ("1", f"{(end + 1) // 2}", f"round {end}") if end > 2 else ("1", f"round {end}")


def _figure(value: float) -> str:
    if abs(value) >= 1000:
        for divisor, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= divisor:
                return f"{value / divisor:.3g}{sign}"
    return f"{value:.3g}"

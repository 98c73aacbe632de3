"""What the run page and the comparison show: a run's view turned into words, rows and pictures.

Pictures are small SVGs without text: words stand beside them in HTML, so nothing is ever clipped. Each
fills whatever box the style sheet gives it (`preserveAspectRatio="none"`); lines keep their width by
`vector-effect`. No style attribute is used, so that the strictest content policy holds.

Epsilon of each site is as the events tell it, else from what the sites declared: a coordinator is told
each site's sampling rate and noise, which are public, and counts the rounds that arrived. The privacy
accountant takes seconds for a new kind of site, so it works in a thread, and a page shows what is known
so far.
"""

from __future__ import annotations

import bisect
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from silotune.dashboard.counted import DASH, counted, voted
from silotune.events.source import RunFacts
from silotune.events.view import OPEN_PHASES, UNLIKE, RunView, Trouble, TroubleLine, by_error
from silotune.plan.plan import dotted, stored_bands
from silotune.plan.tasks import METRICS
from silotune.terminal import octets

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
    return PageChart(title, _svg(title, drawn), y, _ends(last), tuple(legend))


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
        title, _svg(title, drawn), (_figure(high), _figure(high / 2), "0"), _ends(last), legend
    )


def _grid() -> str:
    return "".join(f'<path class="grid" d="M0 {y} H1000"/>' for y in (0, 50, 100))


def _svg(title: str, drawn: str) -> Markup:
    # Numbers, our own class names and an escaped title only.
    return Markup(  # noqa: S704
        f'<svg class="chart" viewBox="0 0 1000 {_HEIGHT:.0f}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)}">{drawn}</svg>'
    )


def _ends(last: float) -> tuple[str, ...]:
    end = max(int(last), 1)
    return ("1", f"{(end + 1) // 2}", f"round {end}") if end > 2 else ("1", f"round {end}")


def _figure(value: float) -> str:
    if abs(value) >= 1000:
        for divisor, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= divisor:
                return f"{value / divisor:.3g}{sign}"
    return f"{value:.3g}"


_POINTS = 16

Curve = list[tuple[int, float]]
Key = tuple[float, float, float, int, int]


class Spending:
    """Epsilon for pages and metrics, remembered by kind of site."""

    def __init__(self) -> None:
        self._curves: dict[Key, Curve] = {}
        self._wanted: set[Key] = set()
        self._lock = threading.Lock()

    def curves(self, facts: RunFacts, view: RunView, *, wait: bool = False) -> dict[str, Curve]:
        """Pairs of a round and what is spent after it, by site; call it under the view's lock.

        What is not known yet is left out and worked out in a thread, unless you `wait`.
        """
        if view.epsilon:
            told: dict[str, Curve] = {}
            for number, spent in view.epsilon:
                for who, value in spent.items():
                    told.setdefault(who, []).append((number, value))
            return told
        found: dict[str, Curve] = {}
        for name, site in view.sites.items():
            curve = self._curve(facts, site.mechanism, wait=wait) if site.mechanism else None
            if curve:
                found[name] = self._counted(name, view, curve, bands=stored_bands(facts.plan))
        return {name: points for name, points in found.items() if points}

    def spent(self, facts: RunFacts, view: RunView) -> dict[str, float]:
        """The newest value of each curve."""
        return {site: curve[-1][1] for site, curve in self.curves(facts, view).items()}

    @staticmethod
    def _counted(name: str, view: RunView, curve: Curve, *, bands: int) -> Curve:
        """What the rounds that arrived cost; between two points of the curve, the later one."""
        steps, charged, points = [number for number, _ in curve], set[int](), Curve()
        for found in view.finished_rounds:
            if name in found.replied:  # also in a void round: what was sent was charged
                charged.add((found.number - 1) // bands)
            if charged:
                place = min(bisect.bisect_left(steps, len(charged)), len(curve) - 1)
                points.append((found.number, curve[place][1]))
        return points

    def _curve(
        self, facts: RunFacts, mechanism: tuple[float, float], *, wait: bool
    ) -> Curve | None:
        delta = (facts.plan.get("privacy") or {}).get("delta")
        if not delta or not facts.rounds:
            return None
        steps = int((facts.plan.get("rounds") or {}).get("local_steps") or 1)
        key = (*mechanism, float(delta), -(-facts.rounds // stored_bands(facts.plan)), steps)
        if wait and key not in self._curves:
            self._compute(key)
        with self._lock:
            if key in self._curves:
                return self._curves[key]
            if key not in self._wanted:
                self._wanted.add(key)
                threading.Thread(target=self._compute, args=(key,), daemon=True).start()
        return None

    def _compute(self, key: Key) -> None:
        # Here, because it takes seconds to import.
        from silotune.privacy.accounting import epsilon_curve
        from silotune.privacy.events import step_event

        rate, sigma, delta, rounds, steps = key
        event = step_event(rate=rate, sigma=sigma, steps=steps)
        points = epsilon_curve(event, rounds=rounds, points=_POINTS, delta=delta)
        with self._lock:
            self._curves[key] = list(points)


def left(planned: float | None, spent: Mapping[str, float]) -> dict[str, float]:
    """What each site has above what it spent, of the plan's epsilon."""
    return {} if planned is None else {s: max(0.0, planned - value) for s, value in spent.items()}


PHASES = (*("training", "masked", "unmasked", "done"), *("late", "dropped", "failed"))
"""Phases in the order of the legend."""


@dataclass(frozen=True)
class SiteLine:
    """A site's row in the run's table."""

    name: str
    state: str
    code: str
    replied: int
    failed: int
    epsilon: str
    left: str
    share: float | None
    over: bool
    heard: str


@dataclass(frozen=True)
class Score:
    """The newest score on one kind of data, and who looked."""

    value: str
    metric: str
    data: str
    look: str


@dataclass(frozen=True)
class RunRow:
    """A run in the list of runs."""

    facts: RunFacts
    mode: str
    epsilon: str
    score: Score | None


@dataclass(frozen=True)
class RunPage:
    """Everything that the run page places and that changes while it is open."""

    facts: RunFacts
    state: str
    done: int
    planned: int
    running: str
    scores: tuple[Score, ...]
    epsilon: str
    traffic: str
    late: tuple[str, ...]
    unlike: tuple[str, ...]
    lanes: list[Lane]
    phases: tuple[str, ...]
    charts: tuple[PageChart, ...]
    sites: list[SiteLine]
    troubles: list[TroubleLine]
    counted: list[tuple[str, list[tuple[str, str, str]]]]
    last_id: int


def run_page(facts: RunFacts, view: RunView, curves: Mapping[str, Curve]) -> RunPage:
    """The page's content; call it under the view's lock."""
    planned = facts.rounds or view.planned
    spent = {site: curve[-1][1] for site, curve in curves.items()}
    used = {cell.phase for found in view.rounds.values() for cell in found.cells.values()}
    current = view.current
    return RunPage(
        facts=facts,
        # A run directory does not say that its process died; a store says what was decided.
        state=facts.state,
        done=view.done,
        planned=planned,
        running=_running(view),
        scores=_scores(view),
        epsilon=f"{max(spent.values()):.2f}" if spent else DASH,
        traffic=octets(sum(r.bytes_up + r.bytes_down for r in view.rounds.values())),
        late=tuple(n for n, c in current.cells.items() if c.phase == "late") if current else (),
        unlike=_unlike(view),
        lanes=lanes(view, planned=planned),
        phases=tuple(phase for phase in PHASES if phase in used),
        charts=_charts(facts, view, curves, planned),
        sites=_sites(facts, view, spent),
        troubles=trouble_lines(view.troubles),
        counted=[*counted(view.found or {}), *voted(view.found or {})],
        last_id=view.last_id,
    )


def learning_curves(view: RunView) -> dict[str, list[tuple[int, float]]]:
    """Curves of the metric that decides, by what was looked at."""
    found = {}
    kinds = dict.fromkeys((e.view, e.split) for e in view.evaluations)
    for metric in METRICS:
        for look, split in kinds:
            curve = view.curve(metric.key, view=look, split=split)
            if curve:
                words = "simulator's look" if look == "simulator" else "released by the sites"
                found[f"{metric.title}, {split or 'held-out'}, {words}"] = curve
        if found:
            break
    return found


def trouble_lines(troubles: Sequence[Trouble]) -> list[TroubleLine]:
    """Troubles of one site and code together, newest first, explained by the catalogue."""
    found = [
        TroubleLine(
            site=trouble.site,
            code=trouble.code or "no code",
            title=trouble.title,
            cause=trouble.cause or "The site may run another version of silotune.",
            remedy=trouble.remedy,
            when=_rounds(trouble.rounds) if trouble.rounds else "refused to join",
            detail=next(reversed(trouble.details), "")[:300],
        )
        for trouble in by_error(troubles)
    ]
    return sorted(found, key=lambda line: line.site)


def clock(seconds: float | None) -> str:
    """A time for people."""
    return (
        DASH if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    )


def ago(seconds: float | None) -> str:
    """How long ago, roughly."""
    if seconds is None:
        return "never"
    gone = max(0.0, time.time() - seconds)
    for size, word in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if gone >= size:
            return f"{gone / size:.0f} {word} ago"
    return f"{gone:.0f} s ago"


def _rounds(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", \N{HORIZONTAL ELLIPSIS}" * (len(numbers) > 8))
    return f"in round {shown}" if len(numbers) == 1 else f"in {len(numbers)} rounds: {shown}"


def _running(view: RunView) -> str:
    """What goes on, in a few words."""
    current = view.current
    if view.code:
        return f"{view.code} {view.detail}".strip()
    if current is None or current.done:
        return ""
    waiting = sum(cell.phase in OPEN_PHASES for cell in current.cells.values())
    sites = "site" if waiting == 1 else "sites"
    return f"round {current.number}: waiting for {waiting} of {len(current.cells)} {sites}"


def _unlike(view: RunView) -> tuple[str, ...]:
    """Sites whose update of the newest finished round was unlike the others', with their scores."""
    cells = view.finished_rounds[-1].cells if view.finished_rounds else {}
    return tuple(
        f"{name} ({cell.anomaly:.1f})"
        for name, cell in cells.items()
        if cell.anomaly is not None and cell.anomaly > UNLIKE
    )


def _scores(view: RunView) -> tuple[Score, ...]:
    """The newest score on each kind of data, test data first: they are never one number."""
    found = [
        Score(f"{curve[-1][1]:.3f}", *title.split(", ", 2))
        for title, curve in learning_curves(view).items()
    ]
    return tuple(sorted(found, key=lambda score: score.data != "test"))


def run_row(facts: RunFacts, view: RunView, spent: Mapping[str, float]) -> RunRow:
    """What the list of runs says of one; call it under the view's lock."""
    scores = _scores(view)
    epsilon = (
        f"{max(spent.values()):.2f} of {facts.planned_epsilon:g}"
        if spent and facts.planned_epsilon
        else DASH
    )
    return RunRow(facts, _mode(facts.plan), epsilon, scores[0] if scores else None)


def _mode(plan: Mapping[str, Any]) -> str:
    """What tells runs of one plan apart: the protection, the aggregation, and a seed."""
    privacy, aggregation = plan.get("privacy") or {}, plan.get("aggregation") or {}
    mode = privacy.get("mode", "none")
    words = ["no privacy" if mode == "none" else f"{mode} level", aggregation.get("strategy")]
    words += ["secure"] if aggregation.get("secure") else []
    words += ["shared noise"] if privacy.get("noise") == "shared" else []
    words += ["seeded"] if (plan.get("plan") or {}).get("seed") is not None else []
    return ", ".join(word for word in words if word)


def _sites(facts: RunFacts, view: RunView, spent: Mapping[str, float]) -> list[SiteLine]:
    remains = left(facts.planned_epsilon, spent)
    return [
        SiteLine(
            name=site.name,
            state=site.state,
            code=site.code,
            replied=site.replied,
            failed=site.failed,
            epsilon=f"{spent[site.name]:.2f}" if site.name in spent else DASH,
            left=f"{remains[site.name]:.2f}" if site.name in remains else DASH,
            share=(
                min(1.0, spent[site.name] / facts.planned_epsilon)
                if facts.planned_epsilon and site.name in spent
                else None
            ),
            # What the plan grants is there to be used: only more than that is wrong.
            over=bool(facts.planned_epsilon)
            and spent.get(site.name, 0.0) > 1.001 * (facts.planned_epsilon or 0.0),
            heard=ago(site.heard),
        )
        for site in view.sites.values()
    ]


def _charts(
    facts: RunFacts, view: RunView, curves: Mapping[str, Curve], planned: int
) -> tuple[PageChart, ...]:
    last = max(planned, view.done, 1)
    rounds = view.finished_rounds
    limit = ("the plan's epsilon", facts.planned_epsilon) if facts.planned_epsilon else None
    aggregate = [(r.number, r.aggregate_seconds or 0.0) for r in rounds]
    waited = [(r.number, r.wait_seconds or 0.0) for r in rounds]
    drawn = (
        line_chart("Learning curve", learning_curves(view), last=last),
        line_chart(
            "\N{GREEK SMALL LETTER EPSILON} spent by each site",
            curves,
            last=last,
            limit=limit,
            from_zero=True,
        ),
        stacked_bars(
            "Seconds a round", {"waiting for sites": waited, "aggregating": aggregate}, last=last
        ),
        stacked_bars(
            "Bytes a round",
            {
                "to the sites": [(r.number, float(r.bytes_down)) for r in rounds],
                "from the sites": [(r.number, float(r.bytes_up)) for r in rounds],
            },
            last=last,
        ),
    )
    return tuple(chart for chart in drawn if chart is not None)


def compared(pages: Sequence[RunPage], views: Mapping[str, RunView]) -> dict[str, Any]:
    """Several runs side by side: figures, settings that differ, curves in one picture."""
    flat = [dotted(page.facts.plan) for page in pages]
    keys = sorted({key for plan in flat for key in plan})
    differing = [
        (key, [str(plan.get(key, DASH)) for plan in flat])
        for key in keys
        if len({json.dumps(plan.get(key), sort_keys=True) for plan in flat}) > 1
    ]
    series = {}
    for page in pages:
        for curve in list(learning_curves(views[page.facts.run]).values())[:1]:
            series[page.facts.run] = curve
    last = max([page.done for page in pages], default=1)
    return {
        "pages": pages,
        "differing": differing,
        "chart": line_chart("Learning curves", series, last=last),
    }

"""Charts of a run: how its rounds went, what was learned, what it cost in privacy.

Each chart is drawn for a laptop and for a phone, as inline SVG whose colours are the page's CSS
variables (so it follows light, dark and print) and whose text is text, and once as a PNG file.
Colours are Okabe and Ito's colour-blind-safe set ("Color universal design", 2008). Axes carry units,
marks carry their own labels, and colour is never the only difference.

A function that is named after a chart takes what was recorded, and returns None where there is nothing
to draw.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from silotune.events.view import Evaluation, RoundView, RunView
from silotune.plan.tasks import Metric
from silotune.report.figures import MOST_SITES, Curves, SiteScores
from silotune.report.verdict import printable

INK, MUTED, GRID, PAPER = "#1b1f24", "#5c6670", "#d8dde2", "#fefefe"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

# Light-theme colour -> CSS variable of report.css; nothing else may be used in a chart.
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    BLUE: "--federated",
    VERMILION: "--own",
    GREEN: "--pooled",
    PURPLE: "--probe",
}


@dataclass(frozen=True)
class Canvas:
    """A chart's page: its width in inches, font size in points, and whether it is a phone's."""

    width: float
    font: float
    narrow: bool


LAPTOP = Canvas(width=8.6, font=9.0, narrow=False)
PHONE = Canvas(width=4.97, font=11.0, narrow=True)

Draw = Callable[[Canvas], Figure]


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes
    ----------
    name : str
        Also the PNG's name: ``report-<name>.png``.
    draw : callable
        Draws it for a canvas.
    description : str
        What a screen reader says.
    """

    name: str
    draw: Draw
    description: str

    def figure(self) -> Figure:
        """The laptop's form in light colours, as a figure of Matplotlib."""
        with _style(LAPTOP):
            figure = self.draw(LAPTOP)
        figure.set_facecolor(PAPER)
        return figure

    @cached_property
    def _on_laptop(self) -> tuple[str, Figure]:
        with _style(LAPTOP):
            figure = self.draw(LAPTOP)
            wide = _svg(figure, f"{self.name}-wide", self.description)
        figure.set_layout_engine("none")  # it is laid out now; doing it again costs a third
        return wide, figure

    @property
    def wide(self) -> str:
        """An ``<svg>`` element for a laptop, ready to be put into the page."""
        return self._on_laptop[0]

    @property
    def png(self) -> bytes:
        """The laptop's form in light colours."""
        with _style(LAPTOP):
            return _png(self._on_laptop[1])

    @cached_property
    def narrow(self) -> str:
        """An ``<svg>`` element for a phone."""
        with _style(PHONE):
            return _svg(self.draw(PHONE), f"{self.name}-narrow", self.description)


def render(name: str, draw: Draw, *, description: str) -> Chart:
    """A chart, drawn in each of its forms when that is asked for."""
    return Chart(name, draw, description)


_SIZED = ("font.size", "axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize")


@contextmanager
def _style(canvas: Canvas) -> Iterator[None]:
    settings: dict[str, Any] = {
        **dict.fromkeys(_SIZED, canvas.font),
        "text.color": INK,
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
        **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "right", "left")), False),
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
        "text.parse_math": False,  # a site may be called "$x$"
        "svg.fonttype": "none",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # A name in a script that the PNG's font lacks shows as boxes there, and well in the page.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Software would date the file; without it equal runs give equal bytes.
    figure.savefig(buffer, format="png", dpi=160, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure, salt: str, description: str) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 (Matplotlib's own, just made)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in {f"{_SVG}metadata", f"{_SVG}style"}]:
            parent.remove(child)
    used = set(
        re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values()))
    )
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {
            name.removeprefix(_XLINK): _attribute(name, value, salt, used)
            for name, value in element.attrib.items()
            if name != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description}
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _attribute(name: str, value: str, salt: str, used: set[str]) -> str:
    """Unique ids for a page of many charts, CSS variables for colours, the page's own font."""
    if name == "id":
        return f"{salt}-{value}"
    if name == "style":
        value = re.sub(r"font-family:[^;]*;", "", value)
        value = re.sub(r"#[0-9a-f]{6}\b", _themed, value)
    if name == "d":
        value = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))
    return re.sub(r"#([\w-]+)", lambda m: f"#{salt}-{m[1]}" if m[1] in used else m[0], value)


def _themed(colour: re.Match[str]) -> str:
    return f"var({_VARIABLES[colour[0]]})" if colour[0] in _VARIABLES else colour[0]


def frame(canvas: Canvas, *, height: float) -> tuple[Figure, Any]:
    """A figure of the canvas' width and `height` inches, with one set of axes."""
    figure = Figure(figsize=(canvas.width, height), layout="constrained")
    return figure, figure.subplots()


def title(axes: Any, text: str) -> None:
    """What the vertical axis shows, written over it instead of along it."""
    axes.set_title(text, loc="left", color=MUTED)


def note(axes: Any, x: float, y: float, text: str, *, ha: str = "right", rise: float = 4) -> None:
    """Words beside a point, `rise` points over it (under it if negative)."""
    axes.annotate(
        text,
        (x, y),
        textcoords="offset points",
        xytext=(4 if ha == "left" else -4, rise),
        ha=ha,
        va="bottom" if rise > 0 else "top",
        color=MUTED,
    )


def key(axes: Any, entries: Sequence[tuple[str, str]], canvas: Canvas) -> None:
    """Names and colours in one line above the chart, in the order of the marks."""
    axes.legend(
        [Rectangle((0, 0), 1, 1, facecolor=colour) for _, colour in entries],
        [name for name, _ in entries],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(entries),
        frameon=False,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.0 if canvas.narrow else 1.6,
    )


def rounds_axis(axes: Any, *, first: int, last: int) -> None:
    """Whole rounds, with room for the half of a step at each end."""
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlim(first - 0.6, max(last, first) + 0.6)
    axes.set_xlabel("round")


def steps(numbers: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A value a round as a line of steps of width 1, centred on each round's number."""
    xs = [x for number in numbers for x in (number - 0.5, number + 0.5)]
    return xs, [value for value in values for _ in range(2)]


def site_names(
    axes: Any, names: Sequence[tuple[float, str]], canvas: Canvas, *, head: float
) -> None:
    """Names beside their rows; where there is no room at the side, `head` above them."""
    if not canvas.narrow:
        axes.set_yticks([at for at, _ in names], [name for _, name in names], color=INK)
        return
    axes.set_yticks([])
    for at, name in names:
        axes.annotate(
            name,
            (0, at - head),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 2),
            va="bottom",
        )


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

    def draw(canvas: Canvas) -> Figure:
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

    return render("time", draw, description=f"Time by round; in all: {told}")


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

    def draw(canvas: Canvas) -> Figure:
        figure, axes = frame(canvas, height=0.85 + (0.48 if canvas.narrow else 0.23) * len(shown))
        refused = {found.site: found.code for found in history.troubles if found.round is None}
        for row, site in enumerate(shown):
            # On a phone the upper part of a row is its name.
            _timeline_row(axes, row, site, settled, scale=0.6 if canvas.narrow else 1.0)
            if site in refused:
                box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
                axes.text(0.6, row, f"refused, {refused[site]}", va="center", bbox=box)
        for number in history.resumed_at:
            axes.axvline(number + 0.5, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        names = [(float(row), printable(site)) for row, site in enumerate(shown)]
        site_names(axes, names, canvas, head=0.36)
        axes.set_ylim(len(shown) - 0.5, -1.05 if canvas.narrow else -0.5)
        axes.grid(visible=False)
        key(axes, [("replied", BLUE), ("failed", VERMILION), ("not in the round", GRID)], canvas)
        rounds_axis(axes, first=1, last=max(settled[-1].number, history.planned))
        if history.resumed_at:
            axes.set_xlabel("round (dotted line: resumed)")
        return figure

    return render("timeline", draw, description=description)


def in_trouble_first(history: RunView, sites: Sequence[str]) -> list[str]:
    """Every site, or where they are too many for a chart first those that refused or failed."""
    if len(sites) <= MOST_SITES:
        return list(sites)
    troubled = {trouble.site for trouble in history.troubles}
    return sorted(sites, key=lambda site: site not in troubled)[:MOST_SITES]


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
        if (values := [(k[0], v) for k in kinds if (v := row.score(k[2], metric)) is not None])
    )

    def draw(canvas: Canvas) -> Figure:
        gap = 1.5 if canvas.narrow else 0.7  # in bars; a phone has the site's name in it
        step = len(kinds) + gap
        inches = 0.21 if canvas.narrow else 0.165
        figure, axes = frame(canvas, height=0.75 + inches * step * len(shown))
        for place, row in enumerate(shown):
            for offset, (_, colour, kind) in enumerate(kinds):
                value = row.score(kind, metric)
                if value is not None:
                    worse = kind == "federated" and row.gain is not None and row.gain < 0
                    _bar(axes, place * step + offset, value, colour, worse=worse, canvas=canvas)
        middle = (len(kinds) - 1) / 2
        names = [(place * step + middle, _site_label(row)) for place, row in enumerate(shown)]
        site_names(axes, names, canvas, head=len(kinds) / 2)
        axes.set_ylim(step * len(shown) - gap - 0.4, -2.0 if canvas.narrow else -0.6)
        axes.set_xlim(0, 1.14 * axes.dataLim.x1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{metric.title} on the site's own held-out data")
        key(axes, [(name, colour) for name, colour, _ in kinds], canvas)
        return figure

    return render("sites", draw, description=f"{metric.title} by site. {told}")


def most_telling(rows: Sequence[SiteScores]) -> list[SiteScores]:
    """All rows, or where there are too many for a chart those with the smallest and largest gain."""
    if len(rows) <= MOST_SITES:
        return list(rows)
    ordered = sorted(rows, key=lambda row: row.gain or 0.0)
    half = MOST_SITES // 2
    return [*ordered[:half], *ordered[-half:]]


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

    def draw(canvas: Canvas) -> Figure:
        figure, axes = frame(canvas, height=3.0 if canvas.narrow else 2.7)
        for curve in curves.values():
            axes.plot([n for n, _ in curve], [e for _, e in curve], color=BLUE, linewidth=1.1)
        top = max(planned or 0.0, ends[-1])
        if planned is not None:
            axes.axhline(planned, color=VERMILION, linewidth=1.4, linestyle=(0, (5, 3)))
            note(
                axes, 0.4, planned, f"plan: \N{GREEK SMALL LETTER EPSILON} = {planned:g}", ha="left"
            )
        who = f"{len(curves)} sites" if len(curves) > 1 else printable(next(iter(curves)), most=30)
        spent = [f"{end:.2f}" for end in dict.fromkeys((ends[0], ends[-1]))]
        note(axes, last, ends[0], f"{who}: {' to '.join(spent)}", rise=-16)
        axes.set_ylim(0, 1.15 * top)
        title(axes, "\N{GREEK SMALL LETTER EPSILON} spent so far")
        rounds_axis(axes, first=1, last=last)
        return figure

    return render("epsilon", draw, description=description)


def score_bars(rows: Sequence[tuple[str, float | None]], name: str) -> Figure:
    """A bar a row of name and score, the first on top; rows without a score have none."""

    def draw(canvas: Canvas) -> Figure:
        figure, axes = frame(canvas, height=0.7 + 0.34 * len(rows))
        for at, (_, value) in enumerate(rows):
            if value is not None:
                _bar(axes, at, value, BLUE, worse=False, canvas=canvas)
        site_names(axes, [(at, printable(row)) for at, (row, _) in enumerate(rows)], canvas, head=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        title(axes, f"{name.replace('_', '-')} on held-out data")
        return figure

    return Chart("scores", draw, name).figure()

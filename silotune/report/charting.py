"""How charts look and travel: one drawing, in three forms.

Each chart is drawn for a laptop and for a phone, as inline SVG whose colours are the page's CSS
variables (so it follows light, dark and print) and whose text is text, and once as a PNG file.
Colours are Okabe and Ito's colour-blind-safe set ("Color universal design", 2008).

What several charts share: frames, notes, keys, the axis of rounds, names of sites.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

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
    wide, narrow : str
        ``<svg>`` elements, ready to be put into the page.
    png : bytes
        The laptop's form in light colours.
    """

    name: str
    wide: str
    narrow: str
    png: bytes


def render(name: str, draw: Draw, *, description: str) -> Chart:
    """Draw a chart in all its forms. `description` is what a screen reader says."""
    with _style(LAPTOP):
        figure = draw(LAPTOP)
        wide = _svg(figure, f"{name}-wide", description)
        figure.set_layout_engine("none")  # it is laid out now; doing it again costs a third
        png = _png(figure)
    with _style(PHONE):
        narrow = _svg(draw(PHONE), f"{name}-narrow", description)
    return Chart(name=name, wide=wide, narrow=narrow, png=png)


@contextmanager
def _style(canvas: Canvas) -> Iterator[None]:
    settings: dict[str, Any] = {
        "font.size": canvas.font,
        "axes.labelsize": canvas.font,
        "axes.titlesize": canvas.font,
        "xtick.labelsize": canvas.font,
        "ytick.labelsize": canvas.font,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "axes.facecolor": "none",
        "figure.facecolor": "none",
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


def key(
    axes: Any,
    entries: Sequence[tuple[str, str]],
    canvas: Canvas,
) -> None:
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

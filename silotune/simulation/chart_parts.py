"""What several charts share: frames, notes, keys, the axis of rounds, names of sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from silotune.simulation.charting import INK, MUTED, Canvas


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

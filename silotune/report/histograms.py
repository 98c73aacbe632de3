"""Histograms of a statistics run: bars with the intervals of their noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from silotune.report.charts import BLUE, INK, MUTED, Canvas, Chart, frame, render, site_names


def histogram_chart(
    name: str, heading: str, rows: Sequence[tuple[str, Any]], *, floor: float
) -> Chart | None:
    """Shares by group, with the intervals of their noise; what is not shown says so.

    Parameters
    ----------
    name : str
        The chart's.
    heading : str
        What is counted.
    rows : sequence of (group, share)
        A share is ``{"value", "low", "high"}``, or None for a group that is not shown.
    floor : float
        Units below which none is.
    """
    if not any(share for _, share in rows):
        return None
    told = ", ".join(f"{group} {share['value']:.1%}" for group, share in rows if share)

    def draw(canvas: Canvas) -> Figure:
        each = 0.5 if canvas.narrow else 0.3
        figure, axes = frame(canvas, height=0.75 + each * len(rows))
        for at, (_, share) in enumerate(rows):
            _bar(axes, at, share, floor=floor, canvas=canvas)
        names = [(at, group) for at, (group, _) in enumerate(rows)]
        site_names(axes, names, canvas, head=0.3)
        axes.set_ylim(len(rows) - 0.4, -0.9 if canvas.narrow else -0.6)
        axes.set_xlim(0, 1.16 * max(share["high"] for _, share in rows if share))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(visible=False, axis="y")
        return figure

    return render(name, draw, description=f"{heading}: {told}")


def _bar(axes: Any, at: float, share: Any, *, floor: float, canvas: Canvas) -> None:
    if share is None:
        text, end, colour = f"fewer than {floor:,.0f}", 0.0, MUTED
    else:
        text, end, colour = f"{share['value']:.1%}", share["high"], INK
        axes.barh(at, share["value"], height=0.44 if canvas.narrow else 0.7, color=BLUE)
        axes.plot([share["low"], share["high"]], [at, at], color=INK, linewidth=1.4)
    axes.annotate(
        text,
        (end, at),
        textcoords="offset points",
        xytext=(4, 0),
        va="center",
        color=colour,
        size=canvas.font - 1.0,
    )

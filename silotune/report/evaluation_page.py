"""An evaluation on one page, for the site's own people: figures, pictures, what they mean.

The page is one file that fetches nothing and runs no script. Its numbers are exact, so it says at the
head that it is not for sharing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from silotune.inference.evaluated import (
    Calibration,
    Estimates,
    Figure,
    Groups,
    ModelEvaluation,
    in_words,
    title_of,
)
from silotune.report.page import TextTable
from silotune.report.report import InlineChart, can_draw, fill
from silotune.report.verdict import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

    from silotune.report.charts import Canvas, Chart

_MOST_ROWS = 24
_SHARES = ("accuracy", "macro_f1", "entity_f1")


def render_evaluation(found: ModelEvaluation) -> str:
    """The page as text; everything that is not ours is escaped by Jinja."""
    return fill(
        "evaluation.html",
        found=found,
        can_draw=can_draw(),
        metrics=[(title_of(name), in_words(figure)) for name, figure in found.metrics.items()],
        labels=_labels(found),
        confusion=_confusion(found),
        threshold=_named(found.threshold.figures) if found.threshold else None,
        differences=_named(found.comparison.differences, sign="+") if found.comparison else None,
        groups=_groups(found.groups) if found.groups else None,
        charts={name: InlineChart(chart) for name, chart in draw_evaluation(found).items()},
    )


def _labels(found: ModelEvaluation) -> TextTable | None:
    keys = found.told_of_labels
    rows = [
        (
            printable(row.label),
            f"{row.records:,}",
            *(in_words(getattr(row, key)) for key in keys),
        )
        for row in found.labels
    ]
    head = ("label", found.counted, *map(title_of, keys))
    return TextTable(head, tuple(rows)) if rows else None


def _confusion(found: ModelEvaluation) -> TextTable | None:
    if not found.confusion:
        return None
    names = [printable(name) for name in found.label_names]
    rows = [
        (name, *(f"{count:,}" for count in counts))
        for name, counts in zip(names, found.confusion, strict=False)
    ]
    return TextTable(("truth, and what is answered", *names), tuple(rows)) if rows else None


def _named(figures: Mapping[str, Figure], *, sign: str = "") -> TextTable:
    rows = [(title_of(name), in_words(figure, sign=sign)) for name, figure in figures.items()]
    return TextTable(("figure", "value"), tuple(rows))


def _groups(found: Groups) -> TextTable | None:
    if not found.shown:
        return None
    names = list(found.shown[0].figures)
    rows = [
        (
            printable(row.group),
            f"{row.units:,}",
            f"{row.records:,}",
            *(in_words(row.figures[name]) for name in names),
        )
        for row in found.shown
    ]
    head = (printable(found.column), "units", "records", *map(title_of, names))
    return TextTable(head, tuple(rows))


def draw_evaluation(found: ModelEvaluation) -> dict[str, Chart]:
    """The pictures that there is something for, if Matplotlib is here."""
    if not can_draw():
        return {}
    drawn: dict[str, Chart | None] = {}
    if found.calibration is not None:
        after = found.temperature.after if found.temperature else None
        before = found.temperature.before if found.temperature else found.calibration
        drawn["reliability"] = _reliability(before, after)
    if found.labels:
        rows = [(printable(row.label), row.f1) for row in found.labels]
        drawn["labels"] = _bars("labels", "F1 of each label", rows)
    if found.estimates is not None:
        drawn["estimates"] = _against_truth(found.estimates)
    if found.groups is not None and (name := _first_share(found.groups)):
        rows = [(printable(row.group), row.figures[name]) for row in found.groups.shown]
        drawn["groups"] = _bars(
            "groups", f"{title_of(name)} by {printable(found.groups.column)}", rows
        )
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _first_share(groups: Groups) -> str:
    """The first figure of groups that is between 0 and 1, as bars show it."""
    told = {name for row in groups.shown for name in row.figures}
    return next((name for name in _SHARES if name in told), "")


def _against_truth(found: Estimates) -> Chart:
    from silotune.report.charts import BLUE, MUTED, frame, render

    low, high = min(found.truth + found.said), max(found.truth + found.said)
    room = 0.03 * (high - low) or 1.0

    def draw(canvas: Canvas) -> Picture:
        figure, axes = frame(canvas, height=4.2)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1.0, linestyle="--")
        axes.plot(
            found.truth,
            found.said,
            color=BLUE,
            linestyle="none",
            marker="o",
            markersize=4,
            markeredgewidth=0,
            alpha=0.45,
        )
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(low - room, high + room)
        axes.set_xlabel("true value")
        axes.set_ylabel("estimated value")
        return figure

    told = f"Estimated against true values of {len(found.truth):,} records, {low:g} to {high:g}"
    return render("estimates", draw, description=told)


def _reliability(before: Calibration, after: Calibration | None) -> Chart:
    from silotune.report.charts import BLUE, MUTED, VERMILION, frame, key, render

    kinds = [("as it is", before, VERMILION, "o")]
    if after is not None:
        kinds.append(("with the temperature", after, BLUE, "s"))

    def draw(canvas: Canvas) -> Picture:
        figure, axes = frame(canvas, height=4.2)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle="--")
        for _, calibration, colour, marker in kinds:
            seen = [b for b in calibration.bins if b.probability is not None]
            axes.plot(
                [b.probability for b in seen], [b.share for b in seen], color=colour, marker=marker
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(
            "mean probability of a bin"
            if not before.of
            else f"mean probability of {printable(before.of)}"
        )
        axes.set_ylabel("how often it is so")
        key(axes, [(name, colour) for name, _, colour, _ in kinds], canvas)
        return figure

    errors = ", ".join(f"{name} {calibration.ece:.3f}" for name, calibration, _, _ in kinds)
    return render("reliability", draw, description=f"Reliability; expected error {errors}")


def _bars(name: str, heading: str, rows: Sequence[tuple[str, Figure]]) -> Chart | None:
    from silotune.report.charts import BLUE, INK, frame, render, site_names

    told = [(label, f, f.value) for label, f in rows if f.value is not None][:_MOST_ROWS]
    if not told:
        return None

    def draw(canvas: Canvas) -> Picture:
        each = 0.5 if canvas.narrow else 0.34
        figure, axes = frame(canvas, height=0.75 + each * len(told))
        for at, (_, found, value) in enumerate(told):
            axes.barh(at, value, height=0.44 if canvas.narrow else 0.6, color=BLUE)
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [at, at], color=INK, linewidth=1.4)
            axes.annotate(
                f"{value:.3f}",
                (max(value, found.high or 0.0), at),
                textcoords="offset points",
                xytext=(4, 0),
                va="center",
                color=INK,
                size=canvas.font - 1.0,
            )
        names = [(float(at), label) for at, (label, _, _) in enumerate(told)]
        site_names(axes, names, canvas, head=0.3)
        axes.set_ylim(len(told) - 0.4, -0.9 if canvas.narrow else -0.6)
        axes.set_xlim(0, 1.12)
        axes.grid(visible=False, axis="y")
        return figure

    listed = ", ".join(f"{label} {value:.3f}" for label, _, value in told)
    return render(name, draw, description=f"{heading}: {listed}")
